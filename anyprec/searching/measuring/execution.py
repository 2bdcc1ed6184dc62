"""Partial execution of a converted network: only what depends on changed layers runs again.

The torch.fx graph of the network is executed node by node. One configuration is the *anchor*:
values that are the same at the anchor are stored, as far as memory allows, and taken from there
when another configuration is evaluated. So a change of one layer costs only the layers behind it.
Nothing is approximated: what is stored is the very tensor that the node would compute again, and
`PartialExecution.of` runs the network both ways first, and gives reasons where they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from anyprec.bits import BitConfig, highest_config, lowest_config
from anyprec.model.converted import ConvertedModel
from anyprec.network.tracing import graph_module, trace
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norms import SwitchableNorm
from anyprec.nn.operators import tensors_in
from anyprec.nn.outputs import OutputOwner
from anyprec.nn.owners import FunctionalOwner

DEFAULT_MEMORY = 2 * 2**30
"""Bytes of intermediate results that are stored."""

_Switching = QuantizedLayer | SwitchableNorm
"""A module whose output depends on the configuration."""


class PartialExecution:
    """Runs one network on fixed batches, at one configuration after the other.

    The network must be in eval mode, and its weights must stay as they are. Make one with `of`.

    Args:
        model: A converted network.
        graph: Its graph.
        batches: Number of batches that it will be run on.
        memory: Most bytes to store, over all batches.

    Attributes:
        layer_runs: Executions of quantized layers so far, counted for each batch.
    """

    def __init__(
        self, model: ConvertedModel, graph: fx.Graph, *, batches: int, memory: int
    ) -> None:
        self._model = model
        module = graph_module(model, graph)
        self._interpreter = fx.Interpreter(module, garbage_collect_values=False)
        self._nodes: list[fx.Node] = list(module.graph.nodes)
        self._switching: dict[fx.Node, list[_Switching]] = {}
        self._layers: dict[fx.Node, int] = {}
        for node in self._nodes:
            modules = _switching_modules(model, node)
            self._switching[node] = modules
            self._layers[node] = sum(isinstance(part, QuantizedLayer) for part in modules)
        self._memory = memory
        self._stored: list[dict[fx.Node, Any]] = [{} for _ in range(batches)]
        self._versions: dict[tuple[int, fx.Node], list[int]] = {}
        self._storable = set(filter(self._is_worth_storing, self._nodes))
        self._anchor: dict[fx.Node, Any] = {}
        self.layer_runs = 0

    @classmethod
    def of(
        cls, model: ConvertedModel, images: Sequence[Tensor], *, memory: int = DEFAULT_MEMORY
    ) -> tuple[PartialExecution | None, str | None]:
        """Partial execution of `model` on these batches, or None and why it is not possible.

        The network is run a few times on one batch of each shape, whole and in parts: outputs must
        be identical.
        """
        graph, reason = trace_converted(model)
        if graph is None:
            return None, f"torch.fx cannot trace it: {reason}"
        if isinstance(model, FunctionalOwner):
            return None, "the network itself uses weights without calling their layers"
        if isinstance(model, OutputOwner):
            return None, "outputs are quantized in the forward of the network itself"
        execution = cls(model, graph, batches=len(images), memory=memory)
        if reason := execution._try(images):
            return None, reason
        return execution, None

    def set_anchor(self, config: BitConfig) -> None:
        """From now on store what is computed at `config`; what differs there is dropped."""
        with self._model.using_bits(config):
            states = self._states()
        stale = self._differing(states)  # by the old anchor, at which the values were computed
        for stored in self._stored:
            for node in stale & stored.keys():
                del stored[node]
        self._anchor = states

    def run(self, batch: int, images: Tensor) -> Any:
        """The output for `images`, batch number `batch`, at the network's current precision."""
        differing = self._differing(self._states())
        plan = self._plan(differing, self._stored[batch])
        environment = self._interpreter.env
        environment.clear()
        self._interpreter.args_iter = iter(())
        try:
            self._execute(plan, batch, images, differing)
            return environment[plan[-1]]
        finally:
            environment.clear()

    def _execute(
        self, plan: list[fx.Node], batch: int, images: Tensor, differing: set[fx.Node]
    ) -> None:
        stored, environment = self._stored[batch], self._interpreter.env
        last_use = {}
        for node in plan:
            last_use.update(dict.fromkeys(node.all_input_nodes, node))
        for node in plan:
            for source in node.all_input_nodes:
                if source not in environment:
                    environment[source] = stored[source]
            value = self._run_node(node, images)
            environment[node] = value
            self.layer_runs += self._layers[node]
            if node in self._storable and node not in differing:
                stored[node] = value
                self._versions[batch, node] = _versions(value)
            # Memory peaks as in an ordinary forward pass: what nobody reads any more goes at once.
            for source in node.all_input_nodes:
                if last_use[source] is node:
                    del environment[source]

    def _run_node(self, node: fx.Node, images: Tensor) -> Any:
        if node is self._nodes[0]:
            return images  # the first argument, even if it has a default
        if node.op == "placeholder":
            return node.args[0] if node.args else images
        return self._interpreter.run_node(node)

    def _plan(self, differing: set[fx.Node], stored: dict[fx.Node, Any]) -> list[fx.Node]:
        """The nodes to execute, in order, so that the output is known."""
        needed: set[fx.Node] = set()
        waiting = [self._nodes[-1]]
        while waiting:
            node = waiting.pop()
            if node in needed or (node in stored and node not in differing):
                continue
            needed.add(node)
            waiting.extend(node.all_input_nodes)
        return list(filter(needed.__contains__, self._nodes))

    def _states(self) -> dict[fx.Node, Any]:
        """What the value of each node depends on, beside its inputs."""
        states: dict[fx.Node, Any] = {}
        for node, modules in self._switching.items():
            states[node] = list(map(self._state, modules))
        return states

    def _state(self, module: _Switching) -> Any:
        if isinstance(module, QuantizedLayer):
            return module.bits
        # Statistics of exactly this configuration depend on the bits of all layers.
        config = None if module.override is None else self._model.bits
        return module.row, module.uniform, config

    def _differing(self, states: dict[fx.Node, Any]) -> set[fx.Node]:
        """Nodes whose value is not that of the anchor: the changed ones and all that read them."""
        differing: set[fx.Node] = set()
        for node in self._nodes:
            is_changed = self._anchor.get(node) != states[node]
            if is_changed or not differing.isdisjoint(node.all_input_nodes):
                differing.add(node)
        return differing

    def _is_worth_storing(self, node: fx.Node) -> bool:
        """Whether a layer or several nodes read it: all else is cheap to compute from these."""
        if node.op in ("get_attr", "placeholder", "output"):
            return False
        return len(node.users) > 1 or any(self._layers[user] for user in node.users)

    # Trying it

    def _try(self, images: Sequence[Tensor]) -> str | None:
        """Compare with whole forward passes, and choose what to store.

        Returns:
            The reason why it is not possible, or None.
        """
        first_of_shape: dict[tuple[int, ...], int] = {}
        for index, batch in enumerate(images):
            first_of_shape.setdefault(tuple(batch.shape), index)
        for index in first_of_shape.values():
            try:
                reason = self._try_batch(index, images[index])
            except Exception as error:  # noqa: BLE001 (it may fail as any network can)
                reason = f"executing its graph fails with {type(error).__name__}: {error}"
            if reason is not None:
                return reason
            self._limit_to_memory(index, len(images))
            self._stored[index].clear()
        self.layer_runs = 0
        return None

    def _try_batch(self, index: int, images: Tensor) -> str | None:
        candidates = self._model.candidates
        highest, lowest = highest_config(candidates), lowest_config(candidates)
        # From the last layer to the first: so ever more is recomputed on top of what is stored.
        some = list(candidates)[:: max(1, len(candidates) // 3)][::-1]
        changed = [highest.replace({path: lowest[path]}) for path in some]
        self.set_anchor(highest)
        for config in [highest, *changed, lowest, highest]:
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
        """Operators that work in place must not change what is stored."""
        for node, value in self._stored[index].items():
            if self._versions[index, node] != _versions(value):
                return f"what {node.name} computes is changed in place later"
        return None

    def _limit_to_memory(self, index: int, batches: int) -> None:
        """Store small results first: most of a network is before them, little before large ones."""
        sizes = {}
        for node, value in self._stored[index].items():
            tensors = tensors_in([value])
            sizes[node] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        room = self._memory
        for node in sorted(sizes, key=lambda node: sizes[node]):
            room -= batches * sizes[node]
            if room < 0:
                self._storable.discard(node)


def trace_converted(model: ConvertedModel) -> tuple[fx.Graph | None, str | None]:
    """The graph of a converted network.

    Quantized layers and what runs their operators are single nodes. None, and the reason, where
    torch.fx cannot trace it.
    """
    return trace(model, opaque=(QuantizedLayer, FunctionalOwner, OutputOwner))


def _switching_modules(model: ConvertedModel, node: fx.Node) -> list[_Switching]:
    """What has a precision inside the module that a node calls."""
    if node.op != "call_module":
        return []
    modules = model.get_submodule(str(node.target)).modules()
    return [module for module in modules if isinstance(module, _Switching)]


def _versions(value: Any) -> list[int]:
    """How often each tensor was changed in place."""
    # torch has no public name for it.
    return [tensor._version for tensor in tensors_in([value])]  # noqa: SLF001
