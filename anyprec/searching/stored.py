"""The file of a search result: JSON, and what stands in it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from anyprec.bits import Bits, LayerCandidates
from anyprec.errors import AnyprecError, SearchError
from anyprec.model.cost import CostModel, LayerCost, Uncounted
from anyprec.runtime.storage import replacing
from anyprec.searching.budget.budgets import Budget
from anyprec.searching.measuring.memo import as_pairs, from_pairs

if TYPE_CHECKING:
    from anyprec.searching.result import SearchResult

_FORMAT = "anyprec-search-result-1"

_Pairs = list[tuple[int, int]]
"""A configuration: weight and activation bits of each layer, in the order of the document's."""


class _Layer(msgspec.Struct, omit_defaults=True):
    path: str
    macs: int
    weights: int
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    weights_of: str | None = None
    codes_of: str | None = None


class _Network(msgspec.Struct):
    uncounted: tuple[Uncounted, ...]
    float_parameters: int
    steps: int
    input_shape: tuple[int, ...]


class _Evaluation(msgspec.Struct, omit_defaults=True):
    bits: _Pairs
    score: float | None  # None is an infinite one: JSON has no such number
    accuracy: float | None = None


class _Head(msgspec.Struct):
    format: str


class _Document(msgspec.Struct):
    format: str
    layers: list[_Layer]
    model: _Network
    own_costs: dict[str, dict[str, dict[str, float]]]
    budget: dict[str, float]
    objective: str
    norms: str
    stopped: str
    layer_runs: int
    config: _Pairs
    uniform: list[_Pairs]
    evaluated: list[_Evaluation]


def write_result(result: SearchResult, file: Path) -> None:
    """Write a result. An existing file is replaced at once or not at all.

    Raises:
        SearchError: The file cannot be written.
    """
    content = msgspec.json.encode(_to_document(result))
    try:
        with replacing(file) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        msg = f"cannot write {str(file)!r}: {error.strerror}; what stood there before is unchanged"
        raise SearchError(msg) from error


def read_result(file: Path) -> dict[str, Any]:
    """The fields of the `SearchResult` that `write_result` wrote.

    Raises:
        SearchError: The file cannot be read, or is no search result.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        msg = f"cannot read the search result {file}: {error.strerror}"
        raise SearchError(msg) from error
    try:
        head = msgspec.json.decode(content, type=_Head)
        if head.format != _FORMAT:
            msg = f"its format is {head.format!r}, not {_FORMAT!r}"
            raise SearchError(msg)
        return _from_document(msgspec.json.decode(content, type=_Document))
    except (msgspec.DecodeError, ValueError, AnyprecError) as error:
        msg = f"{file} is no search result, or is damaged: {error}"
        raise SearchError(msg) from error


def _to_document(result: SearchResult) -> _Document:
    costs = result.costs
    paths = list(costs.layers)
    layers = []
    for path, layer in costs.layers.items():
        candidates = costs.candidates[path]
        layers.append(
            _Layer(
                path,
                layer.macs,
                layer.weights,
                candidates.weight,
                candidates.activation,
                layer.weights_of,
                layer.codes_of,
            )
        )
    evaluated = []
    for config, score in result.evaluated.items():
        stored_score = score if math.isfinite(score) else None
        accuracy = result.accuracies.get(config)
        evaluated.append(_Evaluation(as_pairs(config, paths), stored_score, accuracy))
    return _Document(
        format=_FORMAT,
        layers=layers,
        model=_Network(
            uncounted=costs.uncounted,
            float_parameters=costs.float_parameters,
            steps=costs.steps,
            input_shape=costs.input_shape,
        ),
        own_costs=_stored_costs(costs),
        budget=result.budget.limits,
        objective=result.objective,
        norms=result.norms,
        stopped=result.stopped,
        layer_runs=result.layer_runs,
        config=as_pairs(result.config, paths),
        uniform=[as_pairs(config, paths) for config in result.uniform],
        evaluated=evaluated,
    )


def _from_document(document: _Document) -> dict[str, Any]:
    paths = [layer.path for layer in document.layers]
    evaluated, accuracies = {}, {}
    for entry in document.evaluated:
        config = from_pairs(entry.bits, paths)
        evaluated[config] = math.inf if entry.score is None else entry.score
        if entry.accuracy is not None:
            accuracies[config] = entry.accuracy
    chosen = from_pairs(document.config, paths)
    if chosen not in evaluated:
        msg = "the configuration that it found is not among those that were evaluated"
        raise SearchError(msg)
    if math.isinf(evaluated[chosen]):
        msg = "the configuration that it found has no finite score"
        raise SearchError(msg)
    return {
        "config": chosen,
        "score": evaluated[chosen],
        "budget": Budget.of(document.budget),
        "evaluated": evaluated,
        "uniform": tuple(from_pairs(pairs, paths) for pairs in document.uniform),
        "costs": _read_costs(document),
        "objective": document.objective,
        "norms": document.norms,
        "stopped": document.stopped,
        "layer_runs": document.layer_runs,
        "accuracies": accuracies,
    }


def _stored_costs(costs: CostModel) -> dict[str, dict[str, dict[str, float]]]:
    stored: dict[str, dict[str, dict[str, float]]] = {}
    for name, table in costs.user_costs.items():
        stored[name] = {}
        for path, row in table.items():
            stored[name][path] = {str(bits): value for bits, value in row.items()}
    return stored


def _read_costs(document: _Document) -> CostModel:
    layers, candidates = {}, {}
    for layer in document.layers:
        layers[layer.path] = LayerCost(
            layer.path, layer.macs, layer.weights, layer.weights_of, layer.codes_of
        )
        candidates[layer.path] = LayerCandidates(layer.weight_bits, layer.activation_bits)
    user_costs: dict[str, dict[str, dict[Bits, float]]] = {}
    for name, table in document.own_costs.items():
        user_costs[name] = {}
        for path, row in table.items():
            user_costs[name][path] = {Bits.parse(bits): value for bits, value in row.items()}
    return CostModel(
        layers=layers,
        candidates=candidates,
        uncounted=document.model.uncounted,
        float_parameters=document.model.float_parameters,
        steps=document.model.steps,
        input_shape=document.model.input_shape,
        user_costs=user_costs,
    )
