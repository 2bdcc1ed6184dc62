"""A weight that several layers share is counted once, as it is stored; its MACs count in each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import anyprec
from anyprec.model.cost import CostModel, LayerCost
from anyprec.model.costing import cost_model
from anyprec.testing import assert_promises

WIDTH = 16


class Tied(nn.Module):
    """Two of four layers have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.second(x)))


class Embedded(nn.Module):
    """The head is the table of an embedding, which stays in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, WIDTH)
        self.mixing = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.mixing(self.table(tokens))))


class Parameters(nn.Module):
    """A bare parameter is the weight of a layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.matrix = self.first.weight
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(torch.relu(self.first(x)) @ self.matrix.t()))


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(32, 8)


@pytest.fixture
def tied(batch: Tensor) -> anyprec.ConvertedModel:
    model = anyprec.convert(Tied(), bits=(2, 4, 8), example_input=batch[:1])
    anyprec.calibrate(model, [batch])
    return model


STEM, SHARED, HEAD = 8 * WIDTH, WIDTH**2, 4 * WIDTH


def test_a_shared_weight_counts_once_in_size_and_twice_in_bitops(
    tied: anyprec.ConvertedModel,
) -> None:
    cost = anyprec.cost_of(tied, 4)
    assert cost.size == (STEM + HEAD) * 8 + SHARED * 4
    assert cost.bitops == (STEM + HEAD) * 64 + 2 * SHARED * 16
    assert cost.average_bits == cost.size / (STEM + SHARED + HEAD)
    assert cost.model.weights == STEM + SHARED + HEAD
    assert cost.model.float_parameters == WIDTH * 3 + 4
    assert anyprec.cost_of(tied, None).size == 32 * (STEM + SHARED + HEAD)
    assert anyprec.cost_of(tied, None).average_bits == 32


def test_layers_at_different_bits_store_a_set_of_codes_each(tied: anyprec.ConvertedModel) -> None:
    cost = anyprec.cost_of(tied, {"first": (2, 8), "second": (8, 8)})
    assert cost.size == (STEM + HEAD + SHARED) * 8 + SHARED * 2
    assert cost.average_bits == cost.size / (STEM + 2 * SHARED + HEAD)
    same_weight_bits = anyprec.cost_of(tied, {"first": (2, 8), "second": (2, 4)})
    assert same_weight_bits.size == (STEM + HEAD) * 8 + SHARED * 2


def test_layers_whose_step_sizes_were_trained_apart_store_a_set_each(
    tied: anyprec.ConvertedModel,
) -> None:
    with torch.no_grad():
        tied.second.weight_quantizer.step[1] *= 1.5
    cost = anyprec.cost_of(tied, 4)
    assert cost.size == (STEM + HEAD) * 8 + 2 * SHARED * 4
    assert cost.model.weights == STEM + SHARED + HEAD
    assert anyprec.cost_of(tied, None).size == 32 * (STEM + SHARED + HEAD)


def code_bytes(model: anyprec.ConvertedModel, file: Path) -> int:
    anyprec.save(model, file, packed=True, coding="fixed", rebuildable=False)
    return sum(layer.bytes for layer in anyprec.inspect(file).layers.values())


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8, {"first": 2, "second": 8}])
def test_the_size_is_that_of_the_codes_in_a_file_of_one_configuration(
    bits: int, apart: bool, tied: anyprec.ConvertedModel, batch: Tensor, tmp_path: Path
) -> None:
    if apart:
        with torch.no_grad():
            tied.second.weight_quantizer.step *= 1.5
    size = anyprec.cost_of(tied, bits).size
    anyprec.save(tied, tmp_path / "all", rebuildable=False)
    one = anyprec.load(tmp_path / "all", Tied(), bits=bits)
    assert anyprec.cost_of(one).size == size
    # Fields of a fixed length hold one of 2^bits + 1 points: half a cell at each end.
    fields = {2: 2, 4: 4, 8: 8}
    stored = code_bytes(one, tmp_path / "one")
    assert stored >= size / 8
    assert stored <= (size / 8) * max((bits + 1) / bits for bits in fields)


