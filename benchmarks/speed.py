"""Speed of the library, as ratios to plain networks and simple implementations that are measured in the same run.

    python benchmarks/speed.py                                        # on the GPU if there is one
    python benchmarks/speed.py --device cpu --params presets/cifar10.yaml --batch 64 --rounds 10

* step: the time of a sandwich step (widest, narrowest, two random) over that of the same four configurations as plain
  networks, each with forward, loss and backward;
* forward: the time of a configuration in the supernet over that of the plain network, both with batch statistics;
* data: the time to make an augmented batch from arrays in memory over that of the sandwich step that uses it, which is
  an upper bound of the share spent waiting for data;
* search step: the time to score each group's candidate by whole forward passes over that of incremental evaluation
  (``autoslim.search.incremental``).

Each round measures every ratio once, at newly drawn widths and after a warm-up, because libraries prepare kernels for
each new shape. The benchmark prints the median and the quartiles over all rounds.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import nn

from autoslim.channels.groups import Channels
from autoslim.channels.resize import initialise, resize
from autoslim.data.batches import train_batches
from autoslim.data.prepared import FILE_NAME, SPLITS, DataInfo, PreparedData, images_path, labels_path
from autoslim.models.building import build_network
from autoslim.pipeline.assembly import grid_spec, recipe
from autoslim.pipeline.params import load_params
from autoslim.search.incremental import IncrementalEvaluator
from autoslim.supernet.sandwich import random_subnet, sandwich_step
from autoslim.supernet.supernet import Supernet
from autoslim.tracing import trace
from autoslim.training.device import Precision, autocast, select_device, to_device

CLASSES = 10
BATCHES = 8


class Bench:
    """A randomly initialised supernet on a device, random images, and plain networks of its configurations."""

    def __init__(self, params: Path, device: str, batch: int, chunk: int, precision: Precision) -> None:
        loaded = load_params(params)
        size, channels = loaded.data.size or (32, 32), loaded.data.channels or 3
        plain = build_network(loaded.model.name, loaded.model.kwargs, CLASSES)
        graph = trace(plain, torch.empty(1, channels, *size))
        self.grid = graph.grid(grid_spec(loaded.supernet))
        wide = resize(plain, graph, {name: levels[0] for name, levels in self.grid.items()})
        initialise(wide, 0)
        self.device = select_device(device)
        self.cast = autocast(self.device, precision)
        self.supernet = Supernet(wide, graph)
        to_device(self.supernet, self.device, channels_last=True)
        images = torch.randn(max(batch, chunk), channels, *size, device=self.device)
        self.images = images.to(memory_format=torch.channels_last)
        self.batch, self.chunk = batch, chunk
        self.labels = torch.randint(CLASSES, (batch,), device=self.device)
        self.evaluator = IncrementalEvaluator(self.supernet)
        self.data = random_data(Path(tempfile.mkdtemp()), size, channels)
        self.augmentation = recipe(loaded.supernet).augmentation

    def configurations(self, number: int) -> dict[str, Channels]:
        """Returns the four configurations of a sandwich step."""
        ends = {
            which: {n: levels[i] for n, levels in self.grid.items()} for which, i in (("widest", 0), ("narrowest", -1))
        }
        return ends | {f"random {i}": random_subnet(self.grid, 0, number, i) for i in (0, 1)}

    def plain(self, channels: Channels) -> nn.Module:
        """Extracts a plain network that uses batch statistics."""
        network = self.supernet.extract(channels)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.track_running_stats = False
                module.running_mean = module.running_var = None
        return to_device(network, self.device, channels_last=True)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Returns the seconds that the second of two runs takes."""
        work()
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def plain_step(self, networks: list[nn.Module]) -> None:
        for network in networks:
            with self.cast():
                loss = F.cross_entropy(network.train()(self.images[: self.batch]), self.labels)
            loss.backward()

    def sandwich(self, subnets: list[Channels]) -> None:
        self.supernet.train()
        with self.cast():
            sandwich_step(self.supernet, (self.images[: self.batch], self.labels), subnets)

    def make_batches(self) -> None:
        batches = train_batches(
            self.data, batch_size=self.batch, augmentation=self.augmentation, seed=0, epoch=0, device=self.device
        )
        for _ in range(BATCHES):
            next(batches)

    @torch.inference_mode()
    def forward(self, network: nn.Module) -> None:
        with self.cast():
            network.eval()(self.images[: self.batch])

    @torch.inference_mode()
    def search_step(self, current: Channels, *, incremental: bool) -> None:
        """Scores the candidate of every group that is not at its narrowest."""
        candidates = {n: next(v for v in s if v < current[n]) for n, s in self.grid.items() if current[n] > s[-1]}
        images = self.images[: self.chunk]
        self.supernet.eval()
        with self.cast():
            if incremental:
                list(self.evaluator.run(images, current, candidates))
                return
            for name, count in candidates.items():
                self.supernet.select({**current, name: count})
                self.supernet(images)

    def round(self, number: int) -> Iterator[tuple[str, float]]:
        """Yields the name and the value of each ratio."""
        configurations = self.configurations(number)
        networks = {which: self.plain(channels) for which, channels in configurations.items()}
        plain = self.seconds(lambda: self.plain_step([*networks.values()]))
        subnets = [channels for which, channels in configurations.items() if which != "widest"]
        sandwich = self.seconds(lambda: self.sandwich(subnets))
        yield "step: sandwich / four plain networks", sandwich / plain
        yield "data: making a batch / sandwich step", self.seconds(self.make_batches) / BATCHES / sandwich
        for which in ("widest", "narrowest", "random 0"):
            alone = self.seconds(lambda which=which: self.forward(networks[which]))  # type: ignore[misc]
            self.supernet.select(configurations[which])
            inside = self.seconds(lambda: self.forward(self.supernet))
            yield f"forward, {which.split()[0]}: supernet / plain network", inside / alone
        whole = self.seconds(lambda: self.search_step(configurations["random 0"], incremental=False))
        part = self.seconds(lambda: self.search_step(configurations["random 0"], incremental=True))
        yield "search step: whole forward passes / incremental", whole / part

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def random_data(folder: Path, size: tuple[int, int], channels: int) -> PreparedData:
    """Writes random images as prepared arrays, enough for ``BATCHES`` batches."""
    counts = dict.fromkeys(SPLITS, 8192)
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        np.save(images_path(folder, split), generator.integers(0, 256, (count, channels, *size), np.uint8))
        np.save(labels_path(folder, split), generator.integers(0, CLASSES, count))
    moments = (0.5,) * channels, (0.25,) * channels
    classes = tuple(str(number) for number in range(CLASSES))
    info = DataInfo("noise", classes, channels, size, *moments, counts, "arrays")
    (folder / FILE_NAME).write_text(info.to_json())
    return PreparedData.open(folder)


