"""Propagates channel labels through a traced network, with one rule for each kind of operation.

Channels that reach an operation without a rule are not prunable; the reason names the operation and its line in the
source. A missing rule therefore limits how far a network can be slimmed, but never makes the result wrong.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from autoslim.channels.graph import IS_OUTPUT
from autoslim.channels.inputs import Arguments
from autoslim.channels.outputs import output_leaves
from autoslim.tracing.capture import Origin
from autoslim.tracing.execution import Execution
from autoslim.tracing.function_rules import operation_rule, passing_module_rule
from autoslim.tracing.interpreter import GraphRunner
from autoslim.tracing.labels import Flow, WeightFlow
from autoslim.tracing.layer_rules import layer_rule
from autoslim.tracing.operations import operation
from autoslim.tracing.record import Carrier, NoRuleError, Record, Rule, blank, describe
from autoslim.tracing.storage import part_name
from autoslim.tracing.weight_rules import check_statistics, functional_layer_rule, read_tensor, weight_rule

STRICT: ContextVar[bool] = ContextVar("strict_rules", default=False)
"""Whether an unforeseen error in a rule is raised. Otherwise the operation counts as one without a rule."""


class Propagation(GraphRunner):
    """Runs a traced network and computes the labels of each operation's output."""

    def __init__(
        self, network: nn.Module, graph: fx.Graph, record: Record, images: Arguments, *, at_one_size: bool
    ) -> None:
        super().__init__(network, graph, images.device)
        self.carrier = Carrier(self.submodules, record, len(images), at_one_size)
        self.execution = Execution(network, images.tensors)
        check_statistics(graph, self.submodules)

    def place(self) -> str:
        """Returns the operation that is running, or ran last, and its line in the user's source."""
        return describe(self.running, self.carrier.modules)

    def run_node(self, n: fx.Node) -> Any:
        self.running = n
        self.execution.macs, self.execution.not_counted = 0, set()
        with self.execution:
            value = super().run_node(n)
        if self.execution.not_counted:
            what = ", ".join(sorted(self.execution.not_counted))
            self.carrier.record.not_counted[n.name] = f"{describe(n, self.carrier.modules)} runs {what}"
        self.carrier.values[n] = None if isinstance(value, Tensor) else value
        flow = self.carrier.flows[n] = self._flow(n, value)
        if isinstance(flow, Flow) and flow.axis is not None:
            self.carrier.record.flows.setdefault(n.name, flow)
        return value

    def mark_choices_not_prunable(self, choices: Mapping[Origin, str]) -> None:
        """Makes channels not prunable if the code branches on their number, because its operations may depend on it."""
        flows = {node.name: flow for node, flow in self.carrier.flows.items() if isinstance(flow, Flow | WeightFlow)}
        for (name, axis), where in choices.items():
            if name in flows and axis in flows[name].varying():
                self.carrier.freeze([flows[name]], f"the code at {where} depends on its number")

    def outputs(self) -> dict[str, Flow | WeightFlow]:
        """Returns the flow of each operation's output, or of its parts if it consists of several tensors."""
        named: dict[str, Flow | WeightFlow] = {}
        for node, flow in self.carrier.flows.items():
            if isinstance(flow, Flow | WeightFlow):
                named[node.name] = flow
            else:
                parts = (
                    (index, leaf) for index, leaf in enumerate(tree_leaves(flow)) if isinstance(leaf, Flow | WeightFlow)
                )
                named |= {part_name(node.name, index): leaf for index, leaf in parts}
        return named

    def _flow(self, node: fx.Node, value: Any) -> Any:
        if node.op == "placeholder":
            return blank(value)
        if node.op == "get_attr":
            return read_tensor(self.carrier, str(node.target), value)
        if node.op == "output":
            self.carrier.freeze(self.carrier.all_flows(node), IS_OUTPUT)
            return None
        if not any(isinstance(leaf, Tensor) for leaf in output_leaves(value)):
            return None
        rule = self._rule(node)
        calls = len(self.carrier.record.calls)
        detail = ""
        if rule is not None:
            try:
                flow = rule(self.carrier, node, value)
                self._check_macs(calls)
                return flow
            except NoRuleError as error:
                detail = str(error)
            except Exception:  # a use of the operation that its rule does not cover
                if STRICT.get():
                    raise
            del self.carrier.record.calls[calls:]
        return self._unknown(node, value, detail)

    def _check_macs(self, calls: int) -> None:
        """Compares the multiply-adds that a rule recorded in the calls from ``calls`` on with those of the run."""
        recorded = sum(call.macs for call in self.carrier.record.calls[calls:] if call.kind != "avgpool")
        if recorded * self.carrier.batch != self.execution.macs:
            raise NoRuleError(f"it costs {self.execution.macs // self.carrier.batch:,} multiply-adds, not {recorded:,}")

    def _rule(self, node: fx.Node) -> Rule | None:
        if any(isinstance(flow, WeightFlow) for flow in self.carrier.all_flows(node)):
            return weight_rule(node, self.carrier.modules)
        if node.op != "call_module":
            return functional_layer_rule(node) or operation_rule(node)
        module = self.carrier.modules[str(node.target)]
        return layer_rule(module) or passing_module_rule(module)

    def _unknown(self, node: fx.Node, value: Any, detail: str) -> Any:
        """Makes all channels that the operation reads not prunable; its output has none."""
        record, name = self.carrier.record, str(node.target)
        what = (
            "is attention, which keeps its heads and its width" if self._is_attention(node) else "has no slimming rule"
        )
        reason = f"{describe(node, self.carrier.modules)} {what}{f': {detail}' if detail else ''}"
        self.carrier.freeze(self.carrier.all_flows(node), reason)
        if node.op == "call_module" and any(True for _ in self.carrier.modules[name].parameters()):
            record.not_prunable.setdefault(name, reason)
            record.labels.freeze(record.labels.sources.get(name, np.zeros(0, np.int64)), reason)
        if macs := self.execution.macs // self.carrier.batch:
            self.carrier.call(node, "other", macs, None, np.zeros(1, np.int64), 1)
        return blank(value)

    def _is_attention(self, node: fx.Node) -> bool:
        """Returns whether a node is torch's layer of attention or a function that is attention by its name."""
        if node.op == "call_module":
            return isinstance(self.carrier.modules[str(node.target)], nn.MultiheadAttention)
        return "attention" in operation(node)
