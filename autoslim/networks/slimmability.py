"""How much of a network slimming reaches, and which of its layers it does not."""

from autoslim.networks.graph import ChannelGraph
from autoslim.networks.tracing.record import IS_OUTPUT


def slimmable_share(graph: ChannelGraph) -> float:
    """The part of the network's MACs, in [0, 1], in layers whose input or output channels depend on some group.

    At the channels that the network was traced with, average pooling not counted. A layer between two that must keep
    their size does not count; one of whose two sides can be slimmed counts whole.
    """
    slimmable = sum(
        layer.macs(graph.default)
        for layer in graph.layers
        if layer.kind != "avgpool" and any(segment.group for segment in (*layer.inputs, *layer.outputs))
    )
    return slimmable / max(1, graph.macs())


def layers_that_stay(graph: ChannelGraph) -> dict[str, str]:
    """Every convolution, linear layer or layer without a rule of which some output channel must stay, and why.

    Those that make the network's output (its classes) are left out, for they could not be otherwise. A network without
    any has all its layers slimmable.
    """
    stay = {name: reason for name, reason in graph.fixed.items() if reason != IS_OUTPUT}
    functional = [layer.name for layer in graph.layers if layer.kind == "other" and layer.name not in graph.fixed]
    return stay | dict.fromkeys(functional, "it has no slimming rule")
