"""One call of an operation as torch's dispatcher sees it, with every argument under its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload  # torch has no public name for it
from torch.multiprocessing.reductions import StorageWeakRef

from anyprec.nn.operators import tensors_in

METADATA_ONLY = {
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "is_same_size",
}  # fmt: skip
"""Operations that read no numbers of a tensor, only its shape and dtype."""

_OVERWRITING = {
    "copy_", "fill_", "zero_", "uniform_", "normal_", "bernoulli_", "random_", "exponential_",
    "log_normal_", "cauchy_", "geometric_",
}  # fmt: skip
"""Operations in place that do not read what was there."""

_LAYOUT_QUESTIONS = {
    "is_same_size", "size", "sym_size", "numel", "sym_numel", "dim", "stride", "sym_stride",
    "storage_offset", "sym_storage_offset", "is_contiguous", "sym_is_contiguous",
}  # fmt: skip
"""Operations whose answer is a number that depends on no number in a tensor."""


class Call:
    """A call of an operation, before it runs.

    Args:
        func: What the dispatcher runs: an overload of an operation, or an operation of higher order
            without a schema.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Attributes:
        operation: Name without the underscore of in-place forms; empty if torch's own operations
            have none of it.
        arguments: All arguments by name, defaults included; empty without a schema.
        returns_written: What it returns is what it writes to.
    """

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.operation = ""
        self.arguments: dict[str, Any] = {}
        self.returns_written = False
        self._name = ""
        self._values = [*args, *kwargs.values()]
        self._written: list[Any] = []
        self._output_only: list[Any] = []
        self._tags: list[torch.Tag] = []
        if isinstance(func, OpOverload):
            self._read_schema(func, args, kwargs)

    def _read_schema(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        schema = func._schema  # noqa: SLF001 (no public name either)
        namespace, _, self._name = schema.name.partition("::")
        if namespace == "aten":
            self.operation = self._name.removesuffix("_")
        self._tags = func.tags
        for index, argument in enumerate(schema.arguments):
            if index < len(args):
                value = args[index]
            else:
                value = kwargs.get(argument.name, argument.default_value)
            self.arguments[argument.name] = value
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._written.append(value)
                if argument.is_out or self._name in _OVERWRITING:
                    self._output_only.append(value)
        aliases = [returned.alias_info for returned in schema.returns]
        self.returns_written = any(alias is not None and alias.is_write for alias in aliases)

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers."""
        return torch.Tag.nondeterministic_seeded in self._tags

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the arguments."""
        return tensors_in(self._values)

    def written(self) -> Iterator[Tensor]:
        """The tensors that it writes to."""
        return tensors_in(self._written)

    def sources(self) -> Iterator[Tensor]:
        """The tensors whose numbers the result depends on."""
        if self.operation in METADATA_ONLY:
            return
        outputs = set(map(id, tensors_in(self._output_only)))
        for tensor in self.tensors():
            if id(tensor) not in outputs:
                yield tensor

    def gives_number(self, result: object) -> bool:
        """Whether a number that depends on numbers in tensors has become one of Python's."""
        is_number = isinstance(result, (bool, int, float, complex))
        return is_number and self.operation not in _LAYOUT_QUESTIONS

    def gives_length(self) -> bool:
        """Whether the shape of the result depends on numbers in tensors."""
        if torch.Tag.dynamic_output_shape not in self._tags:
            return False
        if self.operation != "index":
            return True
        # Only a mask selects as many as it will.
        indices = tensors_in([self.arguments["indices"]])
        return any(index.dtype in (torch.bool, torch.uint8) for index in indices)


EXPOSING: dict[Any, bool] = {
    Tensor.numpy: True,
    Tensor.__array__: True,
    Tensor.__dlpack__: True,
    Tensor.data_ptr: True,
    Tensor.untyped_storage: True,
    Tensor.storage: True,
    Tensor.tolist: False,
}
"""Functions that give the numbers of a tensor to code outside of torch; whether to write, too."""


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage of `tensor`; None if it has none of its own (a sparse or batched tensor)."""
    # Past torch functions: the question must not look like the network's own, and a parameter
    # without a shape yet would refuse it.
    with torch._C.DisableTorchFunction():  # noqa: SLF001 (torch has no public name for it)
        try:
            return tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return None


def reference_to(storage: torch.UntypedStorage) -> StorageWeakRef:
    """A key for a storage, whose address no other one gets as long as the key lives."""
    return StorageWeakRef(storage)


def same_storage(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors share a storage."""
    left_storage, right_storage = storage_of(left), storage_of(right)
    if left_storage is None or right_storage is None:
        return False
    return bool(reference_to(left_storage) == reference_to(right_storage))