def main(
    params: Annotated[Path, typer.Option(help="Params file with the network, the image size and the grid.")] = Path(
        "benchmarks/search.yaml"
    ),
    batch: Annotated[int, typer.Option(help="Number of images of a training step.")] = 32,
    chunk: Annotated[int, typer.Option(help="Number of images that are scored together.")] = 256,
    rounds: Annotated[int, typer.Option(help="Number of measurements of each ratio.")] = 10,
    bf16: Annotated[bool, typer.Option(help="Use mixed precision.")] = False,
    device: Annotated[str, typer.Option(help="Device, as in runtime.device.")] = "auto",
    threads: Annotated[int, typer.Option(help="Number of torch's threads on the CPU.")] = 1,
    to: Annotated[Path | None, typer.Option(help="JSON file for all ratios.")] = None,
) -> None:
    """Run the benchmark and print a table."""
    torch.set_num_threads(threads)
    bench = Bench(params, device, batch, chunk, "bf16" if bf16 else "fp32")
    ratios: dict[str, list[float]] = {}
    for number in range(rounds):
        for name, ratio in bench.round(number):
            ratios.setdefault(name, []).append(ratio)
    settings = {
        **{"params": str(params), "batch": batch, "chunk": chunk, "bf16": bf16, "device": str(bench.device)},
        **{"threads": threads, "torch": torch.__version__, "python": platform.python_version()},
    }
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    print(f"| ratio | median of {rounds} | quartiles |\n|---|---:|---:|")
    for name, values in ratios.items():
        low, _, high = quantiles(values, n=4)
        print(f"| {name} | {median(values):.3g} | {low:.3g} to {high:.3g} |")
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps({**settings, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
