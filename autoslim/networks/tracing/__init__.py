"""From a network and an example input to its channel graph."""

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from autoslim.networks.copying import copy_with, named_tensors, on_meta
from autoslim.networks.graph import ChannelGraph
from autoslim.networks.tracing.propagation import Propagation
from autoslim.networks.tracing.record import Record
from autoslim.networks.tracing.symbolic import symbolic_graph
from autoslim.networks.tracing.trial import BATCH, Runs, tried_graph
from autoslim.vocabulary.errors import UserError, first_line


def trace(network: nn.Module, example: Tensor, *, leaves: Iterable[str] = ()) -> ChannelGraph:
    """Finds the channel groups of ``network`` and its costs in closed form.

    The network is traced by torch.fx in evaluation and in training mode (auxiliary heads run in one of them only), on
    meta tensors; it is neither run nor changed itself. What has no slimming rule keeps its size and is named in
    ``ChannelGraph.fixed``. The result is tried: the network is resized on the meta device and run, and groups that it
    does not survive (sizes written as numbers in ``forward``) become fixed too.

    Args:
        network: any network of torch modules, on any device.
        example: an input of the network, (1, C, H, W); only its shape counts.
        leaves: paths of modules that tracing shall not look into; channels that pass through them stay. Leaves may
            depend on data: with any, a copy of the network runs on the CPU instead of the meta device, all zeros.

    Raises:
        UserError: torch.fx cannot trace the network, it does not run on the example, or a leaf is no module of it.
    """
    whole = frozenset(leaves)
    prototype = _zeros(network) if whole else on_meta(network)
    device = torch.device("cpu" if whole else "meta")
    if unknown := whole - dict(network.named_modules()).keys():
        raise UserError(
            f"model.leaves names {min(unknown)!r}, which is no module of {type(network).__name__}; "
            "give paths as in named_modules()"
        )
    first: dict[int, str] = {}
    record = Record({name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(prototype).items()})
    input_shape = tuple(example.shape[1:])
    inference = symbolic_graph(prototype.eval(), whole)
    training = symbolic_graph(prototype.train(), whole)
    modes = {False: inference} | ({True: training} if str(training) != str(inference) else {})
    inference_calls = 0
    for mode, graph in modes.items():
        prototype.train(mode)
        try:
            with device:
                Propagation(fx.GraphModule(prototype, graph), record, BATCH).run(torch.zeros((BATCH, *input_shape)))
        except Exception as error:
            raise UserError(
                f"{type(network).__name__} does not run on an input of shape {tuple(example.shape)}: "
                f"{first_line(error)}; give the input size and channels that it expects"
            ) from error
        if not mode:
            inference_calls = len(record.calls)
    del record.calls[inference_calls:]  # costs are those of inference
    return tried_graph(prototype, record, input_shape, Runs(device, tuple(modes)))


def _zeros(network: nn.Module) -> nn.Module:
    """A copy of the network on the CPU with zeros for numbers."""
    return copy_with(network, lambda _, tensor: torch.zeros_like(tensor, device="cpu"))
