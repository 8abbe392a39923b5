"""From a network and an example input to its channel graph."""

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from autoslim.channels.copying import named_tensors, on_meta, zeroed
from autoslim.channels.graph import ChannelGraph
from autoslim.errors import UserError, first_line
from autoslim.tracing.capture import Choices, shaped_graph, symbolic_graph
from autoslim.tracing.interpreter import for_shapes
from autoslim.tracing.propagate import Propagation
from autoslim.tracing.record import Record
from autoslim.tracing.storage import operations_of
from autoslim.tracing.verify import BATCH, VerificationRuns, verified_graph


def trace(network: nn.Module, example: Tensor, *, leaves: Iterable[str] = ()) -> ChannelGraph:
    """Finds the channel groups of ``network`` and its costs in closed form.

    The network is traced by torch.fx in evaluation and in training mode (auxiliary heads run in one of them only), on
    meta tensors; it is neither run nor changed itself. Its code may choose by shapes; channels that it chooses by keep
    their number. What has no slimming rule keeps its size and is named in ``ChannelGraph.not_prunable``. The
    result is verified: the network is resized on the meta device and run, and groups for which that fails (sizes
    written as numbers in ``forward``) keep their size too.

    Args:
        network: any network of torch modules, on any device.
        example: an input of the network, (1, C, H, W); only its shape counts.
        leaves: paths of modules that tracing shall not look into; channels that pass through them stay. Leaves may
            depend on data: with any, a copy of the network runs on the CPU instead of the meta device, all zeros.

    Raises:
        UserError: torch.fx cannot trace the network, it does not run on the example, or a leaf is no module of it.
    """
    whole = frozenset(leaves)
    prototype = zeroed(network) if whole else on_meta(network)
    device = torch.device("cpu" if whole else "meta")
    if unknown := whole - dict(network.named_modules()).keys():
        raise UserError(
            f"model.leaves names {min(unknown)!r}, which is no module of {type(network).__name__}; "
            "give paths as in named_modules()"
        )
    first: dict[int, str] = {}
    record = Record({name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(prototype).items()})
    input_shape = tuple(example.shape[1:])
    images = torch.zeros((BATCH, *input_shape), device=device)
    modes = _traced_modes(prototype, whole, images)
    inference_calls = 0
    for mode, (graph, choices) in modes.items():
        prototype.train(mode)
        try:
            with for_shapes(device):
                propagation = Propagation(prototype, graph, record, images)
                propagation.run(images)
                propagation.mark_choices_not_prunable(choices or {})
        except Exception as error:
            raise UserError(
                f"{type(network).__name__} does not run on an input of shape {tuple(example.shape)}: "
                f"{first_line(error)}; give the input size and channels that it expects"
            ) from error
        if not mode:
            inference_calls = len(record.calls)
            record.operations = operations_of(prototype, graph, images, whole, at_one_size=choices is not None)
            record.outputs = propagation.outputs()
    del record.calls[inference_calls:]  # costs are those of inference
    at_one_size = any(choices is not None for _, choices in modes.values())
    return verified_graph(
        prototype, record, input_shape, VerificationRuns(device, tuple(modes), whole, counted=at_one_size)
    )


def _traced_modes(
    prototype: nn.Module, whole: frozenset[str], images: Tensor
) -> dict[bool, tuple[fx.Graph, Choices | None]]:
    """What the network does in evaluation (False) and, where it differs, in training; None: whatever the sizes."""
    found: list[tuple[fx.Graph, Choices | None]] = []
    for mode in (False, True):
        try:
            found.append((symbolic_graph(prototype.train(mode), whole), None))
        except UserError:  # perhaps it only needs to know shapes
            found.append(shaped_graph(prototype.train(mode), whole, images))
    inference, training = found
    return {False: inference} | ({True: training} if str(training[0]) != str(inference[0]) else {})
