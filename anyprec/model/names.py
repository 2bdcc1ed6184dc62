"""Names that conversion needs on the user's modules, and what to do if they are taken.

A converted module gets a class derived from its own, and attributes and children besides. A name
that the user's class or object has for something of its own would change its meaning there, so that
is refused before anything is changed. Which names a mixin takes is said by `names_of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from anyprec.errors import ConversionError
from anyprec.model.converted import ConvertedModel
from anyprec.model.placement import owners_of
from anyprec.network.facts import NetworkFacts
from anyprec.nn.layers import QuantizedModule
from anyprec.nn.norm_stand_ins import computes_values
from anyprec.nn.norms import SwitchableNorm
from anyprec.nn.operators import MATRICES
from anyprec.nn.outputs import OUTPUTS, OutputOwner
from anyprec.nn.owners import FunctionalOwner
from anyprec.nn.specialize import names_of

_PROBE = "anyprec_has_no_such_attribute"


def require_free_names(
    model: nn.Module,
    facts: NetworkFacts,
    *,
    paths: Sequence[str],
    owners: Mapping[str, Sequence[str]],
    norms: Sequence[str],
    mixin: type[ConvertedModel],
) -> None:
    """Refuse modules that have something of their own under a name that conversion takes.

    Args:
        model: A float network.
        facts: Its facts.
        paths: Paths of the layers that are to be quantized.
        owners: Paths of the modules that use weights of layers without calling them.
        norms: Paths of the norms that are to be switchable.
        mixin: What the network itself is to become.

    Raises:
        ConversionError: Some name is taken.
    """
    _require_free_model(model, mixin)
    for path in paths:
        parameter = facts.layers[path].parameter
        if parameter is not None:
            _require_free_holder(model, parameter)
            continue
        remedy = f"exclude the layer (exclude={path!r}) or rename the attribute"
        layer = model.get_submodule(path)
        _require_free(layer, names_of(QuantizedModule), f"layer {path!r}", remedy)
        _require_class_forward(layer, f"layer {path!r}", f"or exclude the layer (exclude={path!r})")
    for path in norms:
        norm = model.get_submodule(path)
        _require_free(norm, names_of(SwitchableNorm), f"norm {path!r}", "rename the attribute")
        _require_class_forward(norm, f"norm {path!r}", "or take a norm of torch or timm")
        if computes_values(norm):
            msg = f"norm {path!r} was pruned or is parametrized, which its copies could not "
            msg += "follow: make that permanent (torch.nn.utils.prune.remove, "
            msg += "torch.nn.utils.parametrize.remove_parametrizations) before anyprec.convert"
            raise ConversionError(msg)
    _require_free_outputs(model, facts)
    for path, layers in owners.items():
        subject = f"module {path!r}" if path else "the network"
        prefix = f"{path}." if path else ""
        names = ", ".join(repr(prefix + layer) for layer in layers)
        remedy = f"exclude the layers that it uses ({names}) or rename the attribute"
        owner = model.get_submodule(path)
        _require_free(owner, names_of(FunctionalOwner), subject, remedy)
        _require_class_forward(owner, subject, f"or exclude the layers that it uses ({names})")


def _require_free_outputs(model: nn.Module, facts: NetworkFacts) -> None:
    """As `require_free_names`, of the modules in which outputs are quantized."""
    remedy = 'rename the attribute, or convert with placement="layers"'
    for path in owners_of(facts):
        subject = f"module {path!r}" if path else "the network"
        owner = model.get_submodule(path)
        _require_free(owner, names_of(OutputOwner), subject, remedy)
        _require_class_forward(owner, subject, 'or convert with placement="layers"')
    for output in facts.outputs:
        holder = model.get_submodule(output.holder)
        _require_free(holder, frozenset({OUTPUTS}), f"module {output.holder!r}", remedy)


def _require_free_model(model: nn.Module, mixin: type[ConvertedModel]) -> None:
    remedy = "put the network inside another module, e.g. nn.Sequential(network), or rename the "
    remedy += "attribute"
    _require_free(model, names_of(mixin), "the network", remedy)
    # A method is called by ours of the same name; anything else cannot be.
    for name in ("no_weight_decay", "reset_classifier"):
        is_method = callable(getattr(type(model), name, None)) and not _is_own(model, name)
        if _has(model, name) and not is_method:
            msg = f"the network ({type(model).__name__}) has an attribute {name!r} that is no "
            msg += f"method of its class, which timm's networks have under this name: {remedy}"
            raise ConversionError(msg)


def _require_free_holder(model: nn.Module, parameter: str) -> None:
    path, _, name = parameter.rpartition(".")
    holder = model.get_submodule(path)
    if _has(holder, MATRICES):
        msg = f"{type(holder).__name__} has an attribute {MATRICES!r} of its own, which is where "
        msg += f"the step sizes of its parameter {name!r} would stand: exclude that parameter or "
        msg += "rename the attribute"
        raise ConversionError(msg)


def _require_free(module: nn.Module, names: frozenset[str], subject: str, remedy: str) -> None:
    taken = sorted(name for name in names if _has(module, name))
    if not taken:
        return
    which = ", ".join(map(repr, taken))
    noun = "an attribute" if len(taken) == 1 else "attributes"
    pronoun = "this name" if len(taken) == 1 else "these names"
    msg = f"{subject} ({type(module).__name__}) has {noun} {which} of its own, but conversion "
    msg += f"needs {pronoun}: {remedy}"
    raise ConversionError(msg)


def _require_class_forward(module: nn.Module, subject: str, alternative: str) -> None:
    """Refuse a forward that was set on the object: a derived class cannot reach before it."""
    if "forward" in vars(module):
        msg = f"{subject} ({type(module).__name__}) has a forward that was set on the object, so "
        msg += f"nothing can be quantized in it: define forward in the class, {alternative}"
        raise ConversionError(msg)


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module has an attribute that is not nn.Module's.

    Properties are not run.
    """
    if _is_own(module, name):
        return True
    for cls in type(module).__mro__:
        if name in vars(cls):
            return True
    # A `__getattr__` of the user's may pass on what another object has. One that answers
    # everything says nothing.
    if type(module).__getattr__ is nn.Module.__getattr__:
        return False
    return hasattr(module, name) and not hasattr(module, _PROBE)


def _is_own(module: nn.Module, name: str) -> bool:
    """Whether the object itself has it, apart from its class."""
    stores = (vars(module), module._parameters, module._buffers, module._modules)  # noqa: SLF001
    return any(name in store for store in stores)
