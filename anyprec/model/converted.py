"""What a converted model can do: switch its precision, say what it is, and stay a model of its own class.

`conversion.py` gives the user's model a class derived from its own and one of the mixins here. Nothing in this file
looks at data or at the graph; it switches layers and norms that are already in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig, Bits, BitsLike, LayerCandidates, resolve, shorten, uniform
from anyprec.errors import BitsError, ConversionError, NotCalibratedError, PackedError
from anyprec.model.norm_copies import norm_row
from anyprec.model.record import ConversionRecord, Coverage
from anyprec.model.summary import Summary, SummaryRow
from anyprec.network.facts import LayerFacts
from anyprec.nn.layers import PACKED, QuantizedLayer, quantize_layer
from anyprec.nn.norms import Statistics, SwitchableNorm
from anyprec.nn.operators import LAYER_TYPES
from anyprec.nn.packed import NO_LATENTS
from anyprec.nn.specialize import Specialized
from anyprec.nn.undecayed import undecayed_parameters

Request = BitsLike | Mapping[str, BitsLike] | None
"""What `set_bits` takes: see `ConvertedModel.set_bits`."""


class ConvertedModel(Specialized):
    """Mixin of a converted network. The network keeps its own class, methods and parameter names besides."""

    class_prefix: ClassVar[str] = "AnyPrecision"

    anyprec_record: ConversionRecord

    @property
    def quantized_layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by path, in network order.

        Raises:
            ConversionError: A layer was replaced by another module after conversion.
        """
        found: dict[str, QuantizedLayer] = {}
        for path in self.anyprec_record.quantized:
            layer = _submodule_or_none(self, path)
            if not isinstance(layer, QuantizedLayer):
                kind = "removed" if layer is None else f"replaced by a {type(layer).__name__}"
                msg = f"layer {path!r} was {kind} after conversion: replace layers before anyprec.convert, or use the "
                msg += "model's reset_classifier"
                raise ConversionError(msg)
            found[path] = layer
        return found

    @property
    def is_packed(self) -> bool:
        """Whether it holds integer codes in the place of latent weights (loaded from a packed file)."""
        return any(layer.packed is not None for layer in self.quantized_layers.values())

    @property
    def candidates(self) -> dict[str, LayerCandidates]:
        """The bit-widths that each quantized layer may take, by path."""
        return {path: layer.candidates for path, layer in self.quantized_layers.items()}

    @property
    def frozen(self) -> dict[str, Bits]:
        """The lowest precision that training draws and search tries, of layers whose lower candidates are frozen."""
        return dict(self.anyprec_record.frozen)

    @property
    def current_candidates(self) -> dict[str, LayerCandidates]:
        """The candidates of each quantized layer without the frozen ones."""
        lowest = self.anyprec_record.frozen
        candidates = self.candidates.items()
        return {
            path: layer.above(lowest[path]) if path in lowest else layer
            for path, layer in candidates
        }

    def freeze(self, lowest: Mapping[str, BitsLike]) -> None:
        """Freeze the candidates below these precisions: training draws and search tries only what is left.

        The bit-width scheduler does this during training; what it froze last stays with the model and its file.
        `set_bits` still takes every candidate, since a frozen one has its step sizes all the same.

        Args:
            lowest: Path of a layer to its lowest precision in use, in place of all lowest before; `{}` frees all.

        Raises:
            BitsError: No layer has that path, or a bit-width is not among its candidates; nothing is changed.
        """
        candidates = self.candidates
        checked = resolve(_known_paths(lowest, candidates), candidates)
        self.anyprec_record.frozen = {
            path: checked[path] for path in lowest if checked[path] != candidates[path].lowest
        }

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """What became of every layer of the float network that multiplies its input by a weight."""
        return self.anyprec_record.coverage

    @property
    def configs(self) -> dict[str, BitConfig]:
        """Named configurations: add your own; `save` keeps them and `set_bits` takes their names."""
        return self.anyprec_record.configs

    @property
    def bits(self) -> BitConfig | None:
        """The active configuration; None if the network runs in floating point."""
        active = {path: layer.bits for path, layer in self.quantized_layers.items()}
        chosen = {path: bits for path, bits in active.items() if bits is not None}
        return BitConfig(chosen) if chosen else None

    def resolve_bits(self, request: Request) -> BitConfig | None:
        """The configuration that `set_bits(request)` would make active, without doing so.

        Raises:
            BitsError: as `set_bits`.
        """
        return None if request is None else self._resolve(request, self.candidates)

    def _resolve(
        self, request: BitsLike | Mapping[str, BitsLike], candidates: dict[str, LayerCandidates]
    ) -> BitConfig:
        if isinstance(request, BitConfig):
            return resolve(request, candidates, partial=False)
        if isinstance(request, Mapping):
            return resolve(request, candidates)
        if isinstance(request, str) and request in self.configs:
            return resolve(self.configs[request], candidates, partial=False)
        try:
            return uniform(request, candidates)
        except BitsError as error:
            if not isinstance(request, str) or not self.configs:
                raise
            msg = f"{error}; or name one of the stored configurations: {shorten(self.configs)}"
            raise BitsError(msg) from error

    def set_bits(self, request: Request) -> None:
        """Switch the precision of the network, at once and without touching a weight.

        Args:
            request: `4` (every layer W4A4), `(4, 8)` or `"W4A8"` (weight and activation bits), a `BitConfig`, a
                mapping from layer paths or patterns to any of these, the name of a stored configuration, or None
                (floating point). A layer that lacks a uniform bit-width takes its next higher candidate; layers
                that a mapping does not name take their highest.

        Raises:
            BitsError: A bit-width, path or pattern does not fit; the precision stays as it was.
            NotCalibratedError: Activation step sizes have not been calibrated.
            PackedError: None was asked of a packed network, which has no float weights.

        Example:
            >>> import timm, torch, anyprec
            >>> model = anyprec.convert(timm.create_model("test_resnet"))
            >>> anyprec.calibrate(model, [torch.randn(8, 3, 160, 160)])
            >>> model.set_bits({"layer1.*": (6, 8), "fc": 8})
            >>> model.set_bits(None)
        """
        layers = self.quantized_layers
        if request is None:
            require_latents(self, purpose="set_bits(None)")
            self._switch(dict.fromkeys(layers), layers)
            return
        config = self._resolve(request, {path: layer.candidates for path, layer in layers.items()})
        _require_calibrated(layers)
        self._switch(config, layers)

    @contextmanager
    def using_bits(self, request: Request) -> Iterator[None]:
        """Switch for the length of a `with` block; the precision before is restored, also after an exception.

        Raises:
            BitsError, NotCalibratedError: as `set_bits`.
        """
        before = {path: layer.bits for path, layer in self.quantized_layers.items()}
        self.set_bits(request)
        try:
            yield
        finally:
            self._switch(before, self.quantized_layers)

    def summary(self) -> Summary:
        """A table of every Conv and Linear layer: candidates, active precision, MACs, and why if not quantized."""
        return Summary(type(self).original_class.__name__, self._summary_rows())

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,  # noqa: FBT001, FBT002 (the signature of nn.Module)
        assign: bool = False,  # noqa: FBT001, FBT002
    ) -> Any:
        """Load a state dict of this converted network, or one of the float network that it was made from.

        A float state dict has none of our keys. Then weight step sizes and norm copies start anew from the loaded
        values, and activations must be calibrated again.

        Raises:
            RuntimeError: as `nn.Module.load_state_dict`.
            PackedError: The network is packed, and the state dict is not that of a packed one.
        """
        if not any(PACKED in key.split(".") for key in state_dict):
            require_latents(self, purpose="load_state_dict")
        own = self._own_keys()
        if strict is False or not own or any(key in own for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        present = self.state_dict()
        result = super().load_state_dict(
            {**state_dict, **{key: present[key] for key in own}}, strict, assign
        )
        self._restart_from_float()
        return result

    def float_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the float network, for timm or torch: the present weights without anything of ours.

        Norms have the parameters and statistics that serve bits None. The tensors are those of the network, as in
        `state_dict()`.

        Raises:
            PackedError: The network is packed.
        """
        require_latents(self, purpose="float_state_dict")
        own = self._own_keys()
        return {key: value for key, value in self.state_dict().items() if key not in own}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay, for timm: the network's own and ours.

        Ours are step sizes and norm copies.
        """
        names = undecayed_parameters(self)
        original = getattr(super(), "no_weight_decay", None)
        if original is not None:
            names.update(original())
        return names

    def train(self, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 (the signature of nn.Module)
        """Set training mode.

        Raises:
            PackedError: The network is packed, and `mode` is True.
        """
        if mode:
            require_latents(self, purpose="train")
        return super().train(mode)

    def _own_keys(self) -> set[str]:
        prefixes = []
        for path, module in self.named_modules(remove_duplicate=False):
            if isinstance(module, QuantizedLayer):
                prefixes += [
                    f"{path}.{part}." for part in ("weight_quantizer", "input_quantizer", PACKED)
                ]
            elif isinstance(module, SwitchableNorm) and module.bank is not None:
                prefixes.append(f"{path}.bank.")
        return {key for key in self.state_dict() if key.startswith(tuple(prefixes))}

    @torch.no_grad()
    def _restart_from_float(self) -> None:
        layers = self.quantized_layers
        self._switch(dict.fromkeys(layers), layers)
        for layer in layers.values():
            layer.weight_quantizer.initialize(layer.weight)
            layer.input_quantizer.forget()
        for path in self.anyprec_record.norms:
            norm = self.get_submodule(path)
            if isinstance(norm, SwitchableNorm) and norm.bank is not None:
                norm.bank.copy_from(norm)
        self.anyprec_record.statistics.clear()

    def _switch(
        self, bits: Mapping[str, Bits | None], layers: Mapping[str, QuantizedLayer]
    ) -> None:
        for path, layer in layers.items():
            layer.switch(bits[path])
        record = self.anyprec_record
        active = {path: value for path, value in bits.items() if value is not None}
        own = record.statistics.get(BitConfig(active), {}) if active and record.statistics else {}
        width = self._uniform_width(active, layers)
        for path, feeding in record.norms.items():
            norm = _submodule_or_none(self, path)
            if isinstance(norm, SwitchableNorm):
                row = norm_row(layers.get(feeding or ""), record.settings.norm) if active else None
                known = norm.bank is not None and norm.bank.has_uniform
                norm.switch(row, _to_device_of(norm, own.get(path)), width=width if known else None)

    def _uniform_width(
        self, active: Mapping[str, Bits], layers: Mapping[str, QuantizedLayer]
    ) -> int | None:
        """The bit-width at which every layer is, as far as its candidates allow; None if there is no such one."""
        if not active:
            return None
        width = min(bits.weight for bits in active.values())
        if width != min(bits.activation for bits in active.values()):
            return None
        wanted = Bits(width, width)
        fits = all(
            bits == layers[path].candidates.at_least(wanted) for path, bits in active.items()
        )
        return width if fits else None

    def forget_statistics(self) -> None:
        """Drop norm statistics that belong to single configurations: the weights are others now."""
        self.anyprec_record.statistics.clear()
        for path in self.anyprec_record.norms:
            norm = _submodule_or_none(self, path)
            if isinstance(norm, SwitchableNorm) and norm.bank is not None:
                norm.bank.forget_uniform()

    def _summary_rows(self) -> tuple[SummaryRow, ...]:
        layers = self.quantized_layers
        facts = self.anyprec_record.facts.layers
        return tuple(
            SummaryRow(
                path=row.path,
                kind=row.kind,
                macs=facts[row.path].macs if row.path in facts else 0,
                weights=facts[row.path].weights if row.path in facts else 0,
                candidates=layers[row.path].candidates if row.path in layers else None,
                input_kind=layers[row.path].input_quantizer.kind if row.path in layers else "",
                bits=layers[row.path].bits if row.path in layers else None,
                floor=self.anyprec_record.frozen.get(row.path),
                reason=row.reason,
            )
            for row in self.coverage
        )


class ConvertedClassifier(ConvertedModel):
    """A converted network that, like timm's, can exchange its classifier."""

    class_prefix: ClassVar[str] = "AnyPrecision"

    def reset_classifier(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network's own `reset_classifier`, and quantize the new classifier as the old one was.

        Step sizes of its input are kept where the layer reads the same features; the network runs in floating
        point afterwards, and named configurations are dropped if the set of layers changed.
        """
        before = self.quantized_layers
        self._switch(dict.fromkeys(before), before)
        result = super().reset_classifier(*args, **kwargs)  # type: ignore[misc]  # the network's own class has it
        self._adopt_replacements(before)
        return result

    def _adopt_replacements(self, before: Mapping[str, QuantizedLayer]) -> None:
        record = self.anyprec_record
        rows = {row.path: row for row in record.coverage}
        for path, old in {**record.removed, **before}.items():
            new = _submodule_or_none(self, path)
            if new is old:
                continue
            if isinstance(new, LAYER_TYPES):
                kind = type(new).__name__
                _quantize_like(new, old)
                record.removed.pop(path, None)
                rows[path] = Coverage(path, kind, "quantized")
                record.facts.layers[path] = _facts_like(
                    record.facts.layers[path], new.weight.numel()
                )
            else:
                record.removed[path] = old
                rows.pop(path, None)
        if set(rows) != {row.path for row in record.coverage}:
            record.configs.clear()
            record.statistics.clear()
            record.frozen = {path: floor for path, floor in record.frozen.items() if path in rows}
        record.coverage = tuple(rows.values())


def _to_device_of(norm: SwitchableNorm, statistics: Statistics | None) -> Statistics | None:
    if statistics is None:
        return None
    mean, variance = statistics
    return mean.to(norm.running_mean), variance.to(norm.running_var)


def require_converted(model: nn.Module, *, purpose: str) -> ConvertedModel:
    """`model`, if it was made by `convert`.

    Raises:
        ConversionError: It was not, or it is a wrapper (`DataParallel`, `torch.compile`) around
            one.
    """
    if isinstance(model, ConvertedModel):
        return model
    inner = _converted_inside(model)
    if inner is not None:
        msg = f"{purpose} needs the converted model itself, got a {type(model).__name__} around it: "
        msg += f"pass its `.{inner}`, the network as it was before it was wrapped"
        raise ConversionError(msg)
    msg = f"{purpose} needs a converted model, got {type(model).__name__}: call anyprec.convert(model) first"
    raise ConversionError(msg)


def _converted_inside(model: object) -> str | None:
    """Path of the first converted model inside `model`, if there is one."""
    if not isinstance(model, nn.Module):
        return None
    for path, module in model.named_modules():
        if isinstance(module, ConvertedModel):
            return path
    return None


def require_latents(model: ConvertedModel, *, purpose: str) -> None:
    """Refuse a packed network.

    Raises:
        PackedError: It is one.
    """
    if model.is_packed:
        msg = f"{purpose} needs latent weights; {NO_LATENTS}"
        raise PackedError(msg)


def _facts_like(old: LayerFacts, weights: int) -> LayerFacts:
    """Facts of a new classifier: its MACs are to the old ones as its weights are."""
    return dataclasses.replace(old, weights=weights, macs=old.macs * weights // old.weights)


def _quantize_like(new: nn.Module, old: QuantizedLayer) -> None:
    nonnegative = old.input_quantizer.nonnegative
    quantize_layer(new, old.candidates, nonnegative=nonnegative, axis=old.weight_quantizer.axis)
    if isinstance(new, QuantizedLayer) and old.weight.shape[1:] == new.weight.shape[1:]:
        new.input_quantizer.load_state_dict(old.input_quantizer.state_dict())


def require_calibrated(model: ConvertedModel) -> None:
    """Refuse a network without activation step sizes.

    Raises:
        NotCalibratedError: It has none.
    """
    _require_calibrated(model.quantized_layers)


def _require_calibrated(layers: Mapping[str, QuantizedLayer]) -> None:
    missing = [path for path, layer in layers.items() if not layer.input_quantizer.calibrated]
    if missing:
        msg = f"{len(missing)} of {len(layers)} layers have no activation step sizes yet ({shorten(missing, 3)}): call "
        msg += "anyprec.calibrate(model, loader) before a precision is set"
        raise NotCalibratedError(msg)


def _submodule_or_none(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        if module is not None:  # not by get_submodule, which takes most of the time of set_bits
            module = module._modules.get(name)  # noqa: SLF001 (named_children would make a list of all)
    return module


def _known_paths(
    lowest: Mapping[str, BitsLike], candidates: Mapping[str, LayerCandidates]
) -> Mapping[str, BitsLike]:
    for path in lowest:
        if path not in candidates:
            msg = f"no quantized layer {path!r} that could have a floor; layers are {shorten(candidates)}"
            raise BitsError(msg)
    return lowest
