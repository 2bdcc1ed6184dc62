"""What a search found: the configuration for its budget, and from all that it measured, one for any other."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from anyprec.bits import BitConfig, Bits, LayerCandidates
from anyprec.errors import AnyprecError, BudgetError, SearchError
from anyprec.model.cost import Cost, CostModel, LayerCost, Uncounted
from anyprec.report.frontiers import bits_plot, frontier_plot, frontier_table
from anyprec.runtime.storage import replacing
from anyprec.searching.budget.budgets import (
    Budget,
    BudgetLike,
    parse_budget,
    unreachable,
    utilisation,
)
from anyprec.searching.budget.costs import SearchCosts
from anyprec.searching.measuring.memo import as_pairs, from_pairs

_FORMAT = "anyprec-search-result-1"


@dataclass(frozen=True)
class Found:
    """A configuration that was measured.

    Attributes:
        config: For `model.set_bits`.
        score: Its objective on the search's images; lower is better.
        cost: BitOPs and size.
        accuracy: Top-1 in percent on `report_loader`; None if it was not measured there.
    """

    config: BitConfig
    score: float
    cost: Cost
    accuracy: float | None = None


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
        config: The configuration for the (first) budget, for `model.set_bits`.
        score: Its objective on the search's own images; lower is better.
        budget: The budget, with absolute limits.
        evaluated: Every evaluated configuration with its score, in order.
        uniform: Those of them that have one precision everywhere.
        costs: What configurations cost.
        objective: What was minimised.
        norms: Which norm statistics were used.
        stopped: `"finished"`, `"max_evaluations"`, `"max_seconds"` or `"interrupted"`.
        layer_runs: Executions of quantized layers that it took, counted for each batch; by this process.
        accuracies: Top-1 in percent on `report_loader`, of the frontier and the uniform configurations.
    """

    config: BitConfig
    score: float
    budget: Budget
    evaluated: Mapping[BitConfig, float]
    uniform: tuple[BitConfig, ...]
    costs: SearchCosts
    objective: str
    norms: str
    stopped: str
    layer_runs: int
    accuracies: Mapping[BitConfig, float] = field(default_factory=dict)

    @property
    def cost(self) -> Cost:
        """What the configuration costs."""
        return self.costs.model.cost(self.config)

    @property
    def utilisation(self) -> float:
        """Share of the budget that it uses, at most 1."""
        return utilisation(self.config, self.budget, self.costs)

    @property
    def evaluations(self) -> int:
        """Configurations that were evaluated."""
        return len(self.evaluated)

    @property
    def cost_name(self) -> str:
        """The cost that the frontier is over: the first that the budget limits."""
        return next(iter(self.budget.limits))

    @property
    def frontier(self) -> tuple[Found, ...]:
        """The evaluated configurations of which none is at once cheaper and better, by rising cost."""
        priced = [
            (self.costs.total(self.cost_name, config), score, config)
            for config, score in self.evaluated.items()
        ]
        best = math.inf
        kept = []
        for _, score, config in sorted(priced, key=lambda entry: entry[:2]):
            if score < best:
                kept.append(self._found(config))
                best = score
        return tuple(kept)

    def at(self, budget: BudgetLike) -> Found:
        """The best evaluated configuration that fits another budget; nothing is evaluated anew.

        Raises:
            BudgetError: The budget cannot be read, or nothing that was evaluated fits it.
        """
        limits = parse_budget(budget, self.costs)
        fitting = [
            config for config in self.evaluated if utilisation(config, limits, self.costs) <= 1
        ]
        if not fitting:
            totals = {
                name: [self.costs.total(name, config) for config in self.evaluated]
                for name in limits.limits
            }
            raise unreachable(
                limits, {name: (min(every), max(every)) for name, every in totals.items()}
            )
        return self._found(min(fitting, key=self.evaluated.__getitem__))

    def table(self) -> Table:
        """The frontier and the uniform configurations as a rich table."""
        return frontier_table(self._rows(), objective=self.objective)

    def plot(self, path: str | Path, *, title: str = "") -> None:
        """Write a picture of score (or accuracy, where reported) against cost: all that was evaluated, the frontier, uniform.

        Raises:
            ImportError: matplotlib is not installed (`pip install 'anyprec[plots]'`).
        """
        measured = bool(self.accuracies)
        shown = self.accuracies if measured else self.evaluated
        series = {
            "evaluated": [] if measured else self._points(self.evaluated, shown),
            "uniform": self._points(self.uniform, shown),
            "searched": self._points([found.config for found in self.frontier], shown),
        }
        label = (
            "top-1 accuracy on other images, %"
            if measured
            else f"{self.objective} on the search's images"
        )
        frontier_plot(
            series,
            path,
            cost=self.cost_name,
            score=label,
            chosen=self._points([self.config], shown),
            title=title,
        )

    def plot_bits(
        self, path: str | Path, *, budget: BudgetLike | None = None, title: str = ""
    ) -> None:
        """Write a bar chart of the bits of each layer, of the configuration found or of that for another budget.

        Raises:
            ImportError: matplotlib is not installed.
            BudgetError: as `at`.
        """
        bits_plot(self.config if budget is None else self.at(budget).config, path, title=title)

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, for `SearchResult.load`. An existing file is replaced at once or not at all.

        Raises:
            SearchError: The file cannot be written.
        """
        paths = list(self.costs.model.layers)
        document = {
            "format": _FORMAT,
            "layers": [
                {
                    "path": path,
                    "macs": layer.macs,
                    "weights": layer.weights,
                    "weight_bits": self.costs.candidates[path].weight,
                    "activation_bits": self.costs.candidates[path].activation,
                }
                for path, layer in self.costs.model.layers.items()
            ],
            "model": {
                "uncounted": [vars(entry) for entry in self.costs.model.uncounted],
                "float_parameters": self.costs.model.float_parameters,
                "steps": self.costs.model.steps,
                "input_shape": self.costs.model.input_shape,
            },
            "own_costs": {
                name: {
                    path: {str(bits): value for bits, value in row.items()}
                    for path, row in table.items()
                }
                for name, table in self.costs.own.items()
            },
            "budget": self.budget.limits,
            "objective": self.objective,
            "norms": self.norms,
            "stopped": self.stopped,
            "layer_runs": self.layer_runs,
            "config": as_pairs(self.config, paths),
            "uniform": [as_pairs(config, paths) for config in self.uniform],
            "evaluated": [
                {
                    "bits": as_pairs(config, paths),
                    "score": score if math.isfinite(score) else None,
                    **({"accuracy": self.accuracies[config]} if config in self.accuracies else {}),
                }
                for config, score in self.evaluated.items()
            ],
        }
        try:
            with replacing(Path(path)) as temporary:
                temporary.write_text(json.dumps(document), "utf-8")
        except OSError as error:
            msg = f"cannot write {str(path)!r}: {error.strerror}; what stood there before is unchanged"
            raise SearchError(msg) from error

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read a result that `save` wrote.

        Raises:
            SearchError: The file cannot be read, or is no search result.
        """
        try:
            document = json.loads(Path(path).read_text("utf-8"))
            if document["format"] != _FORMAT:
                msg = f"its format is {document['format']!r}, not {_FORMAT!r}"
                raise SearchError(msg)
            return cls(**_read(document))
        except OSError as error:
            msg = f"cannot read the search result {path}: {error.strerror}"
            raise SearchError(msg) from error
        except (ValueError, KeyError, TypeError, AttributeError, AnyprecError) as error:
            msg = f"{path} is no search result, or is damaged: {error}"
            raise SearchError(msg) from error

    def __str__(self) -> str:
        limits = f"{self.utilisation:.1%} of {self.budget}"
        size = f"{self.cost.bitops / 1e9:.4g} GBitOPs, {self.cost.size / 8 / 2**20:.4g} MiB"
        text = f"{size} ({limits}), {self.objective} {self.score:.4f} after {self.evaluations} evaluations"
        return text if self.stopped == "finished" else f"{text} (stopped: {self.stopped})"

    def _found(self, config: BitConfig) -> Found:
        return Found(
            config,
            self.evaluated[config],
            self.costs.model.cost(config),
            self.accuracies.get(config),
        )

    def _points(self, configs: Any, shown: Mapping[BitConfig, float]) -> list[tuple[float, float]]:
        return [
            (self.costs.total(self.cost_name, config), shown[config])
            for config in configs
            if config in shown
        ]

    def _rows(self) -> list[tuple[str, Cost, float, float | None]]:
        found = [("searched", entry) for entry in self.frontier if entry.config not in self.uniform]
        found += [
            (uniform_name(config), self._found(config))
            for config in self.uniform
            if config in self.evaluated
        ]
        rows = [(name, entry.cost, entry.score, entry.accuracy) for name, entry in found]
        return sorted(rows, key=lambda row: row[1].bitops)


