"""Peak memory of a search step, with incremental evaluation, and of one forward pass of the supernet, on the CPU.

    python benchmarks/memory.py --chunk 32

The default network is MobileNetV2 at 1.5x and 224x224. Each measurement runs in a separate process. The increase of
its peak resident memory is what the images and the activations take.
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

MEASUREMENTS = ("one forward pass", "search step, incremental")


def main(
    network: Annotated[str, typer.Option(help="Import path of the network.")] = "torchvision.models:mobilenet_v2",
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 224,
    chunk: Annotated[int, typer.Option(help="Number of images that are scored together.")] = 32,
    width: Annotated[float, typer.Option(help="Width of the supernet.")] = 1.5,
    measurement: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print the peak memory of both, in MiB per chunk and per image."""
    if measurement is None:
        for index, name in enumerate(MEASUREMENTS):
            command = [sys.executable, __file__, *sys.argv[1:], "--measurement", str(index)]
            peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{name}: {peak:,.0f} MiB for a chunk of {chunk}, {peak / chunk:.1f} MiB per image")
        return
    torch.set_num_threads(1)
    plain = build_network(network, {})
    graph = trace(plain, torch.empty(1, 3, size, size))
    supernet = Supernet(resize(plain, graph, graph.scaled(width)), graph).eval().to(memory_format=torch.channels_last)
    evaluator = IncrementalEvaluator(supernet)
    candidates = {name: count - graph.groups[name].unit for name, count in supernet.widest.items()}
    with torch.inference_mode():
        supernet(torch.randn(1, 3, size, size))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        images = torch.randn(chunk, 3, size, size).to(memory_format=torch.channels_last)
        if measurement == 0:
            supernet(images)
        else:
            for _ in evaluator.run(images, supernet.widest, candidates):
                pass
    unit = 2**20 if sys.platform == "darwin" else 2**10
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit)


if __name__ == "__main__":
    typer.run(main)