@pytest.mark.parametrize("coding", ["fixed", "zstd"])
def test_a_packed_file_stores_shared_codes_once_and_every_precision_is_the_same(
    coding: str, tied: anyprec.ConvertedModel, batch: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "net"
    anyprec.save(tied, file, packed=True, coding=coding, rebuildable=False)
    stored = anyprec.inspect(file).layers
    assert stored["second"].storage == "tied"
    assert stored["second"].bytes == 0 < stored["first"].bytes
    packed = anyprec.load(file, Tied()).eval()
    tied.eval()
    for bits in (2, 4, 8, {"first": 2, "second": 8}):
        tied.set_bits(bits)
        packed.set_bits(bits)
        assert torch.equal(packed(batch), tied(batch))
    four = anyprec.cost_of(packed, 4)
    assert four.size == anyprec.cost_of(tied, 4).size
    assert four.model.weights == cost_model(tied).weights
    assert four.model.float_parameters == cost_model(tied).float_parameters
    anyprec.save(packed, tmp_path / "again", packed=True, coding=coding, rebuildable=False)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_a_head_that_is_an_embedding_leaves_the_table_among_the_float_parameters() -> None:
    tokens = torch.randint(10, (4, 6))
    model = anyprec.convert(Embedded(), bits=(4, 8), example_input=tokens[:1])
    costs = cost_model(model)
    assert costs.weights == WIDTH**2 + 10 * WIDTH
    assert costs.float_parameters == 10 * WIDTH + WIDTH


def test_a_weight_that_is_a_bare_parameter_too_stays_in_the_file(tmp_path: Path) -> None:
    batch = torch.randn(32, WIDTH)
    model = anyprec.convert(Parameters(), bits=(4, 8), first_last_bits=None, example_input=batch)
    anyprec.calibrate(model, [batch])
    costs = cost_model(model)
    assert costs.weights == WIDTH**2 + 4 * WIDTH
    anyprec.save(model, tmp_path / "net", packed=True, rebuildable=False)
    assert "is also 'matrix'" in anyprec.inspect(tmp_path / "net").layers["first"].reason
    assert costs.float_parameters == WIDTH**2 + 4


def test_computed_weights_count_what_they_are_made_of() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
        nn.Flatten(),
        nn.Linear(96, 2),
    )
    model = anyprec.convert(network, bits=(4, 8), example_input=torch.zeros(1, 3, 8, 8))
    costs = cost_model(model)
    assert costs.weights == 3 * 4 * 9 + 4 * 6 * 9 + 96 * 2
    assert costs.float_parameters == 4 + 6 + 6 + 2  # a scale for each channel of the second


def test_a_network_without_shared_weights_shares_nothing(net: anyprec.ConvertedModel) -> None:
    for layer in cost_model(net).layers.values():
        assert layer == LayerCost(layer.path, layer.macs, layer.weights)


@pytest.mark.parametrize("bits", [2, 4, {"first": 2, "second": 8}])
def test_totals_are_sums_over_layers_where_bits_are_equal(
    bits: int, tied: anyprec.ConvertedModel
) -> None:
    costs, config = cost_model(tied), tied.resolve_bits(bits)
    for name in ("size", "average_bits"):
        parts = [costs.of_layer(name, path, config[path]) for path in costs.layers]
        total = sum(parts) / costs.divisor(name)
        if isinstance(bits, int):
            assert costs.total(name, config) == pytest.approx(total, rel=1e-12)
    assert costs.total("size", config) == anyprec.cost_of(tied, bits).size
    assert costs.total("average_bits", config) == anyprec.cost_of(tied, bits).average_bits


@pytest.mark.parametrize("budget", ["330 B", "5.5 bits", "330 B and W8A8"])
def test_a_search_stays_within_the_size_that_is_stored(
    budget: str, tied: anyprec.ConvertedModel, batch: Tensor, tmp_path: Path
) -> None:
    result = anyprec.search(tied, [batch], budget, objective="divergence")
    assert result.utilisation <= 1
    assert result.cost == anyprec.cost_of(tied, result.config)
    result.save(tmp_path / "result")
    loaded = anyprec.SearchResult.load(tmp_path / "result")
    assert isinstance(loaded.costs, CostModel)
    assert loaded.cost == result.cost


def test_promises_hold_for_a_network_with_a_shared_weight(batch: Tensor) -> None:
    assert_promises(Tied().eval(), lambda: torch.randn_like(batch), bits=(2, 8))
