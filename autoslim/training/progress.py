"""Progress of long work: a bar on a terminal, a line now and then where there is none."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self

from tqdm import tqdm

LINE_EVERY_S = 30.0


class Progress:
    """``total`` pieces of work under a label, with figures beside them.

    On a terminal it is a bar with the time left. Elsewhere (DVC's queue, CI, a log file) it prints a line every 30
    seconds, and one at the end.
    """

    def __init__(self, label: str, total: int, unit: str = "step", done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._done = self._first = done
        self._figures: dict[str, str] = {}
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(desc=label, total=total, unit=unit, initial=done, dynamic_ncols=True, leave=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._first:
            self._line()

    def show(self, **figures: float | str) -> None:
        """Figures to stand beside the bar from now on; fractions named ``...top1`` are shown in percent."""
        for name, value in figures.items():
            if isinstance(value, str):
                self._figures[name] = value
            elif name.endswith("top1"):
                self._figures[name.replace("_", " ")] = f"{value:.1%}"
            else:
                self._figures[name.replace("_", " ")] = f"{value:.4g}"
        if self._bar is not None:
            self._bar.set_postfix(self._figures, refresh=False)

    def expect(self, total: int) -> None:
        """A new estimate of the whole."""
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
        """A line of its own that the bar does not overwrite."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _line(self) -> None:
        self._last = time.monotonic()
        passed = self._last - self._start
        pace = passed / max(1, self._done - self._first)
        left = _minutes(pace * (self.total - self._done))
        figures = "".join(f", {name} {value}" for name, value in self._figures.items())
        state = f"{self._done}/{self.total} {self.unit}s{figures}"
        tail = f"{left} left" if self._done < self.total else f"took {_minutes(passed)}"
        print(f"{self.label}: {state}, {tail}", file=sys.stderr, flush=True)


def progress_over(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
    """Iterates over ``items`` with progress shown."""
    with Progress(label, total, unit="image") as progress:
        for item in items:
            yield item
            progress.advance()


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
