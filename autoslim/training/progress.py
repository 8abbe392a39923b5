"""Progress of long-running work: a bar on a terminal, otherwise a line every 30 seconds."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self

from tqdm import tqdm

LINE_EVERY_S = 30.0


class Progress:
    """Shows the progress of ``total`` units of work, with metrics.

    If the first ``done`` of them are from an interrupted run, this is printed at once. On a terminal, a bar shows the
    remaining time. Elsewhere (DVC's queue, CI, a log file), a line is printed every 30 seconds and at the end. If
    ``brief``, nothing is shown of work that takes less time than this.
    """

    def __init__(self, label: str, total: int, unit: str = "step", done: int = 0, *, brief: bool = False) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._done = self._first = done
        self._metrics: dict[str, str] = {}
        self._start = self._last = time.monotonic()
        self._brief = brief
        self._bar: Any = None
        if sys.stderr.isatty():
            delay = LINE_EVERY_S if brief else 0
            self._bar = tqdm(
                desc=label, total=total, unit=unit, initial=done, dynamic_ncols=True, leave=True, delay=delay
            )

    def __enter__(self) -> Self:
        if self._first:
            self.write(f"{self.label}: continuing at {self.unit} {self._first} of {self.total}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._first and not (self._brief and self._last == self._start):
            self._line()

    def show(self, **metrics: float | str) -> None:
        """Sets the metrics to show."""
        for name, value in metrics.items():
            if isinstance(value, str):
                self._metrics[name.replace("_", " ")] = value
            else:
                self._metrics[name.replace("_", " ")] = f"{value:.4g}"
        if self._bar is not None:
            self._bar.set_postfix(self._metrics, refresh=False)

    def expect(self, total: int) -> None:
        """Sets a new estimate of the total."""
        self.total = max(total, self._done)
        if self._bar is not None:
            self._bar.total = self.total

    def advance(self, count: int = 1) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last >= LINE_EVERY_S:
            self._line()

    def write(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _line(self) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._start
        seconds_per_unit = elapsed / max(1, self._done - self._first)
        remaining = _minutes(seconds_per_unit * (self.total - self._done))
        metrics = "".join(f", {name} {value}" for name, value in self._metrics.items())
        state = f"{self._done}/{self.total} {self.unit}s{metrics}"
        duration = f"{remaining} left" if self._done < self.total else f"took {_minutes(elapsed)}"
        print(f"{self.label}: {state}, {duration}", file=sys.stderr, flush=True)


def progress_over(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
    """Iterates over ``items`` and shows the progress."""
    with Progress(label, total, unit="image") as progress:
        for item in items:
            yield item
            progress.advance()


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
