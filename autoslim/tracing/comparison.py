"""Compares a traced graph with a run of the network."""

import contextlib
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from autoslim.channels.inputs import Arguments
from autoslim.channels.outputs import nested
from autoslim.errors import UserError
from autoslim.tracing.capture import user_line
from autoslim.tracing.execution import Execution
from autoslim.tracing.interpreter import GraphRunner, for_shapes


class ComparisonWithRun:
    """Runs a network, and compares its traced graphs with the run.

    Args:
        network: The network, in the mode to compare.
        leaf_modules: Paths of modules that were traced as one operation. What they do inside is not compared, because
            it may depend on data.
        images: The batch to run it on, usually on the meta device.
    """

    def __init__(self, network: nn.Module, leaf_modules: frozenset[str], images: Arguments) -> None:
        self.network, self.leaf_modules, self.images = network, leaf_modules, images
        self.execution: Execution | None = None
        with contextlib.suppress(Exception):  # of the user's code; tracing it raises the error that is reported
            self.execution, self.output = self._executed(self._run)

    def check(self, graph: fx.Graph) -> None:
        """Compares the operations that a graph executes, in order and with all arguments, with those of the run.

        Equal operations on equal arguments compute equal values, whatever the weights and the input are. The structure
        and the shapes of the output are compared, too.

        Raises:
            UserError: They differ.
        """
        ran = self.execution
        if ran is None:
            return
        runner = GraphRunner(self.network, graph, self.images.device)
        traced, output = self._executed(lambda: runner.run(*self.images.tensors))
        if traced.operations == ran.operations and output == self.output:
            return
        pairs = zip(ran.operations, traced.operations, strict=False)
        index = next(
            (index for index, (one, other) in enumerate(pairs) if one != other),
            min(len(ran.operations), len(traced.operations)),
        )
        difference, remedy = self._difference(ran, traced, index)
        raise UserError(
            f"the trace of {type(self.network).__name__} differs from a run: {difference}; {remedy}, or name the "
            "module that contains it in model.leaves to keep its size"
        )

    def _difference(self, run: Execution, traced: Execution, index: int) -> tuple[str, str]:
        """Returns what is different, and what to do about it."""
        remove = "remove that branch from its forward"
        ran = run.operations
        if index == len(ran) == len(traced.operations):
            return "the output of forward has another structure", remove
        located, _ = self._executed(self._run, locate=index)
        line = user_line(located.stack)
        place = f" at {line}" if line else ""
        executed = _written(ran[index]) if index < len(ran) else ""
        recorded = _written(traced.operations[index]) if index < len(traced.operations) else ""
        if executed == recorded:
            return (
                f"operation {index}, {executed}{place}, reads other values, because an operation in place changed a "
                "tensor that is used again",
                "write to a copy of that tensor",
            )
        what = f"executes {executed}{place}" if executed else "has ended"
        return f"as operation {index}, the run {what}, but the trace has {recorded or 'ended'}", remove

    def _run(self) -> Any:
        return self.images.run(self.network)

    def _executed(self, run: Callable[[], Any], locate: int | None = None) -> tuple[Execution, Any]:
        execution = Execution(self.network, self.images.tensors, self.leaf_modules, locate)
        with for_shapes(self.images.device, recorded=True), execution:
            output = run()
        return execution, nested(output, execution.describe)


def _written(operation: tuple[str, tuple[Any, ...]]) -> str:
    """Returns an operation and the shapes that it reads, as ``aten::mul of [2, 8, 4, 4]``."""
    name, arguments = operation
    shapes = [str(list(argument[1])) for argument in arguments if isinstance(argument, tuple)]
    return f"{name} of {', '.join(shapes)}" if shapes else name
