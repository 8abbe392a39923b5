"""What the tools of other projects read and write. Each runs in a run's folder, in place of the stage ``allocate``."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.resize import current_channels, resize
from autoslim.data.prepared import PreparedData
from autoslim.models.pretrained import insert_weights, load_trained_tensors
from autoslim.pipeline.artifacts import Allocation, write_initial_weights
from autoslim.pipeline.assembly import traced_network
from autoslim.pipeline.costs import budget_limits, load_costs
from autoslim.pipeline.params import Params, load_params
from autoslim.pipeline.project import CHANNELS, PREPARED, repository_root
from autoslim.resources.costs import Costs
from autoslim.tracing import trace


@dataclass(frozen=True)
class Job:
    """A trained network and its budget.

    Attributes:
        params: the parameters of the run.
        data: the prepared images.
        network: the trained network, in evaluation mode.
        graph: ``trace`` of it.
    """

    params: Params
    data: PreparedData
    network: nn.Module
    graph: ChannelGraph

    @classmethod
    def read(cls) -> "Job":
        """Reads the files of the working directory."""
        torch.set_num_threads(1)
        params = load_params()
        data = PreparedData.open(PREPARED, relative_to=repository_root())
        network, graph = traced_network(params.model, data.info)
        if params.model.weights is None:
            raise SystemExit("model.weights is null; there is no trained network")
        tensors = load_trained_tensors(network, params.model.name, params.model.kwargs, params.model.weights)
        trained, new = insert_weights(network, graph, tensors, seed=0, source="model.weights")
        if new:
            raise SystemExit(f"model.weights are for other classes ({', '.join(new)})")
        return cls(params, data, trained.eval(), graph)

    @property
    def example(self) -> torch.Tensor:
        images: torch.Tensor = self.data.info.example()
        return images

    @cached_property
    def costs(self) -> Costs:
        return load_costs(self.graph)

    @cached_property
    def limits(self) -> dict[str, float]:
        return budget_limits(self.params, self.costs)

    def fits(self, pruned: nn.Module) -> bool:
        """Returns whether a pruned copy of the network is within the budget, by autoslim's counts."""
        return self.costs.within(current_channels(pruned, self.graph), self.limits)

    def write(self, tool: str, pruned: nn.Module) -> None:
        """Writes the channels and the weights of a pruned copy of the network, which all methods are retrained from.

        Its MACs and parameters are also counted by tracing it anew.
        """
        channels = current_channels(pruned, self.graph)
        plain = resize(self.network, self.graph, channels, seed=None)
        plain.load_state_dict(pruned.state_dict())
        counted = trace(plain, self.example)
        if (counted.macs(), counted.params()) != (self.graph.macs(channels), self.graph.params(channels)):
            raise SystemExit(f"{tool}: the pruned network has other costs than its channels {channels}")
        if counted.params() != sum(parameter.numel() for parameter in pruned.parameters()):
            raise SystemExit(f"{tool}: the pruned network has other parameters than its channels {channels}")
        if not self.fits(pruned):
            raise SystemExit(f"{tool}: the pruned network exceeds the budget {self.limits}")
        Allocation(tool, channels, self.costs.all(channels), "supernet").write(CHANNELS)
        write_initial_weights(CHANNELS, tool, plain)
