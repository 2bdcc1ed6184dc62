"""Give an existing module a subclass of its own class, in place.

`convert` must leave a network the user's own: `isinstance` checks, attributes, parameter names,
`deepcopy` and pickle keep working. So a converted `Conv2dSame` becomes an object of a class derived
from `Conv2dSame` and one of our mixins, made on demand; nothing is wrapped and no parameter is
renamed. What the mixins do is in `layers.py`, `norms.py`, `owners.py` and
`model/converted.py`.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import nn

ORIGINAL_FORWARD = "_anyprec_original_forward"
"""Name of the forward of the user's own class, which a mixin's may hide."""


class Specialized(nn.Module):
    """Base of the mixins: knows the class that an object had before, and how to pickle it."""

    class_prefix: ClassVar[str]
    """Put before the name of the original class."""

    original_class: ClassVar[type[nn.Module]]
    """The user's own class, below every mixin."""

    _anyprec_added: ClassVar[tuple[str, ...]] = ()
    """What is put on the object beside the class: attributes and children, by name.

    Every name belongs here that the object did not have before: see `names_of`.
    """

    _anyprec_extended: ClassVar[tuple[str, ...]] = ()
    """Methods that the original class may have, too: ours call it. Those of nn.Module go without
    saying."""

    _anyprec_class_before: ClassVar[type[nn.Module]]
    """The class before the last `specialize`."""

    _anyprec_mixins: ClassVar[tuple[type[Specialized], ...]]
    """All mixins, the last one first."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by mixin and original class: the class itself cannot be imported."""
        # What __getstate__ leaves out is bound to this very object, such as its compiled form.
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return _empty, (self._anyprec_mixins, self.original_class), state


def specialize(module: nn.Module, mixin: type[Specialized]) -> None:
    """Change the class of `module` to one derived from `mixin` and its present class."""
    cls: Any = specialized_class(mixin, type(module))
    module.__class__ = cls


def despecialize(module: Specialized) -> None:
    """Undo the last `specialize` of `module`. The caller removes what the mixin added to it."""
    cls: Any = module._anyprec_class_before  # noqa: SLF001 (same file)
    module.__class__ = cls


def user_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The user's own class below every mixin, or `kind` itself."""
    return kind.original_class if issubclass(kind, Specialized) else kind


def names_of(mixin: type[Specialized]) -> frozenset[str]:
    """Every name that `mixin` takes on a module, in its class or on the object.

    A module must not use one of them for something of its own. What nn.Module has is not among
    them, and neither is what the mixin only extends.
    """
    names: set[str] = set()
    extended: set[str] = set()
    for cls in mixin.__mro__:
        if issubclass(cls, Specialized):
            names.update(cls._anyprec_added)
            extended.update(cls._anyprec_extended)
        if cls not in nn.Module.__mro__:
            names.update(vars(cls))
    # What `_make_class` writes into the body of the class.
    names |= {"original_class", "_anyprec_class_before", "_anyprec_mixins", ORIGINAL_FORWARD}
    names -= extended | set(dir(nn.Module))
    return frozenset(name for name in names if not name.startswith("__"))


def specialized_class(mixin: type[Specialized], original: type[nn.Module]) -> type[Specialized]:
    """The class derived from `mixin` and `original`, made once."""
    # Any, since nn.Module's annotations hide from mypy that a class is hashable.
    key: Any = (mixin, original)
    made: type[Specialized] = _make_class(*key)
    return made


@functools.cache
def _make_class(mixin: Any, original: Any) -> Any:
    mixins = (mixin,)
    if issubclass(original, Specialized):
        mixins += original._anyprec_mixins  # noqa: SLF001 (same file)
    body = {
        "original_class": user_class(original),
        "_anyprec_class_before": original,
        ORIGINAL_FORWARD: user_class(original).forward,
        "_anyprec_mixins": mixins,
        "__module__": mixin.__module__,
        "__doc__": original.__doc__,
    }
    return type(f"{mixin.class_prefix}{original.__name__}", (mixin, original), body)


def _empty(mixins: tuple[type[Specialized], ...], original: type[nn.Module]) -> nn.Module:
    """An object of the class that `mixins`, the outermost first, make of `original`."""
    cls = original
    for mixin in reversed(mixins):
        cls = specialized_class(mixin, cls)
    return cls.__new__(cls)
