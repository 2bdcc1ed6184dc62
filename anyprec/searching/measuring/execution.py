"""Partial execution of a converted network: only what depends on the layers that changed runs again.

The torch.fx graph of the network is executed node by node. One configuration is the *anchor*: values that are the same
at the anchor are kept, as far as memory allows, and taken from there when another configuration is evaluated. So a change
of one layer costs only the layers behind it. Nothing is approximated: what is kept is the very tensor that the node would
compute again, and `PartialExecution.of` runs the network both ways first, and gives reasons where they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from anyprec.bits import BitConfig, highest_config, lowest_config
from anyprec.model.converted import ConvertedModel
from anyprec.network.tracing import trace
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norms import SwitchableNorm
from anyprec.nn.owners import FunctionalOwner

DEFAULT_MEMORY = 2 * 2**30
"""Bytes of intermediate results that are kept."""


class PartialExecution:
    """Runs one network on fixed batches, at one configuration after the other.

    The network must be in eval mode, and its weights must stay as they are. Make one with `of`.

    Args:
        model: A converted network.
        graph: Its graph.
        batches: Number of batches that it will be run on.
        memory: Most bytes to keep, over all batches.

    Attributes:
        layer_runs: Executions of quantized layers so far, counted for each batch.
    """

    def __init__(
        self, model: ConvertedModel, graph: fx.Graph, *, batches: int, memory: int
    ) -> None:
        self._model = model
        module = fx.GraphModule(model, graph)
        self._interpreter = fx.Interpreter(module, garbage_collect_values=False)
        self._nodes = list(module.graph.nodes)
        self._parts = {node: _parts(model, node) for node in self._nodes}
        self._layers = {
            node: sum(isinstance(part, QuantizedLayer) for part in self._parts[node])
            for node in self._nodes
        }
        self._memory = memory
        self._kept: list[dict[fx.Node, Any]] = [{} for _ in range(batches)]
        self._versions: dict[tuple[int, fx.Node], list[int]] = {}
        self._keepable: set[fx.Node] = {
            node for node in self._nodes if self._is_worth_keeping(node)
        }
        self._anchor: dict[fx.Node, Any] = {}
        self.layer_runs = 0

    @classmethod
    def of(
        cls, model: ConvertedModel, images: Sequence[Tensor], *, memory: int = DEFAULT_MEMORY
    ) -> tuple[PartialExecution | None, str | None]:
        """Partial execution of `model` on these batches, or None and why it is not possible.

        The network is run a few times on one batch of each shape, whole and in parts: outputs must be identical.
        """
        graph, reason = trace_converted(model)
        if graph is None:
            return None, f"torch.fx cannot trace it: {reason}"
        if isinstance(model, FunctionalOwner):
            return None, "the network itself uses weights without calling their layers"
        execution = cls(model, graph, batches=len(images), memory=memory)
        if reason := execution._try(images):
            return None, reason
        return execution, None

    @property
    def layers(self) -> int:
        """Executions of quantized layers in one whole forward pass."""
        return sum(self._layers.values())

    def set_anchor(self, config: BitConfig) -> None:
        """From now on keep what is computed at `config`; what is not the same there is dropped."""
        with self._model.using_bits(config):
            states = self._states()
        changed = {node for node in self._nodes if self._anchor.get(node) != states[node]}
        stale = self._reached_by(changed)
        for kept in self._kept:
            for node in stale & kept.keys():
                del kept[node]
        self._anchor = states

    def run(self, batch: int, images: Tensor) -> Any:
        """The output for `images`, which are batch number `batch`, at the precision that the network has now."""
        states = self._states()
        differing = self._reached_by(
            {node for node in self._nodes if self._anchor.get(node) != states[node]}
        )
        kept = self._kept[batch]
        return self._execute(self._plan(differing, kept), batch, images, differing)

    def _execute(
        self, plan: list[fx.Node], batch: int, images: Tensor, differing: set[fx.Node]
    ) -> Any:
        kept = self._kept[batch]
        last_use = {source: node for node in plan for source in node.all_input_nodes}
        environment = self._interpreter.env
        environment.clear()
        self._interpreter.args_iter = iter(())
        try:
            for node in plan:
                for source in node.all_input_nodes:
                    if source not in environment:
                        environment[source] = kept[source]
                value = self._run_node(node, images)
                environment[node] = value
                self.layer_runs += self._layers[node]
                if node in self._keepable and node not in differing:
                    kept[node] = value
                    self._versions[batch, node] = _versions(value)
                for source in node.all_input_nodes:
                    if last_use[source] is node:
                        del environment[source]
            return environment[plan[-1]]
        finally:
            environment.clear()

    def _run_node(self, node: fx.Node, images: Tensor) -> Any:
        if node.op == "placeholder":
            return node.args[0] if node.args else images
        return self._interpreter.run_node(node)

    def _plan(self, differing: set[fx.Node], kept: dict[fx.Node, Any]) -> list[fx.Node]:
        """The nodes to execute, in order, so that the output is known."""
        needed: set[fx.Node] = set()
        waiting = [self._nodes[-1]]
        while waiting:
            node = waiting.pop()
            if node in needed or (node in kept and node not in differing):
                continue
            needed.add(node)
            waiting.extend(node.all_input_nodes)
        return [node for node in self._nodes if node in needed]

    def _states(self) -> dict[fx.Node, Any]:
        """What the value of each node depends on, beside its inputs."""
        own_statistics: Any = None
        states = {}
        for node, parts in self._parts.items():
            state: list[Any] = []
            for part in parts:
                if isinstance(part, QuantizedLayer):
                    state.append(part.bits)
                    continue
                if part.override is not None and own_statistics is None:
                    own_statistics = self._model.bits  # statistics of exactly this configuration
                state.append(
                    (part.row, part.uniform, None if part.override is None else own_statistics)
                )
            states[node] = tuple(state)
        return states

    def _reached_by(self, changed: set[fx.Node]) -> set[fx.Node]:
        """These nodes and all that depend on them."""
        reached: set[fx.Node] = set()
        for node in self._nodes:
            if node in changed or any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        return reached

    def _is_worth_keeping(self, node: fx.Node) -> bool:
        """Whether it is read by a layer or by several nodes: anything else is cheap to compute again from these."""
        if node.op in ("get_attr", "placeholder", "output"):
            return False
        return len(node.users) > 1 or any(self._layers[user] for user in node.users)

    # Trying it

    def _try(self, images: Sequence[Tensor]) -> str | None:
        """Compare with whole forward passes, and choose what to keep; the reason why it is not possible, or None."""
        first_of_shape: dict[tuple[int, ...], int] = {}
        for index, batch in enumerate(images):
            first_of_shape.setdefault(tuple(batch.shape), index)
        for index in first_of_shape.values():
            try:
                reason = self._try_batch(index, images[index])
            except Exception as error:  # noqa: BLE001 (a graph may fail in any way that a network can)
                reason = f"executing its graph fails with {type(error).__name__}: {error}"
            if reason is not None:
                return reason
            self._keep_within_memory(index, len(images))
            self._kept[index].clear()
        self.layer_runs = 0
        return None

    def _try_batch(self, index: int, images: Tensor) -> str | None:
        candidates = self._model.candidates
        highest, lowest = highest_config(candidates), lowest_config(candidates)
        some = list(candidates)[:: max(1, len(candidates) // 3)][::-1]
        self.set_anchor(highest)
        configs = [
            highest,
            *(highest.replace({path: lowest[path]}) for path in some),
            lowest,
            highest,
        ]
        for config in configs:
            with self._model.using_bits(config), torch.no_grad():
                whole, partial = self._model(images), self.run(index, images)
            if not (isinstance(whole, Tensor) and isinstance(partial, Tensor)):
                return f"its output is no tensor but a {type(whole).__name__}"
            if not torch.equal(whole, partial) and not (whole.isnan() & partial.isnan()).any():
                return "executing its graph does not give the output of its forward"
            if reason := self._find_mutation(index):
                return reason
        return None

    def _find_mutation(self, index: int) -> str | None:
        """Operators that work in place must not change what is kept."""
        for node, value in self._kept[index].items():
            if self._versions[index, node] != _versions(value):
                return f"what {node.name} computes is changed in place later"
        return None

    def _keep_within_memory(self, index: int, batches: int) -> None:
        """Keep small results first: behind them most of a network lies before, and before the large ones little."""
        sizes = {
            node: batches
            * sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))
            for node, value in self._kept[index].items()
        }
        room = self._memory
        for node in sorted(sizes, key=lambda node: sizes[node]):
            room -= sizes[node]
            if room < 0:
                self._keepable.discard(node)


def trace_converted(model: ConvertedModel) -> tuple[fx.Graph | None, str | None]:
    """The graph of a converted network, in which quantized layers and what runs their operators are single nodes.

    None, and the reason, where torch.fx cannot trace it.
    """
    return trace(model, opaque=(QuantizedLayer, FunctionalOwner))


def _parts(model: ConvertedModel, node: fx.Node) -> list[QuantizedLayer | SwitchableNorm]:
    """What has a precision inside the module that a node calls."""
    if node.op != "call_module":
        return []
    modules = model.get_submodule(str(node.target)).modules()
    return [module for module in modules if isinstance(module, (QuantizedLayer, SwitchableNorm))]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [tensor for item in value for tensor in _tensors(item)]
        if isinstance(value, (tuple, list))
        else []
    )


def _versions(value: Any) -> list[int]:
    """How often each tensor was changed in place."""
    return [tensor._version for tensor in _tensors(value)]  # noqa: SLF001 (torch has no public name for it)
