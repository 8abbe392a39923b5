"""Records which outputs of a network share storage."""

from typing import Any

from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from autoslim.channels.copying import float_dtype, named_tensors
from autoslim.channels.inputs import Arguments
from autoslim.channels.memory import Operation
from autoslim.channels.outputs import output_leaves
from autoslim.tracing.capture import shaped_graph
from autoslim.tracing.interpreter import GraphRunner, for_shapes


def operations_of(
    network: nn.Module, graph: fx.Graph, images: Arguments, leaf_modules: frozenset[str], *, at_one_size: bool
) -> tuple[Operation, ...]:
    """Returns the operations of ``graph`` in order, without their axes.

    They run on one image, in the network's dtype, because an operation that returns a view for one image may return a
    copy for several. If the network's code does not run on one image, they run on ``images``, and a first dimension of
    that size is reported as 1.

    Args:
        network: The network that ``graph`` was traced from, in the same mode.
        graph: The traced graph.
        images: The batch that it was traced with.
        leaf_modules: Paths of modules that were traced as one operation.
        at_one_size: Whether the graph runs only on inputs of the size of ``images``.
    """
    dtype = float_dtype(network)
    image = images.map(lambda tensor: tensor[:1]).to(dtype)
    try:
        single = shaped_graph(network, leaf_modules, image)[0] if at_one_size else graph
        if _names(single) == _names(graph):
            return _run(network, single, image)
    except Exception:  # the user's code may raise anything on one image
        pass
    return _run(network, graph, images)


def part_name(operation: str, index: int) -> str:
    """Returns the name of output tensor ``index`` of an operation that returns several tensors."""
    return f"{operation}[{index}]"


def _names(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def _run(network: nn.Module, graph: fx.Graph, images: Arguments) -> tuple[Operation, ...]:
    recorder = _StorageRecorder(network, graph, images)
    with for_shapes(images.device):
        recorder.run(*images.tensors)
    return tuple(recorder.operations)


class _StorageRecorder(GraphRunner):
    """Records the shape and the storage of each operation's output."""

    def __init__(self, network: nn.Module, graph: fx.Graph, images: Arguments) -> None:
        super().__init__(network, graph, images.device)
        self.batch = len(images)
        self.operations: list[Operation] = []
        # A weak reference allows the storage to be freed, and prevents its address from being reused.
        self.owners = {StorageWeakRef(tensor.untyped_storage()): "" for tensor in named_tensors(network).values()}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, Tensor):
            self.owners[StorageWeakRef(value.untyped_storage())] = ""
        return value

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        reads = tuple(node.name for node in n.all_input_nodes)
        if isinstance(value, Tensor):
            self.operations.append(self._output(n.name, reads, value))
        else:
            parts = tuple(
                self._output(part_name(n.name, index), (), leaf)
                for index, leaf in enumerate(output_leaves(value))
                if isinstance(leaf, Tensor)
            )
            self.operations.append(Operation(n.name, reads, None, (), "", 0, parts))
        return value

    def _output(self, name: str, reads: tuple[str, ...], value: Tensor) -> Operation:
        storage = self.owners.setdefault(StorageWeakRef(value.untyped_storage()), name)
        shape = tuple(value.shape)
        if shape and shape[0] == self.batch:
            shape = (1, *shape[1:])
        return Operation(name, reads, shape, (), storage, value.element_size())
