"""What an operation does to its inputs' channels: whether it mixes them, writes over them, or hands them on."""

from collections.abc import Mapping

from torch import fx, nn

from autoslim.networks.axes import Axis
from autoslim.networks.graph import ChannelGraph
from autoslim.networks.tracing import operations
from autoslim.networks.tracing.carrying import leaves, operation

_MIXING_MODULES = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, *operations.NOT_ELEMENTWISE)
_MIXING = frozenset({"softmax", "log_softmax", "normalize"})
_LOCAL = (operations.ELEMENTWISE - _MIXING) | operations.SPATIAL | operations.MOVEMENT | operations.REDUCTIONS
_LOCAL_MODULES = (
    *operations.NORMALISATIONS,  # batch normalisation and its like, one channel at a time
    nn.PReLU,
    *operations.SPATIAL_MODULES,
    *operations.MOVEMENT_MODULES,
)
# Of the operations that compute something, these may hand back their input, or a view of it.
_PASSING = operations.MOVEMENT | operations.PASSING
_KNOWN = operations.ELEMENTWISE | operations.SPATIAL | operations.REDUCTIONS | operations.FUNCTIONAL_NORMS | _PASSING
_FRESH = (operations.ELEMENTWISE | operations.SPATIAL | operations.REDUCTIONS | operations.FUNCTIONAL_NORMS) - _PASSING


def is_local(node: fx.Node, group: str, graph: ChannelGraph, modules: Mapping[str, nn.Module]) -> bool:
    """Whether each channel of ``group`` in the operation's output depends on that channel of its inputs alone.

    Then with fewer channels the output is a slice of what it is with all. Where this is not known, it is not so.
    """
    dimension, axis = graph.activations.get(node.name, (0, ()))
    if not _holds(axis, group):
        return False
    if node.op == "get_attr":
        return True
    if node.op != "call_module":
        slides = operation(node) in operations.SPATIAL and dimension > 1
        return operation(node) in _LOCAL and not slides
    module = modules[str(node.target)]
    sliding = (*operations.CONVOLUTIONS, *operations.SPATIAL_MODULES, *operations.NORMALISATIONS)
    if isinstance(module, sliding) and dimension > 1:
        return False  # what it does along pixels, it does along the channels
    if isinstance(module, (*operations.CONVOLUTIONS, nn.Linear)):
        axes = graph.tensors.get(f"{node.target}.weight", ((), ()))
        return not _holds(axes[1], group)
    return isinstance(module, _LOCAL_MODULES) or (_is_elementwise(module) and not isinstance(module, _MIXING_MODULES))


def overwritten(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """The inputs that the operation may write its result over."""
    first = node.all_input_nodes[:1]
    if node.op == "call_module":
        module = modules[str(node.target)]
        if not _is_known(module):
            return node.all_input_nodes
        return first if getattr(module, "inplace", False) else []
    if node.op not in ("call_function", "call_method"):
        return []
    name = operation(node)
    if "out" in node.kwargs or (node.op == "call_function" and name not in _KNOWN):
        return node.all_input_nodes
    in_place = name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv")
    return first if in_place or any(given is True for given in leaves((node.args, node.kwargs))) else []


def may_view(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the operation's output may share memory with an input."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        passing = isinstance(module, (*operations.MOVEMENT_MODULES, nn.Identity, nn.modules.dropout._DropoutNd))
        return passing or not _is_known(module)
    return node.op in ("call_function", "call_method") and operation(node) not in _FRESH


def _is_known(module: nn.Module) -> bool:
    known = (*operations.LEAVES, *operations.SPATIAL_MODULES, *operations.MOVEMENT_MODULES)
    return isinstance(module, known) or _is_elementwise(module)


def _is_elementwise(module: nn.Module) -> bool:
    return type(module).__module__ in operations.ELEMENTWISE_HOMES


def _holds(axis: Axis, group: str) -> bool:
    return any(segment.group == group for segment in axis)
