"""Finds forward hooks of the user on modules whose channels a slimmed network changes."""

import warnings
from collections.abc import Iterable, Iterator

from torch import fx, nn

from autoslim.channels.graph import ChannelGraph


def warn_of_hooks(network: nn.Module, graph: ChannelGraph, operations: Iterable[fx.Graph]) -> None:
    """Issues one warning that names the modules with hooks that see other channels in a slimmed network.

    Args:
        network: The traced network.
        graph: Its channel graph.
        operations: The traced operations in each mode.
    """
    paths = set(_slimmed(graph, operations))
    paths |= {path[:end] for path in paths for end in range(len(path)) if path[end] == "."}
    if hooked := [path for path in hooked_modules(network) if path in paths]:
        named = ", ".join(map(repr, hooked[:3])) + (f" and {len(hooked) - 3} more" if len(hooked) > 3 else "")
        warnings.warn(
            f"{type(network).__name__} has forward hooks on {named}: in a slimmed network they see other numbers of "
            "channels; remove them from the network if they depend on that",
            stacklevel=3,
        )


def hooked_modules(network: nn.Module) -> list[str]:
    """Returns the paths of the modules with forward hooks or pre-hooks that torch has not added itself."""
    return [
        path
        for path, module in network.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # torch's weight norm and spectral norm are pre-hooks
        if not str(getattr(hook, "__module__", "")).startswith("torch.")
    ]


def _slimmed(graph: ChannelGraph, operations: Iterable[fx.Graph]) -> Iterator[str]:
    """Yields the paths of modules that have, read or return channels of a group."""
    yield from (name.rpartition(".")[0] for name in graph.tensors)
    for each in operations:
        for node in each.nodes:
            if node.op == "call_module" and any(
                other.name in graph.activations for other in (node, *node.all_input_nodes)
            ):
                yield str(node.target)
