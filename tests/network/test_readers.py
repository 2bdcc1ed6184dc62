"""Every parameter of two or more axes that something reads is a row, however it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import anyprec
from anyprec.model.costing import cost_model
from anyprec.network.readers import Readers, function_name

TOKENS, WIDTH = 6, 8


class Using(nn.Module):
    """A module of bare parameters that a function uses."""

    def __init__(self, use: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.use = use
        self.weights = nn.ParameterList([torch.randn(shape) * 0.3 for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, *self.weights)


class Network(nn.Module):
    """Layers around what is tested."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem, self.middle = nn.Linear(WIDTH, WIDTH), middle
        self.joint, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(torch.tanh(self.stem(x)))
        return self.head(torch.relu(self.joint(y[0] if isinstance(y, tuple) else y)))


class Stepping(nn.Module):
    """A recurrent cell, token by token."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for token in x.unbind(1):
            state = self.cell(token, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


class Borrowing(nn.Module):
    """Uses the weight of a layer that it does not call."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


class Adapted(nn.Linear):
    """A layer with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.down = nn.Parameter(torch.randn(2, WIDTH) * 0.3)
        self.up = nn.Parameter(torch.randn(WIDTH, 2) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, self.down) @ self.up.t()


class Merged(Adapted):
    """The adapter is added to the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


class LowRank(nn.Module):
    """An adapter as a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, WIDTH) * 0.3)
        self.up = nn.Parameter(torch.randn(WIDTH, 2) * 0.3)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


class Bilinear(nn.Bilinear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


class Deformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(WIDTH, 18, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2)[..., None]
        return self.conv(image, self.offsets(image))[..., 0].transpose(1, 2)


class Own(torch.autograd.Function):
    """A function of the user's own."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight.exp()


def _convolution(x: Tensor, weight: Tensor) -> Tensor:
    settings = ([1], [1], [1], False, [0], 1)
    return torch.ops.aten.convolution(x.mT, weight, None, *settings).mT


