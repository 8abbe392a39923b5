"""How much of a network slimming reaches, and which of its layers it does not."""

from collections.abc import Mapping

from autoslim.networks.graph import ChannelGraph, Layer
from autoslim.networks.tracing.record import IS_OUTPUT


def is_slimmable(layer: Layer) -> bool:
    """Whether its input or output channels depend on some group."""
    return any(segment.group for segment in (*layer.inputs, *layer.outputs))


def slimmable_share(graph: ChannelGraph, channels: Mapping[str, int]) -> float:
    """The part of the network's MACs at ``channels``, in [0, 1], in layers that can be slimmed; no average pooling.

    A layer between two that must keep their size does not count; one of whose two sides can be slimmed counts whole.
    """
    layers = [layer for layer in graph.layers if layer.kind != "avgpool" and is_slimmable(layer)]
    return sum(layer.macs(channels) for layer in layers) / max(1, graph.macs(channels))


def layers_that_stay(graph: ChannelGraph) -> dict[str, str]:
    """Every convolution, linear layer or layer without a rule of which some output channel must stay, and why.

    Those that make the network's output (its classes) are left out, for they could not be otherwise. A network without
    any has all its layers slimmable.
    """
    stay = {name: reason for name, reason in graph.fixed.items() if reason != IS_OUTPUT}
    functional = [layer.name for layer in graph.layers if layer.kind == "other" and layer.name not in graph.fixed]
    return stay | dict.fromkeys(functional, "it has no slimming rule")
