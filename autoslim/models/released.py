"""The 13 channel lists that the AutoSlim authors released, under names such as ``mobilenet_v2-305M``."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ruamel.yaml import YAML

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels
from autoslim.errors import UserError
from autoslim.resources.budgets import format_amount

FAMILIES = {
    "mobilenet_v1": "autoslim.models.architectures:MobileNetV1",
    "mobilenet_v2": "torchvision.models:mobilenet_v2",
    "mnasnet": "autoslim.models.architectures:MNasNet",
    "resnet50": "torchvision.models:resnet50",
}
"""Family -> the network that its lists are for."""

_PREFIX = "released/"
_RESNET50_BLOCKS = (3, 4, 6, 3)


@dataclass(frozen=True)
class Released:
    """A released channel list.

    Attributes:
        name: family and MACs, such as ``mobilenet_v2-305M``.
        family: key of ``FAMILIES``.
        macs_m: millions of MACs at 224x224 and 1000 classes. They include average pooling, as the authors count.
        params_m: millions of parameters.
        numbers: channels in the authors' order, followed by the number of classes.
    """

    name: str
    family: str
    macs_m: float
    params_m: float
    numbers: tuple[int, ...]

    def channels(self, graph: ChannelGraph) -> Channels:
        """Returns the list as a channel configuration of the family's network.

        Raises:
            UserError: the graph belongs to another network.
        """
        group_of = {member: name for name, group in graph.groups.items() for member in group.members}
        channels: Channels = {}
        for layer, number in zip(layers(self.family), self.numbers[:-1], strict=True):
            if layer not in group_of:
                raise UserError(f"{self.name} is a list for {FAMILIES[self.family]}; this network has no layer {layer}")
            group = group_of[layer]
            if channels.setdefault(group, number) != number:
                raise UserError(f"{self.name} gives group {group} both {channels[group]} and {number} channels")
        graph.check(channels)
        return channels


def layers(family: str) -> Sequence[str]:
    """Returns the layers whose output channels a family's lists specify, in this order, without the classifier."""
    if family == "mobilenet_v1":
        return ["features.0.0", *(f"features.{block}.1.0" for block in range(1, 14))]
    if family == "mobilenet_v2":
        blocks = [f"features.{n + 1}.conv.{part}" for n in range(1, 17) for part in ("0.0", "2")]
        return ["features.0.0", "features.1.conv.1", *blocks, "features.18.0"]
    if family == "mnasnet":
        blocks = [f"features.{n + 1}.layers.{part}" for n in range(1, 17) for part in ("0.0", "2.0")]
        return ["features.0.0", "features.1.layers.1.0", *blocks, "features.18.0"]
    names = ["conv1"]
    for stage, count in enumerate(_RESNET50_BLOCKS, start=1):
        names.append(f"layer{stage}.0.downsample.0")
        names += [f"layer{stage}.{block}.conv{part}" for block in range(count) for part in (1, 2, 3)]
    return names


@cache
def released_lists() -> dict[str, Released]:
    """Returns all released lists by name."""
    text = (files("autoslim.models") / "released.yaml").read_text()
    lists = {}
    for family, entries in YAML(typ="safe").load(text).items():
        for entry in entries:
            name = f"{family}-{format_amount(entry['macs_m'] * 1e6)}"
            lists[name] = Released(name, family, entry["macs_m"], entry["params_m"], tuple(entry["channels"]))
    return lists


def released(name: str) -> Released:
    """Returns the released list with this name.

    Raises:
        UserError: there is no list with this name.
    """
    if name not in released_lists():
        raise UserError(f"there is no released list {name!r}; the lists are {', '.join(released_lists())}")
    return released_lists()[name]


def released_method(method: str) -> Released | None:
    """Returns the list that the method ``released/NAME`` refers to, or None for another method.

    Raises:
        UserError: there is no list with this name.
    """
    return released(method.removeprefix(_PREFIX)) if method.startswith(_PREFIX) else None
