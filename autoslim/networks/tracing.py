"""``trace``: from a network and an example input to its channel graph."""

import copy
import traceback
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from autoslim.networks.graph import ChannelGraph
from autoslim.networks.grouping import build_graph
from autoslim.networks.propagation import LEAVES, Propagation, Trace
from autoslim.networks.resizing import resize
from autoslim.vocabulary.errors import UserError

_BATCH = 2  # batch norm in training mode needs more than one value per channel


def trace(network: nn.Module, example: Tensor, *, leaves: Iterable[str] = ()) -> ChannelGraph:
    """Finds the channel groups of ``network`` and its costs in closed form.

    The network is traced by torch.fx in evaluation and in training mode (auxiliary heads run in one of them only), on
    meta tensors; it is neither run nor changed. What has no slimming rule keeps its size and is named in
    ``ChannelGraph.fixed``. The result is tried: the network is resized on the meta device and run, and groups that it
    does not survive (sizes written as numbers in ``forward``) become fixed too.

    Args:
        network: any network of torch modules, on any device.
        example: an input of the network, (1, C, H, W); only its shape counts.
        leaves: paths of modules that tracing shall not look into; channels that pass through them stay.

    Raises:
        UserError: torch.fx cannot trace the network, or it does not run on the example.
    """
    prototype = on_meta(network)
    was_training = network.training
    shape = (_BATCH, *example.shape[1:])
    found = Trace()
    eval_calls = 0
    for training in (False, True):
        prototype.train(training)
        graph = _symbolic(prototype, frozenset(leaves))
        try:
            Propagation(fx.GraphModule(prototype, graph), found, _BATCH).run(torch.empty(shape, device="meta"))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{type(network).__name__} does not run on an input of shape {tuple(example.shape)}: {_first_line(error)}; "
                "give the input size and channels that it expects"
            ) from error
        if not training:
            eval_calls = len(found.calls)
    prototype.train(was_training)
    found.calls = found.calls[:eval_calls]  # costs are those of inference
    return _tried(prototype, found, tuple(example.shape[1:]))


def _tried(prototype: nn.Module, found: Trace, input_shape: tuple[int, ...]) -> ChannelGraph:
    """The graph, less the groups that the network's code does not let change."""
    graph = build_graph(prototype, found, input_shape)
    suspects = list(graph.groups)
    while suspects:
        failure = _failure(prototype, graph, suspects)
        if failure is None:
            return graph
        culprit, reason = _culprit(prototype, graph, suspects, failure)
        for member in graph.groups[culprit].members:
            found.labels.fix(found.labels.sources[member], f"its size is written in the network's code: {reason}")
        graph = build_graph(prototype, found, input_shape)
        suspects = list(graph.groups)
    return graph


def _culprit(prototype: nn.Module, graph: ChannelGraph, suspects: list[str], failure: str) -> tuple[str, str]:
    """One group that cannot change even with others at their size, by bisection."""
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        first = _failure(prototype, graph, half)
        if first is not None:
            suspects, failure = half, first
            continue
        rest = suspects[len(half) :]
        second = _failure(prototype, graph, rest)
        if second is None:
            return suspects[0], failure  # they only fail together
        suspects, failure = rest, second
    return suspects[0], failure


def _failure(prototype: nn.Module, graph: ChannelGraph, names: list[str]) -> str | None:
    """What goes wrong when these groups are slimmed and the network is run, or None."""
    channels = graph.default
    for name in names:
        group = graph.groups[name]
        channels[name] = max(group.unit, group.size // 2 // group.unit * group.unit)
    slim = resize(prototype, graph, channels)
    example = torch.empty((_BATCH, *graph.input_shape), device="meta")
    for training in (False, True):
        slim.train(training)
        prototype.train(training)
        try:
            with torch.no_grad():
                if _shapes(slim(example)) != _shapes(prototype(example)):
                    return "the output changes its shape"
        except Exception as error:  # whatever the user's code raises at another size
            return _first_line(error)
    return None


def _shapes(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.shape
    if isinstance(output, dict):
        return {key: _shapes(value) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return [_shapes(value) for value in output]
    return output


class _Tracer(fx.Tracer):
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


def _symbolic(network: nn.Module, leaves: frozenset[str]) -> fx.Graph:
    tracer = _Tracer(leaves)
    try:
        return tracer.trace(network)
    except Exception as error:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename.replace("\\", "/")
        ]
        place = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if len(frames) > 1 else ""
        module = tracer.inside or type(network).__name__
        raise UserError(
            f"torch.fx cannot trace module {module!r} of {type(network).__name__}{place}: {_first_line(error)}; "
            f"take the choice that depends on data out of its forward, or name the module in model.leaves to keep its size"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def on_meta(network: nn.Module) -> nn.Module:
    """A copy of the network's structure on the meta device, without copying its weights."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(network, memo).to("meta")
