"""Which functions read which parameters, seen below everything that can hide them.

An operator that multiplies an input by a weight is recorded by `observation.py`, by its torch
function. A parameter may be read in many other ways: added, masked, indexed, cast, inside a custom
autograd function, a scripted module or `torch.vmap`. All of these reach torch's dispatcher, where
`Readers` watches. So no parameter that something reads can be missed; how it is named and what
becomes of it is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch._C import _functorch
from torch._ops import OpOverload
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import flop_registry

from anyprec.network.calls import EXPOSING, METADATA_ONLY, storage_of
from anyprec.nn.modes import OperationMode
from anyprec.nn.operators import tensors_in


@dataclass
class Reading:
    """How the parameters of one row were read.

    Attributes:
        functions: Names of what computed with them, in order.
        views: Names of what made views of them.
        calls: How many functions computed with them.
        macs: Multiply-accumulates of products that are recorded nowhere else, for the whole batch.
    """

    functions: dict[str, None] = field(default_factory=dict)
    views: dict[str, None] = field(default_factory=dict)
    calls: int = 0
    macs: int = 0


class Readers(OperationMode):
    """Notes what reads parameters while it is active.

    Args:
        parameters: Each parameter with the path of the row that it belongs to.

    Attributes:
        readings: Path of each row that was read to how.
        uncounted: Products with no parameter in them that are recorded nowhere else: name to calls
            and MACs of the whole batch.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.readings: dict[str, Reading] = {}
        self.uncounted: dict[str, tuple[int, int]] = {}
        # By storage, since a view, `detach` and `data` make other tensors. A storage can hold
        # several parameters: those of an LSTM on a GPU.
        self._spans: dict[int, list[tuple[range, str]]] = {}
        for path, parameter in parameters:
            if not is_lazy(parameter) and (location := _location(parameter)) is not None:
                storage, span = location
                self._spans.setdefault(storage, []).append((span, path))
        self._function: str | None = None
        self._is_counted = False

    @contextmanager
    def within(
        self, func: Callable[..., Any], arguments: Iterable[Any], *, counted: bool
    ) -> Iterator[None]:
        """Name what is read in this block after a torch function.

        Args:
            func: The function that runs in the block.
            arguments: All its arguments.
            counted: The caller counts its MACs.
        """
        before = self._function, self._is_counted
        self._function, self._is_counted = function_name(func), counted
        if func in EXPOSING:
            for path in self._paths_in(arguments):
                self._note(path, self._function, is_view=False)
        try:
            yield
        finally:
            self._function, self._is_counted = before

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and note which parameters it has read."""
        arguments = (*args, *kwargs.values())
        paths = self._paths_in(arguments)
        result = func(*args, **kwargs)
        name = function_name(func)
        if name not in METADATA_ONLY:
            is_view = bool(paths) and _makes_view(func, arguments, result)
            for path in paths:
                self._note(path, self._function or name, is_view=is_view)
        count = flop_registry.get(getattr(func, "overloadpacket", None))
        if count is not None and not self._is_counted:
            flops = count(*args, **kwargs, out_val=result)
            self._count(paths, self._function or name, flops // 2)
        return result

    def _paths_in(self, arguments: Iterable[Any]) -> list[str]:
        """Paths of the rows whose parameters are among the arguments, themselves or as views."""
        paths: dict[str, None] = {}
        for tensor in tensors_in(arguments):
            location = _location(tensor)
            if location is None or location[0] not in self._spans:
                continue
            storage, read = location
            for span, path in self._spans[storage]:
                if span.start < read.stop and read.start < span.stop:
                    paths[path] = None
        return list(paths)

    def _note(self, path: str, function: str, *, is_view: bool) -> None:
        reading = self.readings.setdefault(path, Reading())
        if is_view:
            reading.views[function] = None
        else:
            reading.functions[function] = None
            reading.calls += 1

    def _count(self, paths: list[str], function: str, macs: int) -> None:
        """Count a product for the first parameter in it, or else by its name."""
        if paths:
            self.readings.setdefault(paths[0], Reading()).macs += macs
        else:
            calls, total = self.uncounted.get(function, (0, 0))
            self.uncounted[function] = calls + 1, total + macs


def is_transformed(tensor: Tensor) -> bool:
    """Whether it is the stand-in for a tensor inside `torch.vmap` or another such transform."""
    return bool(_functorch.is_functorch_wrapped_tensor(tensor))


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor itself, of a stand-in for it."""
    while is_transformed(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def function_name(func: Any) -> str:
    """What people call a function: `mul` for `Tensor.__imul__` and for `aten.mul.Tensor`."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":  # of a property, as `T` and `data`
        name = str(getattr(func.__self__, "__name__", name))
    name = name.partition(".")[0]
    if name.startswith("__"):
        name = name.strip("_")
        name = _OPERATORS_OF_PYTHON.get(name, name)
    return name.strip("_")


_OPERATORS_OF_PYTHON: Mapping[str, str] = {
    "iadd": "add", "radd": "add", "imul": "mul", "rmul": "mul", "isub": "sub", "rsub": "sub",
    "truediv": "div", "itruediv": "div", "rtruediv": "div", "rdiv": "div", "idiv": "div",
    "rpow": "pow", "ipow": "pow", "rmatmul": "matmul",
}  # fmt: skip


def _location(tensor: Tensor) -> tuple[int, range] | None:
    """Storage and bytes of a tensor; None if it has none of its own (a sparse one, a subclass)."""
    storage = storage_of(tensor)
    if storage is None or not tensor.numel():
        return None
    size, start = tensor.element_size(), tensor.storage_offset()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    reach = 1 + sum((length - 1) * stride for length, stride in steps)
    address = storage._cdata  # noqa: SLF001 (on the meta device, data have no address)
    return address, range(start * size, (start + reach) * size)


def _makes_view(func: Any, arguments: Iterable[Any], result: object) -> bool:
    """Whether an operation has only made a view of an argument."""
    # Operations of higher order have no schema.
    if not isinstance(func, OpOverload) or func._schema.is_mutable:  # noqa: SLF001 (no public name)
        return False
    storages = set()
    for tensor in tensors_in(arguments):
        location = _location(tensor)
        if location is not None:
            storages.add(location[0])
    locations = [_location(tensor) for tensor in tensors_in([result])]
    return any(location is not None and location[0] in storages for location in locations)
