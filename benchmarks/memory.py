"""Peak memory of a search step over that of one whole run, on the CPU, where torch frees what it no longer needs.

    python benchmarks/memory.py --chunk 32

By default MobileNetV2 at 1.5x and 224x224. Each way runs in a process of its own, whose peak resident memory is read
before and after: the difference is what the images and the activations took.
"""

import resource
import subprocess
import sys
from typing import Annotated

import torch
import typer

from autoslim.channels.resize import resize
from autoslim.models.building import build_network
from autoslim.search.incremental import IncrementalEvaluator
from autoslim.supernet.supernet import Supernet
from autoslim.tracing import trace

WAYS = ("one whole run", "search step, only what changes")


def main(
    network: Annotated[str, typer.Option(help="Import path.")] = "torchvision.models:mobilenet_v2",
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 224,
    chunk: Annotated[int, typer.Option(help="Images that are scored together.")] = 32,
    width: Annotated[float, typer.Option(help="Of the supernet.")] = 1.5,
    way: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Prints the peak of both ways, in MiB for each image."""
    if way is None:
        for number, name in enumerate(WAYS):
            command = [sys.executable, __file__, *sys.argv[1:], "--way", str(number)]
            peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{name}: {peak:,.0f} MiB for a chunk of {chunk}, {peak / chunk:.1f} MiB an image")
        return
    torch.set_num_threads(1)
    plain = build_network(network, {})
    graph = trace(plain, torch.empty(1, 3, size, size))
    supernet = Supernet(resize(plain, graph, graph.scaled(width)), graph).eval().to(memory_format=torch.channels_last)
    tails = IncrementalEvaluator(supernet)
    slimmer = {name: count - graph.groups[name].unit for name, count in supernet.widest.items()}
    with torch.inference_mode():
        supernet(torch.randn(1, 3, size, size))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        images = torch.randn(chunk, 3, size, size).to(memory_format=torch.channels_last)
        if way == 0:
            supernet(images)
        else:
            for _ in tails.run(images, supernet.widest, slimmer):
                pass
    unit = 2**20 if sys.platform == "darwin" else 2**10
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit)


if __name__ == "__main__":
    typer.run(main)
