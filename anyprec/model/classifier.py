"""Converted networks that, like timm's, can exchange their classifier."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anyprec.errors import ConversionError
from anyprec.model.converted import ConvertedModel
from anyprec.model.intact import Parts, outputs_of, parts_of, submodule_or_none
from anyprec.model.record import Coverage
from anyprec.model.restoring import restored_on_error
from anyprec.model.switching import switch_to_float
from anyprec.network.facts import LayerFacts
from anyprec.nn.layers import QuantizedLayer, quantize_layer
from anyprec.nn.norms import SwitchableNorm, switch_norm
from anyprec.nn.operators import LAYER_TYPES
from anyprec.nn.shared import SharedInputQuantizer
from anyprec.runtime.batches import device_of
from anyprec.runtime.modes import evaluating


class ConvertedClassifier(ConvertedModel):
    """A converted network whose class has `reset_classifier`."""

    class_prefix: ClassVar[str] = "AnyPrecision"

    _anyprec_extended: ClassVar[tuple[str, ...]] = ("reset_classifier",)

    def reset_classifier(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network's own `reset_classifier`, and quantize the new classifier like the old.

        Step sizes of its input are kept where the layer reads the same features; the network runs
        in floating point afterwards, and named configurations are dropped if the set of layers
        changed.

        Raises:
            ConversionError: Views of the network are alive (`model.view`), or the call changes
                values between layers that have a quantizer (`placement="integer"`). The model is
                left as it was.
        """
        if self.anyprec_precision.family.has_views:
            gc.collect()  # a view that nobody has any more may wait for it
        if self.anyprec_precision.family.has_views:
            msg = "reset_classifier exchanges a layer, which other views of the network would not "
            msg += "notice: drop them before, and make new ones afterwards"
            raise ConversionError(msg)
        before, bits = parts_of(self), self.bits
        switch_to_float(self)
        try:
            with restored_on_error(self):
                # The network's own class has it.
                result = super().reset_classifier(*args, **kwargs)  # type: ignore[misc]
                if before.outputs:
                    _require_outputs(self)
        except BaseException:
            self.set_bits(bits)
            raise
        _adopt_replacements(self, before)
        return result


@torch.no_grad()
def _require_outputs(model: ConvertedModel) -> None:
    """Refuse a change of the network after which not all values that are quantized are made.

    Raises:
        ConversionError: A quantizer is gone, or a forward pass makes other calls than before.
    """
    example = torch.zeros(model.anyprec_record.facts.example_shape, device=device_of(model))
    try:
        # While anybody observes a value, the module that makes it counts its calls.
        with ExitStack() as observers, evaluating(model):
            for quantizer in outputs_of(model).values():
                observers.enter_context(quantizer.observers.including(_ignore))
            model(example)
    except ConversionError as error:
        msg = "reset_classifier changes values between layers that have a quantizer: call it "
        msg += f'before anyprec.convert, or convert with placement="layers" ({error})'
        raise ConversionError(msg) from error


def _ignore(_value: Tensor) -> None:
    """Observe, and do nothing."""


def _adopt_replacements(model: ConvertedModel, before: Parts) -> None:
    """Quantize and switch what took the place of layers and norms that were there before."""
    _adopt_norms(model, before.norms)
    _adopt_layers(model, before.layers)


def _adopt_norms(model: ConvertedModel, before: Mapping[str, SwitchableNorm]) -> None:
    """Give copies to what took the place of the norms `before`, and the network a new record."""
    record = model.anyprec_record
    setters = dict(record.norms)
    for path, old in {**record.removed_norms, **before}.items():
        new = submodule_or_none(model, path)
        if new is old:
            continue
        if isinstance(new, _BatchNorm):
            _switch_like(new, old, shared_affine=record.settings.norm == "shared-affine")
            feeding = record.facts.norms[path]
            setters[path] = feeding if feeding in record.quantized else None
            record.removed_norms.pop(path, None)
        else:
            setters.pop(path, None)
            record.removed_norms[path] = old
    model.anyprec_record = dataclasses.replace(record, norms=setters)


def _adopt_layers(model: ConvertedModel, before: Mapping[str, QuantizedLayer]) -> None:
    """Quantize what took the place of the layers `before`, and give the network a new record."""
    record = model.anyprec_record
    coverage = {row.path: row for row in record.coverage}
    covered_before = set(coverage)
    facts = dict(record.facts.layers)
    for path, old in {**record.removed, **before}.items():
        new = submodule_or_none(model, path)
        if new is old:
            continue
        if isinstance(new, LAYER_TYPES):
            coverage[path] = Coverage(path, type(new).__name__, "quantized")
            facts[path] = _facts_like(facts[path], new.weight.numel())
            _quantize_like(new, old)
            record.removed.pop(path, None)
        else:
            coverage.pop(path, None)
            record.removed[path] = old
    if coverage.keys() != covered_before:
        # No configuration names the present layers.
        record.configs.clear()
        record.statistics.clear()
        for path in record.frozen.keys() - coverage.keys():
            del record.frozen[path]
    model.anyprec_record = dataclasses.replace(
        record,
        coverage=tuple(coverage.values()),
        facts=dataclasses.replace(record.facts, layers=facts),
    )
    model.anyprec_precision.connect(model)


def _switch_like(new: _BatchNorm, old: SwitchableNorm, *, shared_affine: bool) -> None:
    if old.bank is None:
        switch_norm(new, 0)
    else:
        switch_norm(new, old.bank.rows, shared_affine=shared_affine, widths=old.bank.widths)


def _facts_like(old: LayerFacts, weights: int) -> LayerFacts:
    """Facts of a new classifier: its MACs are to the old ones as its weights are."""
    return dataclasses.replace(old, weights=weights, macs=old.macs * weights // old.weights)


def _quantize_like(new: nn.Module, old: QuantizedLayer) -> None:
    nonnegative = old.input_quantizer.nonnegative
    trunk = None
    if isinstance(old.input_quantizer, SharedInputQuantizer):
        trunk = old.input_quantizer.trunk
    quantize_layer(
        new,
        old.candidates,
        nonnegative=nonnegative,
        axis=old.weight_quantizer.axis,
        rule=old.input_quantizer.rule,
        trunk=trunk,
    )
    if isinstance(new, QuantizedLayer) and old.weight.shape[1:] == new.weight.shape[1:]:
        new.input_quantizer.load_state_dict(old.input_quantizer.state_dict())