def _grouped(x: Tensor, experts: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    ends = torch.tensor([len(tokens) // 3, len(tokens)], dtype=torch.int32)
    return F.grouped_mm(tokens, experts, offs=ends).view_as(x)


def _batch_sum(x: Tensor, weight: Tensor) -> Tensor:
    return x + torch.addbmm(torch.zeros(1), x, weight.expand(len(x), -1, -1)) / len(x)


def _each(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, sample by sample."""
    return lambda x, *weights: torch.stack([function(sample, *weights) for sample in x])


def _parametrized() -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", LowRank())
    return layer


SQUARE = (WIDTH, WIDTH)

QUANTIZED: dict[str, Callable[[], nn.Module]] = {
    "tensordot": lambda: Using(lambda x, w: torch.tensordot(x, w, dims=1), SQUARE),
    "tensordot of other axes": lambda: Using(
        lambda x, w: torch.tensordot(x, w, dims=([2], [1])), SQUARE
    ),
    "inner": lambda: Using(torch.inner, SQUARE),
    "multi_dot": lambda: Using(
        _each(lambda x, w, v: torch.linalg.multi_dot([x, w, v])), (WIDTH, 3), (3, WIDTH)
    ),
    "addmv": lambda: Using(_each(_each(lambda x, w: torch.addmv(torch.zeros(1), w, x))), SQUARE),
    "addbmm": lambda: Using(_batch_sum, SQUARE),
    "einsum of numbers": lambda: Using(
        lambda x, w: torch.einsum(x, [0, 1, 2], w, [2, 3], [0, 1, 3]), SQUARE
    ),
    "aten.linear": lambda: Using(torch.ops.aten.linear, SQUARE),
    "aten.mm": lambda: Using(_each(torch.ops.aten.mm.default), SQUARE),
    "aten.convolution": lambda: Using(_convolution, (WIDTH, WIDTH, 3)),
    "conv_tbc": lambda: Using(
        lambda x, w: torch.conv_tbc(x, w, torch.zeros(WIDTH), 1), (3, WIDTH, WIDTH)
    ),
    "deformable convolution": Deformed,
    "bilinear": lambda: Bilinear(WIDTH, WIDTH, WIDTH),
    "GRU": lambda: nn.GRU(WIDTH, WIDTH, batch_first=True),
    "RNN": lambda: nn.RNN(WIDTH, WIDTH, batch_first=True, bidirectional=False),
    "LSTM cell": lambda: Stepping(nn.LSTMCell(WIDTH, WIDTH)),
    "GRU cell": lambda: Stepping(nn.GRUCell(WIDTH, WIDTH)),
    "RNN cell": lambda: Stepping(nn.RNNCell(WIDTH, WIDTH, nonlinearity="relu")),
    "adapter in a layer": Adapted,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral_norm by a hook": lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "low rank as a parametrization": _parametrized,
}
if hasattr(F, "grouped_mm"):
    QUANTIZED["grouped_mm"] = lambda: Using(_grouped, (2, WIDTH, WIDTH))

READ: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "masked": (
        lambda: Using(lambda x, w: F.linear(x, w * torch.ones(SQUARE).tril()), SQUARE),
        "mul",
    ),
    "cast": (lambda: Using(lambda x, w: F.linear(x, w.double().float()), SQUARE), "double"),
    "joined": (
        lambda: Using(lambda x, w: F.linear(x, torch.cat([w, w])), (WIDTH // 2, WIDTH)),
        "cat",
    ),
    "without gradient": (lambda: Using(lambda x, w: F.linear(x, w.detach()), SQUARE), "linear"),
    "added": (lambda: Using(lambda x, w: x + w, (1, TOKENS, WIDTH)), "add"),
    "added in place": (lambda: Using(lambda x, w: x.clone().add_(w), (TOKENS, WIDTH)), "add"),
    "a token": (
        lambda: Using(lambda x, w: torch.cat([w.expand(len(x), -1, -1), x], 1), (1, 1, WIDTH)),
        "cat",
    ),
    "a table": (lambda: Using(lambda x, w: x + w[torch.arange(TOKENS) % 3], (3, WIDTH)), "getitem"),
    "scaled": (lambda: Using(lambda x, w: (x[..., None] * w).sum(-2), SQUARE), "mul"),
    "sum of three": (
        lambda: Using(lambda x, w: torch.einsum("bti,ij,jk->btk", x, w, w), SQUARE),
        "einsum",
    ),
    "distances": (lambda: Using(torch.cdist, SQUARE), "cdist"),
    "embedding": (
        lambda: Using(lambda x, w: x + F.embedding((x[..., 0] > 0).long(), w), (2, WIDTH)),
        "embedding",
    ),
    "embedding bag": (
        lambda: Using(
            lambda x, w: x + F.embedding_bag(torch.zeros(len(x), 2).long(), w)[:, None], (1, WIDTH)
        ),
        "embedding_bag",
    ),
    "norm of two axes": (
        lambda: nn.LayerNorm((TOKENS, WIDTH), bias=False),
        "layer_norm",
    ),
    "keys": (
        lambda: Using(
            lambda x, w: F.scaled_dot_product_attention(x, w.expand(len(x), -1, -1), x),
            (1, TOKENS, WIDTH),
        ),
        "scaled_dot_product_attention",
    ),
    "own function": (lambda: Using(Own.apply, (TOKENS, WIDTH)), "exp"),
    "outside torch": (
        lambda: Using(lambda x, w: x + sum(w.tolist()[0]), SQUARE),
        "tolist",
    ),
    "layer borrowed": (
        lambda: Borrowing(parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))),
        "tril",
    ),
}


def _rows_of(model: anyprec.ConvertedModel, name: str) -> list[str]:
    """Paths of the rows that stand for a parameter."""
    holder, _, leaf = name.rpartition(".")
    paths = []
    for path, facts in model.anyprec_record.facts.layers.items():
        is_weight = holder == path and leaf in ("weight", "weight_orig")
        is_factor = name.startswith(f"{path}.parametrizations.weight.")
        if facts.parameter == name or (facts.parameter is None and (is_weight or is_factor)):
            paths.append(path)
    return paths


def _convert(middle: nn.Module) -> tuple[anyprec.ConvertedModel, Tensor, Tensor]:
    """The network around `middle`, converted; its input, and its output before."""
    network, x = Network(middle).eval(), torch.randn(4, TOKENS, WIDTH)
    names = [name for name, parameter in network.named_parameters() if parameter.ndim > 1]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    with torch.no_grad():
        expected = network(x)
    model = anyprec.convert(network, example_input=x)
    for name in names:
        assert len(_rows_of(model, name)) == 1, name
    costs = cost_model(model)
    assert costs.weights + costs.float_parameters == parameters
    return model, x, expected


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", QUANTIZED)
def test_what_multiplies_an_input_is_quantized_and_its_row_names_it(name: str) -> None:
    torch.manual_seed(0)
    model, x, expected = _convert(QUANTIZED[name]())
    assert {row.status for row in model.coverage} == {"quantized"}
    anyprec.calibrate(model, [x])
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        model.set_bits(8)
        error = (model(x) - expected).norm() / expected.norm()
    # Rounding to 8 bits in four layers, of 1/256 of the range each.
    assert 0 < error < 0.02


@pytest.mark.parametrize("name", READ)
def test_what_is_read_otherwise_is_skipped_with_the_function_that_reads_it(name: str) -> None:
    torch.manual_seed(0)
    create, function = READ[name]
    model, x, expected = _convert(create())
    (row,) = [row for row in model.coverage if row.status == "skipped"]
    assert row.reason.partition(", ")[0] == f"read by {function}"
    assert row.path in str(model.summary())
    uncounted = {entry.name: entry for entry in cost_model(model).uncounted}
    assert uncounted[row.path].calls > 0
    with torch.no_grad():
        assert torch.equal(model(x), expected)


class Mapped(nn.Module):
    """A layer and a parameter inside `torch.vmap`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.mix = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(SQUARE) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda sample: self.layer(sample) @ self.mix)(x)


def test_weights_inside_a_transform_are_skipped_and_what_follows_still_varies() -> None:
    model, x, expected = _convert(Mapped())
    rows = {row.path: (row.status, row.reason) for row in model.coverage}
    reason = "read by a transform of torch.func (vmap, grad), which hides the operator"
    assert rows["middle.layer"] == rows["middle.matrices.mix"] == ("skipped", reason)
    # The transform's result comes from outside torch's functions, and depends on the input.
    assert rows["joint"] == rows["head"] == ("quantized", "")
    facts = model.anyprec_record.facts.layers
    assert facts["middle.layer"].macs == facts["middle.matrices.mix"].macs == TOKENS * WIDTH**2
    anyprec.calibrate(model, [x])
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_weights_inside_a_scripted_module_are_seen() -> None:
    model, x, expected = _convert(torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH))))
    (row,) = [row for row in model.coverage if row.status == "skipped"]
    assert (row.path, row.reason) == ("middle.0.matrices.weight", "read by addmm")
    assert model.anyprec_record.facts.layers[row.path].macs == TOKENS * WIDTH**2
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch says that it will be slower
def test_a_hidden_weight_has_its_macs_also_in_inference_mode() -> None:
    class Inferring(nn.LSTM):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> tuple[Tensor, Any]:  # type: ignore[override]
            return super().forward(x)

    model, _, _ = _convert(Inferring(WIDTH, 12, batch_first=True, proj_size=WIDTH))
    facts = model.anyprec_record.facts.layers["middle.matrices.weight_hr_l0"]
    assert facts.macs == TOKENS * 12 * WIDTH


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_hidden_weight_has_its_macs() -> None:
    model, _, _ = _convert(nn.LSTM(WIDTH, 12, batch_first=True, proj_size=WIDTH))
    macs = {path: facts.macs for path, facts in model.anyprec_record.facts.layers.items()}
    assert macs["middle.matrices.weight_ih_l0"] == TOKENS * WIDTH * 48
    assert macs["middle.matrices.weight_hh_l0"] == TOKENS * WIDTH * 48
    assert macs["middle.matrices.weight_hr_l0"] == TOKENS * 12 * WIDTH


