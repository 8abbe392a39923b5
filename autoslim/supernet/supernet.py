"""``Supernet``: a network whose channels are selected at run time, with weights shared by all configurations."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoslim.channels.copying import copy_with, named_tensors
from autoslim.channels.graph import Attribute, ChannelGraph
from autoslim.channels.groups import Axis, Channels
from autoslim.channels.resize import common_spans, current_channels, resize
from autoslim.errors import UserError


class Supernet(nn.Module):
    """A network at its widest; ``select`` makes it run any narrower configuration with slices of the same weights.

    The user's ``forward`` runs unchanged. ``select`` installs views of the weights: an instance attribute with the name
    of a parameter shadows the parameter when a module reads ``self.weight``, while ``parameters()``, ``state_dict()``
    and the optimiser still see the shared parameter. Only tensors with concatenated channels (layers that read several
    groups) need a gather, which is repeated at each ``forward``.

    Batch normalisation always uses the statistics of the current batch (US-Nets, section 3.2), because subnets that
    share weights do not share statistics. Running statistics are removed; networks that ``extract`` returns have them
    again.

    Args:
        network: the network at its widest, as ``resize`` returns it. It is modified in place, not copied.
        graph: ``trace`` of the network, at any width.

    Raises:
        UserError: ``forward`` computes a batch norm with running statistics as a function, or ``network`` is not the
            graph's network.
    """

    def __init__(self, network: nn.Module, graph: ChannelGraph) -> None:
        super().__init__()
        if graph.batch_norms:
            raise UserError(
                f"forward passes running statistics to {graph.batch_norms[0]}, but a supernet has none, and those of "
                "the extracted network could not be recalibrated; call a batch norm module there instead"
            )
        self.network = network
        self.graph = graph
        self.widest: Channels = current_channels(network, graph)
        self.selected: Channels = dict(self.widest)
        # The structure with running statistics, for extract(). It is in a tuple so that it is not a submodule.
        names = {name for name, _ in network.named_parameters()}
        self._plain = (copy_with(network, lambda name, t: t.new_empty(0) if name in names else t.clone()),)
        self.network.apply(_use_batch_statistics)
        self.network.apply(_do_not_flatten)
        self._shadows: dict[str, list[_Shadow]] = {name: [] for name in graph.groups}
        self._gathering: list[_Shadow] = []
        self._modules_by_path: dict[str, nn.Module] = dict(network.named_modules())
        self._attributes: dict[str, list[Attribute]] = {name: [] for name in graph.groups}
        for name in named_tensors(network):
            if name in graph.tensors:
                self._add_shadow(name, graph.tensors[name])
        for attribute in graph.attributes:
            for group in _groups_of(attribute.axis):
                self._attributes[group].append(attribute)

    def _add_shadow(self, name: str, axes: tuple[Axis, ...]) -> None:
        path, _, attribute = name.rpartition(".")
        shadow = _Shadow(self.network.get_submodule(path), attribute, axes)
        for group in _groups_of(*axes):
            self._shadows[group].append(shadow)
        if shadow.gathered:
            self._gathering.append(shadow)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Supernet":
        raise TypeError(
            "a supernet has views of its weights and cannot be copied; use extract() or network.state_dict()"
        )

    @torch.inference_mode(False)  # autograd cannot use views that were created in inference mode
    def select(self, channels: Mapping[str, int]) -> None:
        """Makes ``forward`` run the configuration ``channels``. Only groups that changed are updated.

        Raises:
            UserError: ``channels`` does not fit the graph, or a group is wider than in this supernet.
        """
        changed = [name for name, count in channels.items() if self.selected.get(name) != count]
        if len(channels) != len(self.selected) or any(name not in self.selected for name in changed):
            self.graph.check(channels)
        for name in changed:
            if not 0 < channels[name] <= self.widest[name] or channels[name] % self.graph.groups[name].unit:
                self._raise_too_wide(channels)
        self.selected.update((name, channels[name]) for name in changed)
        shadows = {id(shadow): shadow for name in changed for shadow in self._shadows[name]}
        with torch.enable_grad():
            for shadow in shadows.values():
                shadow.update(self.widest, self.selected)
        for name in changed:
            for attribute in self._attributes[name]:
                self._modules_by_path[attribute.module].__dict__[attribute.name] = attribute.value(self.selected)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for shadow in self._gathering:  # a gather is a copy, and the weights may have changed
            shadow.update(self.widest, self.selected)
        return self.network(*args, **kwargs)

    def extract(self, channels: Mapping[str, int]) -> nn.Module:
        """Returns a plain network with ``channels`` and copies of the weights that ``select(channels)`` would use.

        Its running statistics are reset, so call ``recalibrate`` before evaluation. It shares no memory with the
        supernet.

        Raises:
            UserError: ``channels`` does not fit the graph, or a group is wider than in this supernet.
        """
        if any(channels.get(name, 0) > maximum for name, maximum in self.widest.items()):
            self._raise_too_wide(channels)
        shared = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        shared |= dict(self.network.named_buffers())  # batch norms have none here
        widest = copy_with(self._plain[0], lambda name, tensor: shared.get(name, tensor))
        network = resize(widest, self.graph, channels)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
        return network.train(self.network.training)

    def _raise_too_wide(self, channels: Mapping[str, int]) -> None:
        self.graph.check(channels)
        name = next(name for name, maximum in self.widest.items() if channels[name] > maximum)
        raise UserError(
            f"group {name} has at most {self.widest[name]} channels in this supernet, but {channels[name]} were "
            "requested; use fewer, or train a wider supernet"
        )

    def _apply(self, *args: Any, **kwargs: Any) -> "Supernet":
        selected = dict(self.selected)
        self.select(self.widest)  # views of weights that are about to move would become stale
        super()._apply(*args, **kwargs)
        self._plain[0]._apply(*args, **kwargs)
        self.select(selected)
        return self


class _Shadow:
    """A parameter of one module and the view that shadows it."""

    __slots__ = ("gathered", "module", "name", "narrowed")

    def __init__(self, module: nn.Module, name: str, axes: tuple[Axis, ...]) -> None:
        self.module, self.name = module, name
        self.narrowed: list[tuple[int, str, int, int]] = []  # dimension and its only segment, unpacked for speed
        self.gathered: list[tuple[int, Axis]] = []
        for dimension, axis in enumerate(axes):
            if len(axis) > 1:
                self.gathered.append((dimension, axis))
            elif axis[0].group is not None:
                self.narrowed.append((dimension, axis[0].group, axis[0].count, axis[0].unit))

    def update(self, widest: Mapping[str, int], channels: Mapping[str, int]) -> None:
        shared = self.module._parameters.get(self.name, self.module._buffers.get(self.name))
        assert shared is not None
        view = shared
        for dimension, group, count, unit in self.narrowed:
            size = channels[group]
            if size != widest[group]:
                view = view.narrow(dimension, 0, size // unit * count)
        for dimension, axis in self.gathered:
            spans = common_spans(axis, widest, channels)
            if sum(length for *_, length in spans) != view.shape[dimension]:
                view = torch.cat([view.narrow(dimension, start, length) for start, _, length in spans], dimension)
        if view is shared:
            self.module.__dict__.pop(self.name, None)
        else:
            self.module.__dict__[self.name] = view


def _groups_of(*axes: Axis) -> set[str]:
    return {segment.group for axis in axes for segment in axis if segment.group is not None}


def _use_batch_statistics(module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.track_running_stats = False
        module.running_mean = module.running_var = module.num_batches_tracked = None


def _do_not_flatten(module: nn.Module) -> None:
    """Prevents a recurrent layer from moving its weights into one buffer, which is faster in cuDNN.

    It does so when it finds another weight than before, and would detach the views of ``select`` from the parameters.
    """
    if isinstance(module, nn.RNNBase):
        module.__dict__["flatten_parameters"] = _nothing


def _nothing() -> None:
    pass
