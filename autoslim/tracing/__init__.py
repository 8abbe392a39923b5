"""Traces a network and returns its channel graph."""

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from autoslim.channels.copying import named_tensors, on_meta, zeroed
from autoslim.channels.graph import ChannelGraph
from autoslim.errors import UserError, first_line
from autoslim.tracing.capture import Choices, seeded, shaped_graph, symbolic_graph
from autoslim.tracing.comparison import ComparisonWithRun
from autoslim.tracing.interpreter import for_shapes
from autoslim.tracing.propagate import Propagation
from autoslim.tracing.record import Record
from autoslim.tracing.storage import operations_of
from autoslim.tracing.verify import BATCH, VerificationRuns, verified_graph


def trace(network: nn.Module, example: Tensor, *, leaves: Iterable[str] = ()) -> ChannelGraph:
    """Returns the channel groups of ``network`` and its costs in closed form.

    torch.fx traces a copy of the network on meta tensors, in evaluation and in training mode because auxiliary heads
    run in only one of them. The network itself is neither run nor changed. Its code may branch on shapes; channels
    whose number it branches on are not prunable. Operations without a slimming rule keep their size and are listed in
    ``ChannelGraph.not_prunable``.

    The trace is compared with a run of the copy in evaluation mode: both must execute the same operations on the same
    arguments and return outputs of the same structure. The result is verified: a copy of the network is resized and run
    on the meta device. Groups for which this fails, or for which the run does not cost what the graph says, are not
    prunable either; their size is written as a number in ``forward``, for example.

    Args:
        network: Any network of torch modules, on any device.
        example: An input of the network, (1, C, H, W). Only its shape is used.
        leaves: Paths of modules that torch.fx treats as leaf modules, that is, as one operation each. Channels that
            they read keep their number. Leaf modules may depend on data: if there are any, a copy of the network with
            all values zero runs on the CPU instead of the meta device.

    Raises:
        UserError: If torch.fx cannot trace the network, if the trace differs from a run, if random numbers decide what
            ``forward`` does, if the network does not run on the example, or if a name in ``leaves`` is not a module.
    """
    leaf_modules = frozenset(leaves)
    prototype = zeroed(network) if leaf_modules else on_meta(network)
    device = torch.device("cpu" if leaf_modules else "meta")
    if unknown := leaf_modules - dict(network.named_modules()).keys():
        raise UserError(
            f"model.leaves names {min(unknown)!r}, which is not a module of {type(network).__name__}; "
            "use the paths that named_modules() returns"
        )
    first_names: dict[int, str] = {}
    record = Record(
        {name: first_names.setdefault(id(tensor), name) for name, tensor in named_tensors(prototype).items()}
    )
    input_shape = tuple(example.shape[1:])
    images = torch.zeros((BATCH, *input_shape), device=device)
    modes = _traced_modes(prototype, leaf_modules, images)
    inference_calls = 0
    for mode, (graph, choices) in modes.items():
        prototype.train(mode)
        try:
            with for_shapes(device):
                propagation = Propagation(prototype, graph, record, images)
                propagation.run(images)
                propagation.mark_choices_not_prunable(choices or {})
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{type(network).__name__} does not run on an input of shape {tuple(example.shape)}: "
                f"{first_line(error)}; give the input size and channels that it expects"
            ) from error
        if not mode:
            inference_calls = len(record.calls)
            record.operations = operations_of(prototype, graph, images, leaf_modules, at_one_size=choices is not None)
            record.outputs = propagation.outputs()
    del record.calls[inference_calls:]  # costs refer to inference
    return verified_graph(prototype, record, input_shape, VerificationRuns(device, tuple(modes), leaf_modules))


def _traced_modes(
    prototype: nn.Module, leaf_modules: frozenset[str], images: Tensor
) -> dict[bool, tuple[fx.Graph, Choices | None]]:
    """Returns the graph in evaluation mode (False) and, if it differs, in training mode (True).

    The graph in training mode is left out if the code draws random numbers, because it may skip layers at random. Each
    graph comes with the sizes that the code branches on, or with None if the graph is valid for all sizes.
    """
    inference = _traced(prototype.eval(), leaf_modules, images)
    with seeded() as drawn:
        training = _traced(prototype.train(), leaf_modules, images)
        skips = bool(drawn())
    return {False: inference} | ({True: training} if str(training[0]) != str(inference[0]) and not skips else {})


def _traced(prototype: nn.Module, leaf_modules: frozenset[str], images: Tensor) -> tuple[fx.Graph, Choices | None]:
    """Returns the graph in the current mode and the sizes that the code branches on (see ``_traced_modes``)."""
    comparison = None if prototype.training else ComparisonWithRun(prototype, leaf_modules, images)
    try:
        graph, choices = symbolic_graph(prototype, leaf_modules), None
        if comparison:
            comparison.check(graph)
    except UserError:  # its code may depend on shapes but not on data
        graph, choices = shaped_graph(prototype, leaf_modules, images)
        if comparison:
            comparison.check(graph)
    return graph, choices