def test_a_product_of_a_quantized_weight_that_is_hidden_elsewhere_is_named() -> None:
    def both(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight + torch.einsum("bti,ij,jk->btk", x, weight, weight.detach())

    model, _, _ = _convert(Using(both, SQUARE))
    costs = {entry.name: entry.macs for entry in cost_model(model).uncounted}
    assert costs["einsum"] == TOKENS * WIDTH**3
    assert model.anyprec_record.facts.layers["middle.weights.matrices.0"].macs == TOKENS * WIDTH**2


def test_complex_weights_are_skipped() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.complex64)
            self.mixing = nn.Parameter(torch.randn(SQUARE, dtype=torch.complex64) * 0.3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.layer(x.to(torch.complex64)) @ self.mixing).abs()

    model, x, expected = _convert(Complex())
    rows = {row.path: row.reason for row in model.coverage if row.status == "skipped"}
    reason = "its weight is torch.complex64, and only real numbers are quantized"
    assert rows == {"middle.layer": reason, "middle.matrices.mixing": reason}
    anyprec.calibrate(model, [x])
    assert torch.equal(model(x), expected)


def test_what_nothing_reads_is_no_row() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.shape = nn.Parameter(torch.ones(SQUARE)), nn.Parameter(torch.ones(1, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros_like(self.shape) + self.shape.new_ones(WIDTH)

    model = anyprec.convert(Network(Idle()).eval(), example_input=torch.randn(2, TOKENS, WIDTH))
    assert [row.path for row in model.coverage] == ["stem", "joint", "head"]


def test_a_layer_whose_weight_is_only_read_says_by_what() -> None:
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, TOKENS)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.layer.weight

    model, _, _ = _convert(Scaling())
    rows = {row.path: row.reason for row in model.coverage}
    assert rows["middle.layer"] == "read by mul"


def test_a_weight_is_not_taken_for_what_an_operand_is_made_from() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, 1))
            self.mixing = nn.Parameter(torch.randn(SQUARE) * 0.3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, 2 * self.mixing) * self.weight.flatten()

    model, _, _ = _convert(Scaled())
    rows = {row.path: row.reason for row in model.coverage if row.status == "skipped"}
    assert rows == {
        "middle.matrices.weight": "read by mul",
        "middle.matrices.mixing": "read by mul",
    }


