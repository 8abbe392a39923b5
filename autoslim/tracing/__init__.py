"""Traces a network and returns its channel graph."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from autoslim.channels.copying import float_dtype, named_tensors, on_meta, zeroed
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.inputs import Arguments, Inputs
from autoslim.channels.wrappers import check_plain
from autoslim.errors import UserError, first_sentence
from autoslim.tracing.capture import Choices, assigned_buffers, seeded, shaped_graph, symbolic_graph
from autoslim.tracing.comparison import ComparisonWithRun
from autoslim.tracing.hooks import hooked_modules, warn_of_hooks
from autoslim.tracing.interpreter import for_shapes
from autoslim.tracing.parts import graph_within, leaves_inside, part_inputs
from autoslim.tracing.propagate import Propagation
from autoslim.tracing.record import Record
from autoslim.tracing.storage import operations_of
from autoslim.tracing.verify import BATCH, VerificationRuns, verified_graph
from autoslim.tracing.weight_rules import functional_batch_norms


def trace(network: nn.Module, example: Any, *, leaves: Iterable[str] = (), part: str = "") -> ChannelGraph:
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
        example: The input of the network: a tensor, (1, C, H, W) for images; a tuple of tensors if ``forward`` has
            several inputs, or a mapping from their names to tensors. The first dimension of each tensor is the batch;
            any number may follow. Only shapes are used, and the range of integers, such as token ids.
        leaves: Paths of modules that torch.fx treats as leaf modules, that is, as one operation each. Channels that
            they read keep their number. Leaf modules may depend on data: if there are any, a copy of the network with
            all values zero runs on the CPU instead of the meta device.
        part: The path of the module to trace, if only a part of the network is to be slimmed, such as the backbone of a
            detector. A copy of the whole network then runs on ``example``, as it is, to get the inputs of the part. The
            result has the names of the whole network, so that ``resize`` and ``Supernet`` change the part in place.
            Costs are those of the part, for one item of its batch. The part's outputs keep their channels.

    Raises:
        UserError: If torch.fx cannot trace the network, if the trace differs from a run, if random numbers decide what
            ``forward`` does, if the network does not run on the example, if a name in ``leaves`` is not a module, if
            the part cannot be slimmed alone (see ``part_inputs`` and ``graph_within``), or if the network is scripted,
            compiled or wrapped for several devices.

    Warns:
        UserWarning: A module has forward hooks, and its channels can be slimmed.
    """
    leaf_modules = frozenset(leaves)
    check_plain(network)
    arguments = Arguments.of(example)
    if part:
        received = part_inputs(network, part, arguments)
        inner = trace(network.get_submodule(part), received, leaves=leaves_inside(part, leaf_modules))
        return graph_within(network, part, inner, arguments)
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
    inputs = Inputs.of(network, arguments)
    images = inputs.zeros(BATCH, device).to(float_dtype(prototype))
    with assigned_buffers(prototype) as assigned:
        modes, training = _traced_modes(prototype, leaf_modules, images)
    for graph in (modes[False][0], training):
        record.batch_norms |= dict.fromkeys(functional_batch_norms(graph, dict(prototype.named_modules())))
    inference_calls = 0
    for mode, (graph, choices) in modes.items():
        prototype.train(mode)
        try:
            with for_shapes(device, recorded=True):
                propagation = Propagation(prototype, graph, record, images, at_one_size=choices is not None)
                propagation.run(*images.tensors)
                propagation.mark_choices_not_prunable(choices or {})
        except UserError:
            raise
        except NotImplementedError as error:  # torch's reason if it cannot compute the shapes of an operation
            raise UserError(
                f"{type(network).__name__} does not run without real data, at {propagation.place()}: "
                f"{first_sentence(error)}; name the module that contains this operation in model.leaves, so that it "
                "keeps its size"
            ) from error
        except Exception as error:
            shapes = f"an input of shape {(1, *inputs.tensors[0].shape)}" if inputs.is_single else f"inputs of {inputs}"
            hooked = hooked_modules(network)
            raise UserError(
                f"{type(network).__name__} does not run on {shapes}: {first_sentence(error)}; "
                "give the input size and channels that it expects"
                + (f", and examples of its other inputs ({', '.join(others)})" if (others := inputs.omitted) else "")
                + (f", or remove the forward hooks of {hooked[0]!r}, which get no data here" if hooked else "")
            ) from error
        if not mode:
            inference_calls = len(record.calls)
            record.operations = operations_of(prototype, graph, images, leaf_modules, at_one_size=choices is not None)
            record.outputs = propagation.outputs()
    for name in assigned:
        reason = f"forward assigns another tensor to the buffer {name}; change it in place instead"
        for vector in record.tensors.get(record.first_name.get(name, name), {}).values():
            record.labels.freeze(vector, reason)
    del record.calls[inference_calls:]  # costs refer to inference
    verified = verified_graph(prototype, record, inputs, VerificationRuns(device, tuple(modes), leaf_modules))
    warn_of_hooks(network, verified, [graph for graph, _ in modes.values()])
    return verified


def _traced_modes(
    prototype: nn.Module, leaf_modules: frozenset[str], images: Arguments
) -> tuple[dict[bool, tuple[fx.Graph, Choices | None]], fx.Graph]:
    """Returns the graph in evaluation mode (False) and, if it differs, in training mode (True); and the latter alone.

    The first result is without the graph in training mode if the code draws random numbers, because it may skip layers
    at random. Each graph in it comes with the sizes that the code branches on, or with None if it is valid for all.
    """
    inference = _traced(prototype.eval(), leaf_modules, images)
    with seeded() as drawn:
        training = _traced(prototype.train(), leaf_modules, images)
        skips = bool(drawn())
    modes = {False: inference} | ({True: training} if str(training[0]) != str(inference[0]) and not skips else {})
    return modes, training[0]


def _traced(prototype: nn.Module, leaf_modules: frozenset[str], images: Arguments) -> tuple[fx.Graph, Choices | None]:
    """Returns the graph in the current mode and the sizes that the code branches on (see ``_traced_modes``)."""
    comparison = None if prototype.training else ComparisonWithRun(prototype, leaf_modules, images)
    try:
        graph, choices = symbolic_graph(prototype, leaf_modules, images), None
        if comparison:
            comparison.check(graph)
    except UserError:  # its code may depend on shapes but not on data
        graph, choices = shaped_graph(prototype, leaf_modules, images)
        if comparison:
            comparison.check(graph)
    return graph, choices
