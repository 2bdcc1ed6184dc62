"""Claims that an input is never negative: true ones are made, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyprec.network import signs
from anyprec.network.analysis import analyze

Operation = Callable[["Between", Tensor, Tensor], Any]


class Flipping(torch.autograd.Function):
    """Changes the sign of its input in place, where no function of torch shows it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.mark_dirty(values)
        return values.neg_()


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, values: Tensor) -> Tensor:
        return values.sigmoid()


def _in_place(_result: object) -> None:
    """For an operation of which only the effect on `y` counts."""


class Between(nn.Module):
    """Applies an operation to two never negative values, before a layer."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
        self.layer = nn.Conv2d(4, 4, 1)
        self.factor = nn.Parameter(torch.tensor(-2.0))
        self.register_buffer("shift", torch.tensor([-3.0]))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        y, z = F.elu(self.left(x)).relu(), self.right(x).relu_()
        result = self.operation(self, y, z)
        self.seen = y if result is None else result
        return self.layer(self.seen)


def claim_and_minimum(operation: Operation) -> tuple[bool, float]:
    model = Between(operation).eval()
    images = torch.randn(3, 2, 6, 6)
    claimed = analyze(model, images).layers["layer"].nonnegative
    with torch.no_grad():
        model(images)
    return claimed, float(model.seen.min())


TURNING_NEGATIVE: dict[str, Operation] = {
    # by an argument
    "subtracting by alpha": lambda _m, y, z: y.add(z, alpha=-2),
    "addcmul": lambda _m, y, z: torch.addcmul(y, z, z + 1, value=-1),
    "other by keyword": lambda _m, y, z: torch.mul(y + 1, other=-0.25),
    "padding": lambda _m, y, z: F.pad(y, (2, 0), value=-0.5),
    "a padding module": lambda _m, y, z: nn.ConstantPad2d(1, -3.0)(y),
    "divisor": lambda _m, y, z: F.avg_pool2d(y + 1, 2, divisor_override=-2),
    "upper limit": lambda _m, y, z: y.clamp(0.5, -0.5),
    "upper limit as tensor": lambda _m, y, z: torch.clamp(y, max=torch.tensor(-0.1)),
    "hardtanh": lambda _m, y, z: F.hardtanh(y - 2),
    "threshold": lambda _m, y, z: F.threshold(y, 0.2, -0.2),
    "softplus of negative beta": lambda _m, y, z: F.softplus(y, beta=-2),
    "softplus below threshold": lambda _m, y, z: F.softplus(y - 1, threshold=-30),
    "bicubic": lambda _m, y, z: F.interpolate(y, scale_factor=3, mode="bicubic"),
    "extrapolation": lambda _m, y, z: torch.lerp(y, z, 3.0),
    "filling": lambda _m, y, z: torch.where(y > 0.3, y, -0.3),
    "odd power": lambda _m, y, z: (y - 1) ** 3,
    "leaky": lambda _m, y, z: F.leaky_relu(y - 1),
    "learned factor": lambda m, y, z: y * m.factor,
    "learned number": lambda m, y, z: y * m.factor.item(),
    "buffer": lambda m, y, z: y + m.shift,
    "integers that overflow": lambda _m, y, z: (y * 1e10).int().float(),
    "bits read as another dtype": lambda _m, y, z: (
        (y + 1).view(torch.int32).bitwise_not().view(torch.float32)
    ),
    "bytes read as another dtype": lambda _m, y, z: _as_half(y + 1),
    "a constant that others change": lambda _m, y, z: y * _changed_outside(torch.ones(1)),
    # in place
    "sub_": lambda _m, y, z: y.sub_(1),
    "operator": lambda _m, y, z: y.__isub__(z + 1),
    "part": lambda _m, y, z: _in_place(y.narrow(1, 1, 2).neg_()),
    "rectified in part": lambda _m, y, z: _rectified_in_part(y - 1),
    "split": lambda _m, y, z: _in_place([part.sub_(1) for part in y.split(1, dim=1)]),
    "permuted": lambda _m, y, z: _in_place(y.permute(1, 0, 3, 2).sub_(1)),
    "strided": lambda _m, y, z: _in_place(y.as_strided((4,), (3,)).fill_(-7)),
    "index": lambda _m, y, z: y.__setitem__((0, slice(None), 0), -1.0),
    "mask": lambda _m, y, z: _in_place(y.masked_fill_(y > 0.1, -1.0)),
    "copy_": lambda _m, y, z: y.copy_(z.neg()),
    "out": lambda _m, y, z: torch.sub(z, 1.0, out=y),
    "out of a part": lambda _m, y, z: _in_place(torch.neg(z[:2] + 1, out=y[:2])),
    "data": lambda _m, y, z: _in_place(y.data.sub_(2)),
    "detached": lambda _m, y, z: _in_place(y.detach().mul_(-1)),
    "other storage": lambda _m, y, z: setattr(y, "data", z - 1),
    "set_": lambda _m, y, z: _in_place(y.set_(z - 1)),
    "numpy": lambda _m, y, z: _in_place(np.negative(y.numpy(), out=y.numpy())),
    "dlpack": lambda _m, y, z: _in_place(torch.from_dlpack(y).sub_(1)),
    "storage": lambda _m, y, z: _in_place(y.untyped_storage().fill_(0xC0)),
    "custom function": lambda _m, y, z: _in_place(Flipping.apply(y)),
    "several at once": lambda _m, y, z: _in_place(torch._foreach_neg_([y, z])),
    "random": lambda _m, y, z: y.uniform_(-1, 1),
    "negative view": lambda _m, y, z: torch._neg_view(y),
    # what depends on the data
    "a number that decides": lambda _m, y, z: y - 1 if y.sum() > 0 else y,
}


def _as_half(y: Tensor) -> Tensor:
    return y.view(torch.float16)[..., :6].nan_to_num(0, 0).float()


def _changed_outside(constant: Tensor) -> Tensor:
    constant.numpy()[0] = -1
    return constant


def _rectified_in_part(y: Tensor) -> Tensor:
    y[:, :2].relu_()
    return y


@pytest.mark.parametrize("name", TURNING_NEGATIVE)
def test_what_can_make_a_value_negative_ends_the_claim(name: str) -> None:
    claimed, lowest = claim_and_minimum(TURNING_NEGATIVE[name])
    assert lowest < 0
    assert not claimed


STAYING: dict[str, Operation] = {
    "view": lambda _m, y, z: y.transpose(2, 3).contiguous(),
    "sum": lambda _m, y, z: torch.add(y, z, alpha=3),
    "sum in place": lambda _m, y, z: y.add_(z),
    "gate": lambda _m, y, z: y * F.hardsigmoid((y - z).mean((2, 3), keepdim=True)),
    "custom function": lambda _m, y, z: y * Gate.apply(z - 1),
    "concatenation": lambda _m, y, z: torch.cat((y[:, :2], z[:, 2:]), 1),
    "padding": lambda _m, y, z: F.pad(y, (1, 2), value=0.5),
    "circular padding": lambda _m, y, z: F.pad(y, (1, 1, 1, 1), mode="circular"),
    "max pooling": lambda _m, y, z: F.max_pool2d(y, 3, 1, 1),
    "average pooling": lambda _m, y, z: F.adaptive_avg_pool2d(y, 2),
    "bilinear": lambda _m, y, z: F.interpolate(y, scale_factor=2, mode="bilinear"),
    "clamp": lambda _m, y, z: (y - 1).clamp(0, 6),
    "clamp in place": lambda _m, y, z: (y - 1).clamp_(min=torch.tensor(0.0)),
    "hardtanh": lambda _m, y, z: F.hardtanh(y - 1, 0.0, 6.0),
    "rectified in part": lambda _m, y, z: _in_place(y[:, :1].relu_()),
    "negated and rectified": lambda _m, y, z: y.neg_().add_(0.2).relu_(),
    "filled": lambda _m, y, z: _filled(y, z),
    "normalised": lambda _m, y, z: F.normalize(y, dim=1),
    "attention": lambda _m, y, z: F.scaled_dot_product_attention(y - z, z - y, y),
    "softmax": lambda _m, y, z: (y - z).softmax(1),
    "even power": lambda _m, y, z: (y - z) ** 2,
    "masked": lambda _m, y, z: y * (z > 0.1),
    "lower precision": lambda _m, y, z: y.to(torch.bfloat16).float(),
    "a list summed": lambda _m, y, z: sum([y, z]),
    "in inference mode": lambda _m, y, z: _in_inference_mode(y),
    "a constant read": lambda _m, y, z: y * torch.tensor([2.0]).item(),
    "dropout": lambda _m, y, z: F.dropout(y, training=False),
}


def _filled(y: Tensor, z: Tensor) -> Tensor:
    result = y.new_zeros(y.shape)
    result[:, :2] = z[:, :2]
    result[:, 2:] += y[:, 2:]
    return result


def _in_inference_mode(y: Tensor) -> Tensor:
    with torch.inference_mode():
        padded = F.pad(y, (1, 1, 1, 1))
    return padded.clone()


@pytest.mark.parametrize("name", STAYING)
def test_what_keeps_signs_keeps_the_claim(name: str) -> None:
    claimed, lowest = claim_and_minimum(STAYING[name])
    assert lowest >= 0
    assert claimed


def test_a_network_without_a_graph_has_claims_as_long_as_no_number_has_left_it() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x).relu()).relu()
            if y.max() > 1e6:
                y = -y
            return self.c(y)

    layers = analyze(Asking(), torch.randn(2, 4)).layers
    assert [path for path, layer in layers.items() if layer.nonnegative] == ["b"]


def test_a_layer_that_is_called_twice_is_claimed_only_if_both_inputs_are() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.both, self.one = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return self.both(self.both(y).relu()) + self.one(y) + self.one(y - 1)

    layers = analyze(Shared(), torch.randn(2, 4)).layers
    assert [path for path, layer in layers.items() if layer.nonnegative] == ["both"]


def test_every_operation_of_the_table_exists_with_the_arguments_that_it_names() -> None:
    for operation, names in signs._KEEPING.items():
        arguments: set[str] = set()
        for form in (operation, f"{operation}_"):
            packet = getattr(torch.ops.aten, form, None)
            for overload in packet.overloads() if packet else ():
                schema = getattr(packet, overload)._schema
                arguments.update(argument.name for argument in schema.arguments)
        assert set(names) <= arguments, operation


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_what_a_scripted_function_does_is_seen() -> None:
    rectifying = torch.jit.script(shifted_and_clamped)
    claimed, lowest = claim_and_minimum(lambda _m, y, z: rectifying(y - z))
    assert lowest >= 0
    assert claimed
    lowering = torch.jit.script(lowered)
    claimed, lowest = claim_and_minimum(lambda _m, y, _z: _in_place(lowering(y)))
    assert lowest < 0
    assert not claimed


def shifted_and_clamped(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


def lowered(x: Tensor) -> Tensor:
    return x.sub_(1)