def test_parameters_in_one_storage_are_told_apart() -> None:
    memory = torch.randn(2, TOKENS, WIDTH)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Parameter(memory[0]), nn.Parameter(memory[1])

        def forward(self, x: Tensor) -> Tensor:
            return x + self.used

    model = anyprec.convert(Network(Shared()).eval(), example_input=torch.randn(2, TOKENS, WIDTH))
    assert [row.path for row in model.coverage if row.status == "skipped"] == [
        "middle.matrices.used"
    ]


def test_skipped_parameters_survive_a_file(tmp_path: Path) -> None:
    create, _ = READ["added"]
    model, x, expected = _convert(create())
    anyprec.calibrate(model, [x])
    anyprec.save(model, tmp_path / "file")
    loaded = anyprec.load(tmp_path / "file", Network(create()).eval())
    assert loaded.coverage == model.coverage
    assert loaded.anyprec_record.facts == model.anyprec_record.facts
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("function", [Tensor.tolist, Tensor.untyped_storage])
def test_what_hands_values_to_other_code_reads_them_without_an_operation(function: Any) -> None:
    weight = torch.randn(SQUARE)
    readers = Readers([("row", weight)])
    with readers, readers.within(function, (weight[0],), counted=False):
        function(weight[0])
    assert list(readers.readings["row"].functions) == [function.__name__]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.Tensor.add_, "add"),
        (torch.Tensor.__rsub__, "sub"),
        (torch.Tensor.__rdiv__, "div"),
        (torch.Tensor.T.__get__, "T"),
        (torch.ops.aten.mul.Tensor, "mul"),
        (torch.ops.aten.mm, "mm"),
        (F.embedding, "embedding"),
    ],
)
def test_functions_have_the_names_that_people_call_them_by(
    function: Callable[..., Any], name: str
) -> None:
    assert function_name(function) == name
