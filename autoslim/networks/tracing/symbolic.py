"""torch.fx on a user's network, and what it says when it cannot."""

from typing import Any

from torch import fx, nn

from autoslim.networks.tracing.operations import LEAVES
from autoslim.networks.tracing.source import place_in
from autoslim.vocabulary.errors import UserError, first_line


def symbolic_graph(network: nn.Module, leaves: frozenset[str]) -> fx.Graph:
    """The operations of ``network``, in the mode (training or evaluation) that it is in.

    Raises:
        UserError: its ``forward`` depends on data. The message names the module and the line.
    """
    return traced_by(ModuleTracer(leaves), network)


def traced_by(tracer: "ModuleTracer", network: nn.Module) -> fx.Graph:
    """What a tracer finds, and its errors in the user's terms."""
    try:
        return tracer.trace(network)
    except Exception as error:  # whatever the user's code raises when it is given proxies
        where = place_in(error)
        raise UserError(
            f"torch.fx cannot trace module {tracer.inside or type(network).__name__!r} of {type(network).__name__}"
            f"{f' ({where})' if where else ''}: {first_line(error)}; take the choice that depends on data out of its "
            "forward, or name the module in model.leaves to keep its size"
        ) from error


class ModuleTracer(fx.Tracer):
    """Stops at layers and leaves, and knows which module it is inside."""

    def __init__(self, leaves: frozenset[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.inside = ""
        self.record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves or isinstance(m, LEAVES):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        outer, self.inside = self.inside, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.inside = outer  # not restored after an error: it then names the module at fault
        return result
