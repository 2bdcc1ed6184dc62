"""What is known of every value in one forward pass: its sign, and where it comes from.

A dispatch mode sees every operation on tensors, whatever called it: Python, a scripted function, a
custom autograd function, an extension. torch's schemas name its arguments and say which of them it
writes to. All claims are about a *storage*, never about one of its names: a view, `.data` and
`detach()` share it, and what is written through any of them concerns all.

Which operations keep signs is in `signs.py`. Layers are the matter of `observation.py`, which says
here what they put out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from anyprec.network.calls import Call, reference_to, storage_of
from anyprec.network.signs import is_known_number, returns_no_negative
from anyprec.nn.modes import OperationMode
from anyprec.nn.operators import tensors_in


@dataclass(frozen=True)
class ValueFacts:
    """What is known of all numbers in one storage.

    Attributes:
        varies: They may depend on the network's input.
        from_input: They are reached from the network's input with no layer in between.
        layers: Numbers of the last layer calls on every way from the input to them.
        fixed: They come from the code alone: no input, no parameter, no buffer.
        nonnegative: None is negative, if they are read as `dtype`.
        dtype: The dtype in which they were written.
    """

    varies: bool = True
    from_input: bool = False
    layers: frozenset[int] = frozenset()
    fixed: bool = False
    nonnegative: bool = False
    dtype: torch.dtype | None = None


_UNKNOWN = ValueFacts()
"""A storage that no watched operation made."""


class _Storage:
    """The present facts of a storage, and what happened to it."""

    def __init__(self) -> None:
        self.facts = _UNKNOWN
        self.writes = 0
        self.exposed = False


class ValueTracker(OperationMode):
    """Follows every value of one forward pass.

    Args:
        model: The network. Its own tensors depend on no input.
        example_input: The very tensor that it will be run on.

    Attributes:
        numbers_left: A number that is no constant of the code has left torch (`item()`, `if`,
            `tolist()`). With other numbers the code may go on differently than in this pass.
        listener: Called after every operation, with its result; None is nobody.
    """

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        super().__init__()
        # A weak reference as key keeps a storage's address from being used again.
        self._storages: dict[StorageWeakRef | None, _Storage] = {}
        self.numbers_left = False
        self.listener: Callable[[Call, object], None] | None = None
        for tensor in _tensors_of(model):
            self._set(tensor, ValueFacts(varies=False, dtype=tensor.dtype))
        self._set(example_input, ValueFacts(from_input=True, dtype=example_input.dtype))

    def of(self, tensor: Tensor) -> ValueFacts:
        """What is known of the storage of `tensor`."""
        storage = self._find(tensor)
        return _UNKNOWN if storage is None else storage.facts

    def is_nonnegative(self, tensor: Tensor) -> bool:
        """Whether `tensor` is known to hold no negative number, in this and any other pass."""
        return not self.numbers_left and self._holds_no_negative(tensor)

    def varies(self, tensor: Tensor) -> bool:
        """Whether `tensor` may depend on the network's input."""
        return self.numbers_left or self.of(tensor).varies

    def writes(self, tensor: Tensor) -> int:
        """How often the storage of `tensor` was written to since it was made."""
        storage = self._find(tensor)
        return 0 if storage is None else storage.writes

    def mark_output(self, result: object, calls: frozenset[int]) -> None:
        """Note that `result` is what layers put out in their calls with these numbers."""
        for tensor in tensors_in([result]):
            facts = self.of(tensor)
            layers = calls
            if not fills_its_storage(tensor):
                layers |= facts.layers
            self._set(tensor, dataclasses.replace(facts, layers=layers, from_input=False))

    def expose(self, tensor: Tensor, *, writable: bool) -> None:
        """Note that code outside of torch can read `tensor`, or even write to it."""
        self.numbers_left |= not self.of(tensor).fixed
        storage = self._find(tensor)
        if writable and storage is not None:
            storage.exposed = True

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and note what is known of its results."""
        call = Call(func, args, kwargs)
        facts = self._facts_of(call)
        result = func(*args, **kwargs)
        self._note(call, facts, result)
        if self.listener is not None:
            self.listener(call, result)
        return result

    def _facts_of(self, call: Call) -> ValueFacts:
        """The facts of what a call will compute, whatever it writes them to."""
        facts = _merged(map(self.of, call.sources()))
        return dataclasses.replace(
            facts,
            fixed=facts.fixed and not call.is_random,
            nonnegative=returns_no_negative(call.operation, call.arguments, self._is_known),
        )

    def _note(self, call: Call, facts: ValueFacts, result: object) -> None:
        """Note what a call has written and returned."""
        written = list(call.written())
        for tensor in written:
            # Operations that write several tensors are in no table.
            is_result = call.returns_written and len(written) == 1
            self._write(tensor, facts, nonnegative=facts.nonnegative and is_result)
        inputs = set(map(reference_of, call.tensors()))
        for index, tensor in enumerate(tensors_in([result])):
            if reference_of(tensor) not in inputs:
                # What comes second are indices, or of another sign.
                nonnegative = facts.nonnegative and index == 0
                self._set(tensor, _typed(facts, tensor.dtype, nonnegative=nonnegative))
            elif call.operation == "lift_fresh" and self._find(tensor) is None:
                self._set(tensor, _literal(tensor))
        has_left = call.gives_number(result) and not facts.fixed
        self.numbers_left |= has_left or (facts.varies and call.gives_length())

    def _is_known(self, value: object) -> bool:
        """Whether an argument of an operation is known to hold no negative number."""
        if isinstance(value, Tensor):
            return self._holds_no_negative(value)
        if isinstance(value, (tuple, list)):
            return all(map(self._is_known, value))
        return is_known_number(value)

    def _holds_no_negative(self, tensor: Tensor) -> bool:
        storage = self._find(tensor)
        if storage is None or storage.exposed or tensor.is_neg():
            return False
        # Read as another dtype, the same bytes are other numbers.
        return storage.facts.nonnegative and storage.facts.dtype == tensor.dtype

    def _write(self, tensor: Tensor, facts: ValueFacts, *, nonnegative: bool) -> None:
        before = self.of(tensor)
        if not fills_its_storage(tensor):
            nonnegative &= before.nonnegative and before.dtype == tensor.dtype
            facts = _merged([before, facts])
        self._set(tensor, _typed(facts, tensor.dtype, nonnegative=nonnegative))
        storage = self._find(tensor)
        if storage is not None:
            storage.writes += 1

    def _find(self, tensor: Tensor) -> _Storage | None:
        return self._storages.get(reference_of(tensor))

    def _set(self, tensor: Tensor, facts: ValueFacts) -> None:
        reference = reference_of(tensor)
        if reference is not None:
            self._storages.setdefault(reference, _Storage()).facts = facts


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are plain attributes of a module."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from tensors_in(vars(module).values())


def reference_of(tensor: Tensor) -> StorageWeakRef | None:
    """The storage of `tensor`; None if it has none of its own (a sparse or batched tensor)."""
    storage = storage_of(tensor)
    return None if storage is None else reference_to(storage)


def _merged(all_facts: Iterable[ValueFacts]) -> ValueFacts:
    """The facts of what is computed from others; nothing is known of its sign."""
    varies = from_input = False
    fixed = True
    layers: frozenset[int] = frozenset()
    for facts in all_facts:
        varies |= facts.varies
        from_input |= facts.from_input
        fixed &= facts.fixed
        layers |= facts.layers
    return ValueFacts(varies, from_input, layers, fixed)


def _typed(facts: ValueFacts, dtype: torch.dtype, *, nonnegative: bool) -> ValueFacts:
    """`facts` of numbers of this dtype."""
    if not dtype.is_signed:
        nonnegative = True
    elif not dtype.is_floating_point:
        nonnegative = False  # integers run over, and complex numbers have no sign
    # A mask is no image: layers that one is for would all count as the first.
    from_input = facts.from_input and dtype != torch.bool
    return dataclasses.replace(facts, nonnegative=nonnegative, dtype=dtype, from_input=from_input)


def _literal(tensor: Tensor) -> ValueFacts:
    """Facts of a tensor that was made of numbers in the code."""
    # The single numbers among them are those that scale and shift whole values.
    is_number = tensor.numel() == 1 and not tensor.is_meta
    facts = ValueFacts(varies=False, fixed=True)
    return _typed(facts, tensor.dtype, nonnegative=is_number and bool(tensor >= 0))


def fills_its_storage(tensor: Tensor) -> bool:
    """Whether every byte of the storage belongs to exactly one number of `tensor`."""
    storage = storage_of(tensor)
    if storage is None:
        return False
    axes = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, length in axes:
        if length != 1:
            if stride != expected:
                return False
            expected *= length
    return expected * tensor.element_size() == storage.nbytes()
