"""Records which outputs of a network share storage."""

from typing import Any

from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from autoslim.channels.copying import named_tensors
from autoslim.channels.memory import Operation
from autoslim.tracing.capture import shaped_graph
from autoslim.tracing.interpreter import GraphRunner, for_shapes


def operations_of(
    network: nn.Module, graph: fx.Graph, images: Tensor, whole: frozenset[str], *, at_one_size: bool
) -> tuple[Operation, ...]:
    """The operations of ``graph``, in order, still without their axes.

    They run on one image, in the network's number format: what is a view with one may be a copy with more. Where the
    network's code does not let that through, they run on ``images``, and a first dimension of so many becomes 1.

    Args:
        network: what ``graph`` was traced from, in the same mode.
        graph: its operations.
        images: what it was traced with, (N, C, H, W).
        whole: the modules that tracing did not look into.
        at_one_size: whether the graph runs on no other input than ``images``.
    """
    number_format = next((p.dtype for p in network.parameters() if p.is_floating_point()), images.dtype)
    image = images[:1].to(number_format)
    try:
        single = shaped_graph(network, whole, image)[0] if at_one_size else graph
        if _names(single) == _names(graph):
            return _run(network, single, image)
    except Exception:  # whatever the user's code raises on one image
        pass
    return _run(network, graph, images)


def part_name(operation: str, index: int) -> str:
    """The name of a tensor in an operation's output that is not one tensor; ``index`` counts through all it holds."""
    return f"{operation}[{index}]"


def _names(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def _run(network: nn.Module, graph: fx.Graph, images: Tensor) -> tuple[Operation, ...]:
    watch = _Watch(network, graph, images)
    with for_shapes(images.device):
        watch.run(images)
    return tuple(watch.operations)


class _Watch(GraphRunner):
    """Writes down each operation's output as it runs."""

    def __init__(self, network: nn.Module, graph: fx.Graph, images: Tensor) -> None:
        super().__init__(network, graph, images.device)
        self.batch = len(images)
        self.operations: list[Operation] = []
        # A weak reference lets the memory go, and keeps its address from being given to another.
        self.owners = {StorageWeakRef(tensor.untyped_storage()): "" for tensor in named_tensors(network).values()}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, Tensor):
            self.owners[StorageWeakRef(value.untyped_storage())] = ""
        return value

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        reads = tuple(read.name for read in n.all_input_nodes)
        if isinstance(value, Tensor):
            self.operations.append(self._output(n.name, reads, value))
        else:
            parts = tuple(
                self._output(part_name(n.name, index), (), leaf)
                for index, leaf in enumerate(tree_leaves(value))
                if isinstance(leaf, Tensor)
            )
            self.operations.append(Operation(n.name, reads, None, None, "", 0, parts))
        return value

    def _output(self, name: str, reads: tuple[str, ...], value: Tensor) -> Operation:
        storage = self.owners.setdefault(StorageWeakRef(value.untyped_storage()), name)
        shape = tuple(value.shape)
        if shape and shape[0] == self.batch:
            shape = (1, *shape[1:])
        return Operation(name, reads, shape, None, storage, value.element_size())