def uniform_name(config: BitConfig) -> str:
    """`W4A4`: the precision that most layers of a uniform configuration have."""
    every = list(config.values())
    return str(max(dict.fromkeys(every), key=every.count))


def _read(document: dict[str, Any]) -> dict[str, Any]:
    rows = document["layers"]
    paths = [str(row["path"]) for row in rows]
    model = CostModel(
        layers={
            row["path"]: LayerCost(row["path"], int(row["macs"]), int(row["weights"]))
            for row in rows
        },
        candidates={
            row["path"]: LayerCandidates(tuple(row["weight_bits"]), tuple(row["activation_bits"]))
            for row in rows
        },
        uncounted=tuple(Uncounted(**entry) for entry in document["model"]["uncounted"]),
        float_parameters=document["model"]["float_parameters"],
        steps=document["model"]["steps"],
        input_shape=tuple(document["model"]["input_shape"]),
    )
    own = {
        name: {
            path: {Bits.parse(bits): float(value) for bits, value in row.items()}
            for path, row in table.items()
        }
        for name, table in document["own_costs"].items()
    }

    def config(pairs: list[list[int]]) -> BitConfig:
        return from_pairs(pairs, paths)

    evaluated = {
        config(entry["bits"]): math.inf if entry["score"] is None else float(entry["score"])
        for entry in document["evaluated"]
    }
    limits = {name: float(limit) for name, limit in document["budget"].items()}
    chosen = config(document["config"])
    if chosen not in evaluated:
        msg = "the configuration that it found is not among those that were evaluated"
        raise BudgetError(msg)
    return {
        "config": chosen,
        "score": evaluated[chosen],
        "budget": Budget.of(limits),
        "evaluated": evaluated,
        "uniform": tuple(config(pairs) for pairs in document["uniform"]),
        "costs": SearchCosts(model, own),
        "objective": str(document["objective"]),
        "norms": str(document["norms"]),
        "stopped": str(document["stopped"]),
        "layer_runs": int(document["layer_runs"]),
        "accuracies": {
            config(e["bits"]): float(e["accuracy"])
            for e in document["evaluated"]
            if "accuracy" in e
        },
    }
