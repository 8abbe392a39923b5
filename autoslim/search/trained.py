"""The methods that prune a trained network: the channels that they choose, and the network that they leave."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from autoslim.channels.batches import Batch, call
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import Grid
from autoslim.channels.groups import Channels
from autoslim.channels.resize import resize
from autoslim.channels.sort import channel_importance, descending_orders, permute, taylor_importance
from autoslim.data.batches import search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.resources.costs import Fits
from autoslim.search.pruning import Numbers, least_sensitive, most_important, sensitivities
from autoslim.search.search import SearchSettings, scoring_runners
from autoslim.supernet.extract import recalibrator
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.task import Task
from autoslim.training.device import RunContext, to_device

TAYLOR_BATCH = 64  # images whose gradients are averaged; a backward pass needs more memory than scoring


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network, and what pruning it needs.

    Channels are ranked by their importance within their group: ``bn_scale`` and ``taylor`` by their own, all other
    methods by ``l1`` (see ``channel_importance`` and ``taylor_importance``). A group whose channels have to keep their
    order keeps the first ones instead.

    Attributes:
        network: the trained network, on the CPU. It is not changed.
        graph: ``trace`` of it.
        settings: the images that ``taylor`` and ``sensitivity`` use, and the score of ``sensitivity``.
        seed: seed of the order of the search images.
    """

    network: nn.Module
    graph: ChannelGraph
    data: PreparedData
    context: RunContext
    settings: SearchSettings
    seed: int
    task: Task
    _importance: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False)
    _sorted: dict[str, nn.Module] = field(default_factory=dict, init=False)

    def channels(self, method: str, grid: Grid, numbers: Numbers, fits: Fits) -> Channels:
        """Returns the numbers of channels that ``l1``, ``bn_scale``, ``taylor`` or ``sensitivity`` chooses.

        Args:
            grid: the numbers of channels that ``sensitivity`` scores, at most those of the network.
            numbers: the numbers of channels that the others choose from.
            fits: returns whether a configuration is within the limits.

        Raises:
            UserError: even the narrowest configuration exceeds the limits, or the network has no such importance.
        """
        if method != "sensitivity":
            return most_important(self._units(method), self.graph.groups, numbers, fits)
        supernet = Supernet(resize(self._ordered(method), self.graph, grid.widest, seed=None), self.graph)
        to_device(supernet, self.context.device, channels_last=True)
        runners, _ = scoring_runners(supernet, self.data, self.context, self.settings, self.seed, self.task)
        return least_sensitive(sensitivities(runners, grid, self.settings.score), fits)

    def pruned(self, method: str, channels: Channels) -> nn.Module:
        """Returns the network with the most important channels of each group, and recalibrated batch norms."""
        network = resize(self._ordered(method), self.graph, channels, seed=None)
        to_device(network, self.context.device, channels_last=True)
        return recalibrator(self.data, self.context, seed=self.seed)(network)

    def _ordered(self, method: str) -> nn.Module:
        """Returns the network with each group's channels in the order of their importance."""
        kind = _kind(method)
        if kind not in self._sorted:
            orders = descending_orders(self.network, self.graph, self._units(method))
            self._sorted[kind] = permute(self.network, self.graph, orders)
        return self._sorted[kind]

    def _units(self, method: str) -> dict[str, Tensor]:
        kind = _kind(method)
        if kind not in self._importance:
            self._importance[kind] = (
                self._taylor() if kind == "taylor" else channel_importance(self.network, self.graph, kind)
            )
        return self._importance[kind]

    def _taylor(self) -> dict[str, Tensor]:
        network = to_device(permute(self.network, self.graph, {}), self.context.device, channels_last=True)
        chunks = search_chunks(
            self.data,
            images=self.settings.images,
            chunk=TAYLOR_BATCH,
            seed=self.seed,
            device=self.context.device,
            workers=self.context.workers,
        )

        def loss(network: nn.Module, batch: Batch) -> Tensor:
            inputs, targets = batch
            return self.task.loss(call(network, inputs), targets)

        return taylor_importance(network, self.graph, chunks, loss)


def _kind(method: str) -> Literal["l1", "bn_scale", "taylor"]:
    """Returns the importance by which a method ranks the channels of a group."""
    match method:
        case "bn_scale" | "taylor":
            return method
    return "l1"
