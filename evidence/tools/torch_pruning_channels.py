"""Prunes a trained network by Torch-Pruning (Fang et al., "DepGraph", 2023): group magnitude, over all groups together.

Torch-Pruning takes the share of channels to remove, not a budget. It is bisected here. Each share is removed at once
from the trained network, as in the tool's own examples without training between the steps.
"""

import copy

import torch_pruning as tp
from allocation import Job
from torch import nn

TOOL = "torch_pruning"
BISECTIONS = 12  # to 1/4096 of the channels


def main() -> None:
    job = Job.read()
    grid = job.params.supernet.grid
    # Latency tables contain the grid's numbers of channels only, and odd numbers are slow; other resources have none.
    round_to = grid.divisor if "latency" in job.limits else None

    def pruned(ratio: float) -> nn.Module:
        network = copy.deepcopy(job.network)
        unchanged = [network.get_submodule(name) for name in job.graph.not_prunable]
        pruner = tp.pruner.BasePruner(
            network,
            job.example,
            importance=tp.importance.GroupMagnitudeImportance(),
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=1 - grid.narrowest,
            ignored_layers=unchanged,
            round_to=round_to,
        )
        pruner.step()
        return network

    low, high = 0.0, 1 - grid.narrowest
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if job.fits(pruned(middle)) else (middle, high)
    job.write(TOOL, pruned(high))


if __name__ == "__main__":
    main()
