"""What a converted model can do: switch its precision, describe itself, load float weights.

`conversion.py` gives the user's model a class derived from its own and `ConvertedModel`. Nothing
here looks at data or at the graph. How layers and norms are switched is in `switching.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig, Bits, BitsLike, LayerCandidates, resolve, shorten
from anyprec.errors import BitsError, ConversionError, PrecisionError
from anyprec.model.blocks import INTERLEAVED
from anyprec.model.checks import require_calibrated, require_latents
from anyprec.model.intact import Structure, parts_of, require_intact
from anyprec.model.precision import ActivePrecision
from anyprec.model.record import ConversionRecord, Coverage
from anyprec.model.state_dicts import added_keys, restart_from_float
from anyprec.model.summary import Summary, output_row, summary_row
from anyprec.model.switchboard import switchboard_of
from anyprec.model.switching import switch, switch_to_float
from anyprec.model.views import PRESENT, Present, make_view
from anyprec.nn.layers import PACKED, QuantizedLayer
from anyprec.nn.specialize import Specialized
from anyprec.nn.undecayed import undecayed_parameters
from anyprec.nn.weights import PackedCodes

BitsRequest = BitsLike | Mapping[str, BitsLike] | None
"""What `set_bits` takes: see `ConvertedModel.set_bits`."""


class ConvertedModel(Specialized):
    """Mixin of a converted network, which keeps its own class, methods and parameter names.

    Only what users call is a method here, since each name could hide one of the network's own.
    """

    class_prefix: ClassVar[str] = "AnyPrecision"

    _anyprec_added: ClassVar[tuple[str, ...]] = (
        "anyprec_record",
        "anyprec_structure",
        "anyprec_precision",
    )
    _anyprec_extended: ClassVar[tuple[str, ...]] = ("no_weight_decay",)

    anyprec_record: ConversionRecord
    anyprec_structure: Structure
    anyprec_precision: ActivePrecision

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network.

        Raises:
            ConversionError: A precision is set, but a layer or norm was replaced or removed.
            PrecisionError: Another thread or task has set a precision for the length of a block.
        """
        # Not by `forward`, whose signature tracers and trainers read.
        if not torch.compiler.is_compiling() and "_is_replica" not in vars(self):
            require_intact(self)
            self.anyprec_precision.before_forward(self)
        return super().__call__(*args, **kwargs)

    @property
    def quantized_layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by path, in network order.

        Raises:
            ConversionError: A layer or norm was replaced or removed after conversion.
        """
        return dict(parts_of(self).layers)

    @property
    def is_packed(self) -> bool:
        """Whether it holds integer codes instead of latent weights (loaded from a packed file)."""
        layers = self.quantized_layers.values()
        return any(isinstance(layer.weight_source, PackedCodes) for layer in layers)

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """What became of every layer of the float network that multiplies its input by a weight."""
        return self.anyprec_record.coverage

    @property
    def configs(self) -> dict[str, BitConfig]:
        """Named configurations. Add your own: `save` keeps them, `set_bits` takes their names."""
        return self.anyprec_record.configs

    @property
    def candidates(self) -> dict[str, LayerCandidates]:
        """The bit-widths that each quantized layer may take, by path."""
        return dict(switchboard_of(self).candidates)

    @property
    def current_candidates(self) -> dict[str, LayerCandidates]:
        """The candidates of each quantized layer without the frozen ones."""
        candidates = self.candidates
        for path, lowest in self.anyprec_record.frozen.items():
            candidates[path] = candidates[path].above(lowest)
        return candidates

    @property
    def frozen(self) -> dict[str, Bits]:
        """The lowest precision in training and search, of layers whose lower ones are frozen."""
        return dict(self.anyprec_record.frozen)

    def freeze(self, lowest: Mapping[str, BitsLike]) -> None:
        """Freeze the candidates below these precisions: training and search use only the others.

        The bit-width scheduler does this during training; what it froze last stays with the model
        and its file. `set_bits` still takes every candidate, since a frozen one has its step sizes
        all the same.

        Args:
            lowest: Path of a layer to its lowest precision in use. It replaces all earlier ones;
                `{}` frees all.

        Raises:
            BitsError: No layer has that path, or a bit-width is not among its candidates; nothing
                is changed.
        """
        candidates = self.candidates
        for path in lowest:
            if path not in candidates:
                msg = f"no quantized layer {path!r} to freeze candidates of; layers are "
                msg += shorten(candidates)
                raise BitsError(msg)
        checked = resolve(lowest, candidates)
        frozen: dict[str, Bits] = {}
        for path in lowest:
            if checked[path] != candidates[path].lowest:
                frozen[path] = checked[path]
        # Only now, since `lowest` may be this very dictionary.
        self.anyprec_record.frozen.clear()
        self.anyprec_record.frozen.update(frozen)

    @property
    def bits(self) -> BitConfig | None:
        """The active configuration; None if the network runs in floating point."""
        active: dict[str, Bits] = {}
        for path, layer in self.quantized_layers.items():
            if layer.bits is not None:
                active[path] = layer.bits
        return BitConfig(active) if active else None

    def resolve_bits(self, request: BitsRequest) -> BitConfig | None:
        """The configuration that `set_bits(request)` would make active, without doing so.

        Raises:
            BitsError: as `set_bits`.
        """
        return None if request is None else switchboard_of(self).resolve(request, self.configs)

    def set_bits(self, request: BitsRequest) -> None:
        """Switch the precision of the network, at once and without touching a weight.

        The precision belongs to the model and not to a thread: threads use `using_bits`, or each
        its own `view`. A backward pass that runs layers again (gradient checkpointing) runs them at
        the precision of their forward pass, whatever was set since.

        Args:
            request: `4` (every layer W4A4), `(4, 8)` or `"W4A8"` (weight and activation bits), a
                `BitConfig`, a mapping from layer paths or patterns to any of these, the name of a
                stored configuration, or None (floating point). A layer that lacks a uniform
                bit-width takes its next higher candidate; layers that a mapping does not name take
                their highest.

        Raises:
            BitsError: A bit-width, path or pattern does not fit; the precision stays as it was.
            NotCalibratedError: Activation step sizes have not been calibrated.
            PackedError: None was asked of a packed network, which has no float weights.
            PrecisionError: Another thread or task is inside a `using_bits` block, or a backward
                pass is running.

        Example:
            >>> import timm, torch, anyprec
            >>> model = anyprec.convert(timm.create_model("test_resnet"))
            >>> anyprec.calibrate(model, [torch.randn(8, 3, 160, 160)])
            >>> model.set_bits({"layer1.*": (6, 8), "fc": 8})
            >>> model.set_bits(None)
        """
        self.anyprec_precision.require_switchable()
        if request is None:
            require_latents(self, purpose="set_bits(None)")
            switch_to_float(self)
            return
        # Everything that can fail comes before the switch.
        board = switchboard_of(self)
        config = board.resolve(request, self.configs)
        if not board.is_calibrated:
            require_calibrated(self)
        switch(self, config)

    @contextmanager
    def using_bits(self, request: BitsRequest) -> Iterator[None]:
        """Switch for a `with` block; the precision before is restored, also after an exception.

        Blocks of several threads take turns: each waits until no other thread has one open. To run
        several precisions at a time, give each thread its own `view`.

        Raises:
            BitsError, NotCalibratedError, PackedError: as `set_bits`.
            PrecisionError: Another task of this thread opened a block inside this one, and it is
                still open: some of what ran here may have run at its precision.
        """
        precision = self.anyprec_precision
        block = precision.open_block(self)
        in_order = True
        try:
            self.set_bits(request)
            yield
        finally:
            in_order = precision.close_block(self, block)
        if not in_order:
            raise PrecisionError(INTERLEAVED)

    def view(self, bits: BitsRequest | Present = PRESENT) -> ConvertedModel:
        """A second model object with the same weights, and a precision of its own.

        Every parameter and buffer is that of this network, and so is what belongs to them: step
        sizes, norm statistics, named configurations, quantized weights that are kept. Training,
        calibrating or loading one of them changes all. Precision, training mode, hooks and plain
        attributes are each view's own, as they were in this network when it was made. So views can
        run in several threads at a time; all else that changes the network cannot.

        Replacing a module of one of them is not seen by the others. `copy.deepcopy`, pickling and
        `save` treat a view as a network of its own. What was compiled with `model.compile()` is not
        compiled in a view; `torch.compile(view)` is a program of its own. On a GPU, run each view
        once before threads use it in CUDA streams of their own.

        Args:
            bits: As for `set_bits`; by default the present precision.

        Raises:
            BitsError, NotCalibratedError, PackedError: as `set_bits`.
            ConversionError: An attribute cannot be copied, or is a function that holds on to a
                layer, so that it would run that layer at the precision of this model.

        Example:
            >>> import timm, torch, anyprec
            >>> model = anyprec.convert(timm.create_model("test_resnet").eval(), bits=(2, 4, 8))
            >>> anyprec.calibrate(model, [torch.randn(8, 3, 160, 160)])
            >>> views = {bits: model.view(bits) for bits in (2, 4, 8)}
            >>> low = views[2]  # each in a thread of its own, say
            >>> output = low(torch.randn(1, 3, 160, 160))
        """
        if isinstance(bits, Present):
            self.anyprec_precision.blocks.require_turn("view()")
            return make_view(self)
        request = self.resolve_bits(bits)
        made = make_view(self)
        made.set_bits(request)
        return made

    def summary(self) -> Summary:
        """A table of every Conv and Linear layer, and of values between layers.

        It shows candidates, active precision and MACs, and why a layer is not quantized. With
        `placement="integer"` a second table has the values between layers that are quantized.
        """
        record, parts = self.anyprec_record, parts_of(self)
        rows = [summary_row(row, record, parts.layers.get(row.path)) for row in record.coverage]
        outputs = []
        for facts in record.facts.outputs:
            owner = parts.owners[facts.owner]
            quantizer = parts.outputs[facts.path]
            outputs.append(output_row(facts, quantizer, active=owner.quantizes_outputs))
        return Summary(type(self).original_class.__name__, tuple(rows), tuple(outputs))

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,  # noqa: FBT001, FBT002 (the signature of nn.Module)
        assign: bool = False,  # noqa: FBT001, FBT002
        **kwargs: Any,
    ) -> Any:
        """Load a state dict of this network, or of the float network that it was made from.

        A float state dict has none of our keys. Then weight step sizes and norm copies start anew
        from the loaded values, and activations must be calibrated again. Further arguments are for
        a `load_state_dict` of the network's own.

        Raises:
            RuntimeError: as `nn.Module.load_state_dict`.
            PackedError: The network is packed, and the state dict is not that of a packed one.
        """
        if not any(PACKED in key.split(".") for key in state_dict):
            require_latents(self, purpose="load_state_dict")
        # By name, and only what was asked for: the network's own method may take less.
        if not strict:
            kwargs["strict"] = strict
        if assign:
            kwargs["assign"] = assign
        added = added_keys(self)
        is_float = bool(added) and added.isdisjoint(state_dict)
        if not (strict and is_float):
            return super().load_state_dict(state_dict, **kwargs)
        # With our keys at their present values, torch still names every key of the float network
        # that is missing or unknown.
        present = self.state_dict()
        completed = dict(state_dict)
        for key in added:
            completed[key] = present[key]
        result = super().load_state_dict(completed, **kwargs)
        restart_from_float(self)
        return result

    def float_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the float network, for timm or torch: the present weights alone.

        Norms have the parameters and statistics that serve bits None. The tensors are those of the
        network, as in `state_dict()`.

        Raises:
            PackedError: The network is packed.
        """
        require_latents(self, purpose="float_state_dict")
        added = added_keys(self)
        return {key: value for key, value in self.state_dict().items() if key not in added}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay, for timm: the network's own and ours.

        Ours are step sizes and norm copies.
        """
        names = undecayed_parameters(self)
        original = getattr(super(), "no_weight_decay", None)
        if original is not None:
            names.update(original())
        return names

    def train(self, mode: bool = True, **kwargs: Any) -> Any:  # noqa: FBT001, FBT002 (as nn.Module)
        """Set training mode; further arguments are for a `train` of the network's own.

        Raises:
            PackedError: The network is packed, and `mode` is True.
        """
        if mode:
            require_latents(self, purpose="train")
        return super().train(mode, **kwargs)


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
        msg = f"{purpose} needs the converted model itself, got a {type(model).__name__} around "
        msg += f"it: pass its `.{inner}`, the network as it was before it was wrapped"
        raise ConversionError(msg)
    msg = f"{purpose} needs a converted model, got {type(model).__name__}: call "
    msg += "anyprec.convert(model) first"
    raise ConversionError(msg)


def _converted_inside(model: object) -> str | None:
    """Path of the first converted model inside `model`, if there is one."""
    if not isinstance(model, nn.Module):
        return None
    paths = (path for path, module in model.named_modules() if isinstance(module, ConvertedModel))
    return next(paths, None)
