"""Bidirectional greedy search of a configuration, on plain numbers.

Here: the search of "Retraining-free Model Quantization via One-Shot Weight-Coupling Learning" (Tang et al., CVPR
2024, arXiv:2401.01543), made to end, to evaluate each configuration once, and to end in a configuration that is not
worse than the uniform ones. Not here: how a loss is measured, what a configuration costs (both are callables), and
reading budgets (`anyprec.searching.budget`).

The search goes in three phases.

*Leap* (lazy search only), from the cheapest uniform configuration that does not fit (with what costs nothing at its
highest). Every single down is measured once; where losses and costs added up, the best configuration of any budget
would follow (see `allocation.py`). The one a little over the budget is evaluated, and is where the descent starts if
it is no worse than the uniform configurations.

*Descent*. A round considers, for every layer and operand, one candidate down and, where that operand was lowered
before, one candidate up; it takes the move with the lowest

    score = alpha * normalised loss increase - normalised cost saving

each normalised over the round's minimum and maximum, until the configuration fits.

*Exchange*, from the best configuration evaluated so far that fits. Up to four changes together, some up and some down,
are taken if the configuration still fits and its loss falls: what the descent cut too early is bought back. The changes
tried first are those that single changes, measured before, predict to gain most.

The lazy search (the default; see Minoux 1978 and Leskovec et al. 2007, "CELF") does not measure every move in every
round: it predicts with measurements from earlier rounds, measures the best prediction alone, and takes it if it stays
the best. A move that was never measured is predicted from its neighbour on the same operand by the law of quantization
noise, loss increase proportional to 4^-bits. Predictions only decide what to measure; no move is taken on a
prediction (unless `max_evaluations` is used up).

Departures from the paper: weights and activations share one pool of moves (weights first was worse in every synthetic
test); the minimum is subtracted in the normalisation; ups are held to a rule that prevents cycles; the exchange.

Termination. In the descent a down lowers the sum of all bit-widths, so between two ups there are finitely many downs.
An up is taken only into a configuration whose loss is strictly lower than that of every configuration on the way so
far of at most its cost. A configuration already on the way is itself one of these, and its loss is not lower than
itself: an up never returns to one. There are finitely many configurations, so finitely many ups, and the descent ends,
at the latest with every layer at its lowest candidates. Each turn of the exchange evaluates a new configuration or is
the last one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from anyprec.bits import MAX_BITS, BitConfig, Bits, Candidates
from anyprec.errors import BudgetError
from anyprec.searching.allocation import allocate

Operand = Literal["weight", "activation"]
OPERANDS: tuple[Operand, Operand] = ("weight", "activation")

# The exchange. Larger values cost time (pool) or evaluations (patience); the gain was below 0.1 % on synthetic tables.
_POOL = 10  # ups, and as many downs, that are combined
_MOST_CHANGES = 4  # of one exchange
_REACH = 2  # candidates that one change may pass
_LEAP_REACHES = (1, 2, MAX_BITS)  # candidates that a leap may go from the uniform configuration; the last is any
_LEAP_MARGIN = 0.02  # the leap lands this far over the budget, so that the descent has something to choose
_PATIENCE = 24  # turns without a gain, after which the exchange ends
# Predicted costs add up the changes' single costs. The truth is a little different under several limits, and where both
# operands of a layer change. A prediction may exceed the budget by this share, before the true cost is asked for.
_SLACK = 0.002
_SLACK_WITHIN_LAYER = 0.02


@dataclass(frozen=True)
class Move:
    """A change of one operand's bit-width in one layer.

    Attributes:
        path: The layer.
        operand: `"weight"` or `"activation"`.
        before: Bit-width that it had.
        after: Bit-width that it gets.

    Example:
        >>> str(Move("layer1.0.conv1", "weight", before=5, after=4))
        'layer1.0.conv1 weight 5 -> 4'
    """

    path: str
    operand: Operand
    before: int
    after: int

    def __str__(self) -> str:
        """Path, operand and bit-widths."""
        return f"{self.path} {self.operand} {self.before} -> {self.after}"

    @property
    def lowers(self) -> bool:
        """Whether the bit-width falls."""
        return self.after < self.before


@dataclass(frozen=True)
class Step:
    """A configuration on the way of the search.

    Attributes:
        moves: What led here from the step before; empty at the start.
        config: The configuration.
        loss: Its loss; infinite if that was not a finite number, NaN if it was not evaluated (in a descent that goes on
            when `max_evaluations` is used up).
        utilisation: Its share of the budget.
        evaluations: Evaluations spent so far.
    """

    moves: tuple[Move, ...]
    config: BitConfig
    loss: float
    utilisation: float
    evaluations: int


@dataclass(frozen=True)
class GreedyResult:
    """What a search found.

    Attributes:
        config: The configuration of lowest loss among all evaluated ones that fit.
        loss: Its loss.
        utilisation: Its share of the budget, at most 1.
        evaluations: Evaluations spent.
        history: The way of the search, from its start to `config`.
        evaluated: Every configuration evaluated, in order, and its loss.
    """

    config: BitConfig
    loss: float
    utilisation: float
    evaluations: int
    history: tuple[Step, ...]
    evaluated: Mapping[BitConfig, float]


def bidirectional_greedy(
    evaluate: Callable[[BitConfig], float],
    *,
    candidates: Candidates,
    utilisation: Callable[[BitConfig], float],
    alpha: float = 1.5,
    lazy: bool = True,
    max_evaluations: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> GreedyResult:
    """Find a configuration of low loss that fits a budget.

    Deterministic; ties go to the earlier layer of `candidates`, weight before activation.

    Args:
        evaluate: Loss of a configuration, lower is better. It is called once for each configuration, and must be
            deterministic. What is not a finite number counts as an infinite loss.
        candidates: Bit-widths that each layer may take.
        utilisation: Share of the budget that a configuration uses; it fits if at most 1. Must be cheap, and not rise
            when a bit-width falls.
        alpha: Weight of the loss against the cost in the descent's score.
        lazy: Measure only the moves that look best; otherwise every move in every round, for about ten times
            the evaluations.
        max_evaluations: At most as many evaluations. When they are used up, the descent goes on with the predictions
            it has, and there is no exchange.
        on_step: Called with the start and after each step.

    Returns:
        A configuration that fits. Its loss is not higher than that of any uniform configuration that fits: those with
        the same bit-width for both operands, and those W x A pairs where neither operand could be higher.

    Raises:
        BudgetError: no configuration fits; `max_evaluations` does not suffice for the uniform configurations;
            or `alpha` is not positive and finite.

    Example:
        >>> from anyprec.bits import LayerCandidates
        >>> layer = LayerCandidates(weight=(2, 4, 8), activation=(8,))
        >>> result = bidirectional_greedy(
        ...     lambda config: 9 * 4.0 ** -config["conv"].weight + 4.0 ** -config["fc"].weight,
        ...     candidates={"conv": layer, "fc": layer},
        ...     utilisation=lambda config: (config["conv"].weight + config["fc"].weight) / 12,
        ... )
        >>> result.config
        BitConfig({'conv': W8A8, 'fc': W4A8})
        >>> [str(move) for step in result.history for move in step.moves]
        ['fc weight 8 -> 4']
    """
    if not 0 < alpha < math.inf:
        msg = f"alpha={alpha!r} is not a weight of the loss: use a positive finite number, e.g. 1.5"
        raise BudgetError(msg)
    ledger = _Ledger(evaluate, utilisation, limit=math.inf if max_evaluations is None else max_evaluations)
    search = _Search(ledger, candidates, alpha=alpha, lazy=lazy, on_step=on_step or _ignore)
    return search.run()


class _Search:
    """One run: the descent, then the exchange."""

    def __init__(
        self, ledger: _Ledger, candidates: Candidates, *, alpha: float, lazy: bool, on_step: Callable[[Step], None]
    ) -> None:
        self._ledger = ledger
        self._candidates = candidates
        self._alpha = alpha
        self._lazy = lazy
        self._on_step = on_step
        self._predictor = _Predictor(candidates)
        self._history: list[Step] = []

    def run(self) -> GreedyResult:
        """Both phases.

        Raises:
            BudgetError: nothing fits, or the evaluations do not suffice.
        """
        ladder = _uniform_ladder(self._candidates)
        self._require_fit(ladder[0])
        fitting = [config for config in ladder if self._ledger.fits(config)]
        start = _start(self._candidates, self._ledger.utilisation)
        self._require_evaluations(len(fitting), start)

        for config in [*fitting, start, *_maximal_pairs(self._candidates, self._ledger.fits)]:
            if not self._ledger.exhausted:
                self._ledger.loss(config)
        self._descend(self._leap(start))
        self._exchange()
        return self._result()

    def _require_fit(self, lowest: BitConfig) -> None:
        share = self._ledger.utilisation(lowest)
        if not share <= 1:
            msg = (
                f"no configuration fits: with every layer at its lowest candidates the budget is used {share:.4g} "
                "times; raise the budget, or offer lower candidate bit-widths"
            )
            raise BudgetError(msg)

    def _require_evaluations(self, fitting: int, start: BitConfig) -> None:
        descends = not self._ledger.fits(start)
        needed = fitting + 2 if descends else fitting
        if self._ledger.limit < needed:
            ends = " and the two ends of the descent" if descends else ""
            msg = (
                f"max_evaluations={self._ledger.limit} is too few: the uniform configurations that fit ({fitting})"
                f"{ends} take {needed}; use at least {needed}, or None for no limit"
            )
            raise BudgetError(msg)
        # The loss of the descent's end must be known, so one evaluation stays for it.
        self._ledger.reserved = 1 if descends else 0

    def _result(self) -> GreedyResult:
        last = self._history[-1]
        return GreedyResult(
            config=last.config,
            loss=last.loss,
            utilisation=last.utilisation,
            evaluations=self._ledger.count,
            history=tuple(self._history),
            evaluated=self._ledger.losses(),
        )

    def _arrive(self, config: BitConfig) -> None:
        """Note that the search stands at `config` now."""
        before = self._history[-1].config if self._history else config
        step = Step(
            moves=_moves_between(before, config),
            config=config,
            loss=self._ledger.loss(config) if self._ledger.knows(config) else math.nan,
            utilisation=self._ledger.utilisation(config),
            evaluations=self._ledger.count,
        )
        self._history.append(step)
        self._on_step(step)

    # The leap

    def _leap(self, start: BitConfig) -> BitConfig:
        """Go near the budget at once, as far as single changes tell; `start` if it fits or too little is known."""
        if not self._lazy or self._ledger.fits(start):
            return start
        self._measure_all(start, [self._option(start, move) for move in self._moves(start, direction=-1)])
        # Predictions get worse the further they reach: near the uniform configuration they hold best.
        limits = (1.0, 1.0 + _LEAP_MARGIN)
        targets = [self._allocation(start, limit, reach) for reach in _LEAP_REACHES for limit in limits]
        known = [target for target in targets if target is not None]
        for target in known:
            if not self._ledger.exhausted:
                self._ledger.loss(target)
        landings = [target for target in known if not self._ledger.fits(target) and self._ledger.knows(target)]
        best = min(landings, key=self._ledger.loss, default=start)
        # A leap that made things worse than the uniform configurations is none.
        return best if self._ledger.loss(best) <= self._ledger.loss(self._ledger.best_fit) else start

    def _allocation(self, start: BitConfig, limit: float, reach: int) -> BitConfig | None:
        """The best configuration of at most `limit` if the changes' losses and costs from `start` on added up.

        Bit-widths stay within `reach` candidates of those of the best configuration that fits, or are those of `start`.
        """
        middle = self._ledger.best_fit
        spent = self._ledger.utilisation(start)
        choices: list[list[Bits]] = []
        options: list[list[tuple[float, float]]] = []
        for path, layer in self._candidates.items():
            near = [
                [
                    width
                    for index, width in enumerate(widths)
                    if abs(index - widths.index(getattr(middle[path], operand))) <= reach
                    or width == getattr(start[path], operand)
                ]
                for operand, widths in zip(OPERANDS, (layer.weight, layer.activation), strict=True)
            ]
            pairs = list(itertools.starmap(Bits, itertools.product(*near)))
            losses = [self._predicted_change(path, start[path], bits) for bits in pairs]
            if any(loss is None for loss in losses):
                return None
            costs = [self._ledger.utilisation(start.replace({path: bits})) - spent for bits in pairs]
            choices.append(pairs)
            options.append([(loss or 0.0, cost) for loss, cost in zip(losses, costs, strict=True)])
        chosen = allocate(options, limit - spent)
        if chosen is None:
            return None
        picked = zip(self._candidates, choices, chosen, strict=True)
        return BitConfig({path: pairs[index] for path, pairs, index in picked})

    def _predicted_change(self, path: str, before: Bits, after: Bits) -> float | None:
        """Loss increase of one layer's change of both operands; None if nothing is known of one."""
        total = 0.0
        for operand in OPERANDS:
            move = Move(path, operand, getattr(before, operand), getattr(after, operand))
            increase = 0.0 if move.before == move.after else self._predictor.increase(move)
            if increase is None or not math.isfinite(increase):
                return None
            total += increase
        return total

    # The descent

    def _descend(self, start: BitConfig) -> None:
        config = start
        self._arrive(config)
        while not self._ledger.fits(config):
            config = self._best_option(config, start).target
            if self._ledger.fits(config):
                self._ledger.reserved = 0
                self._ledger.loss(config)
            self._arrive(config)

    def _best_option(self, config: BitConfig, start: BitConfig) -> _Option:
        """The round's move of lowest score, measured as long as evaluations are left."""
        options = [*self._downs(config), *self._undos(config, start)]
        if not self._lazy:
            self._measure_all(config, options)
        while True:
            options = [option for option in options if self._permitted(config, option)]
            increases = [self._increase(config, option) for option in options]
            scores = _scores(increases, [option.saving for option in options], alpha=self._alpha)
            best = options[scores.index(min(scores))]
            if self._ledger.knows(best.target) or self._ledger.exhausted:
                return best
            self._measure(config, best)

    def _downs(self, config: BitConfig) -> list[_Option]:
        options = [self._option(config, move) for move in self._moves(config, direction=-1)]
        # Under several limits a down may save nothing of the one that binds: no use, as long as another does.
        options = [option for option in options if option.saving > 0] or options
        # After an up, the way back down is no use either.
        been = {step.config for step in self._history}
        return [option for option in options if option.target not in been] or options

    def _undos(self, config: BitConfig, start: BitConfig) -> list[_Option]:
        """Ups of what was lowered since the start. Their bound makes cycles impossible, see the module."""
        if self._ledger.exhausted:
            return []
        options = [
            self._option(config, move)
            for move in self._moves(config, direction=1)
            if move.before < getattr(start[move.path], move.operand)
        ]
        return [replace(option, loss_below=self._lowest_loss_within(option)) for option in options]

    def _lowest_loss_within(self, option: _Option) -> float:
        """Lowest loss on the way so far, of configurations that cost at most as much."""
        return min((step.loss for step in self._history if step.utilisation <= option.utilisation), default=math.inf)

    def _permitted(self, config: BitConfig, option: _Option) -> bool:
        if option.move.lowers:
            return True
        if self._ledger.knows(option.target):
            # Not the sum below: its rounding could let a configuration come back, against the proof of termination.
            return self._ledger.loss(option.target) < option.loss_below
        if self._ledger.exhausted:
            return False
        return self._ledger.loss(config) + self._increase(config, option) < option.loss_below

    # The exchange

    def _exchange(self) -> None:
        self._go_to_better()
        if any(self._moves(self._history[-1].config, direction=1)):
            self._measure_unknown(self._history[-1].config)
            self._go_to_better()
        turns = 0
        while turns < _PATIENCE and not self._ledger.exhausted:
            learnt = self._learn(self._history[-1].config)
            better = self._go_to_better()
            if not learnt and not better:
                return
            turns = 0 if better else turns + 1

    def _measure_unknown(self, config: BitConfig) -> None:
        """Measure a move of every operand that the descent had no reason to look at: it saved nothing there."""
        moves = [*self._moves(config, direction=1), *self._moves(config, direction=-1)]
        for option in [self._option(config, move) for move in moves]:
            # A down must save something, or no up can be paid with it.
            worth = option.saving > 0 or not option.move.lowers
            if worth and self._predictor.increase(option.move) is None:
                self._measure_all(config, [option])

    def _go_to_better(self) -> bool:
        """Go to the best configuration evaluated so far that fits, if it is better than this one."""
        best = self._ledger.better_fit(self._history[-1].config)
        if best is not None:
            self._arrive(best)
        return best is not None

    def _learn(self, config: BitConfig) -> bool:
        """Evaluate the most promising exchange, and its single changes if it fails; False if there is nothing to do."""
        if not self._lazy:
            self._measure_all(config, [self._option(config, move) for move in self._moves(config)])
            if self._ledger.exhausted:
                return True
        changes = self._promising_changes(config)
        exchange = self._best_exchange(config, changes)
        if exchange is None:
            # Nothing is predicted to gain; the predictions of most weight may be out of date.
            stale = [change.option for change in changes if not self._ledger.knows(change.option.target)]
            self._measure_all(config, stale[:1])
            return bool(stale)
        if self._ledger.loss(exchange.target) >= self._ledger.loss(config):
            self._measure_all(config, exchange.options)
        return True

    def _promising_changes(self, config: BitConfig) -> list[_Change]:
        """Ups and downs that are best at a common price of loss per cost, the best first."""
        options = [self._option(config, move) for move in self._moves(config, reach=_REACH)]
        predictions = [(option, self._prediction(config, option)) for option in options]
        known = [(option, loss) for option, loss in predictions if loss is not None and math.isfinite(loss)]
        gain = max((-loss / -option.saving for option, loss in known if option.saving < 0), default=0.0)
        pain = min((loss / option.saving for option, loss in known if option.saving > 0), default=0.0)
        price = (gain + pain) / 2
        changes = [_Change(option, loss, reduced=loss - price * option.saving) for option, loss in known]
        changes.sort(key=lambda change: change.reduced)
        ups = [change for change in changes if not change.option.move.lowers]
        downs = [change for change in changes if change.option.move.lowers]
        return sorted(ups[:_POOL] + downs[:_POOL], key=lambda change: change.reduced)

    def _best_exchange(self, config: BitConfig, changes: Sequence[_Change]) -> _Exchange | None:
        """The exchange with the largest predicted gain among those that fit and were not evaluated yet."""
        room = 1 - self._ledger.utilisation(config)
        gains = [(sum(change.increase for change in chosen), chosen) for chosen in _combinations(changes, room=room)]
        for _, chosen in sorted(gains, key=lambda gain: gain[0]):
            options = [change.option for change in chosen]
            target = _apply(config, [option.move for option in options])
            if not self._ledger.knows(target) and self._ledger.fits(target):
                return _Exchange(target, options)
        return None

    # Moves and what they cost

    def _moves(self, config: BitConfig, *, direction: int = 0, reach: int = 1) -> Iterator[Move]:
        """Moves of every layer and operand: down (direction -1), up (1) or both (0), by up to `reach` candidates."""
        for path, layer in self._candidates.items():
            for operand in OPERANDS:
                widths: tuple[int, ...] = getattr(layer, operand)
                before = getattr(config[path], operand)
                here = widths.index(before)
                below, above = widths[max(here - reach, 0) : here], widths[here + 1 : here + 1 + reach]
                for after in (below if direction <= 0 else ()) + (above if direction >= 0 else ()):
                    yield Move(path, operand, before, after)

    def _option(self, config: BitConfig, move: Move) -> _Option:
        target = _apply(config, [move])
        cost = self._ledger.utilisation(target)
        return _Option(move, target, utilisation=cost, saving=self._ledger.utilisation(config) - cost)

    def _increase(self, config: BitConfig, option: _Option) -> float:
        """Loss increase of a move: known, predicted, or measured where there is nothing to predict from."""
        predicted = self._prediction(config, option)
        if predicted is not None:
            return predicted
        return math.inf if self._ledger.exhausted else self._measure(config, option)

    def _prediction(self, config: BitConfig, option: _Option) -> float | None:
        if self._ledger.knows(option.target) and self._ledger.knows(config):
            return self._measure(config, option)
        return self._predictor.increase(option.move)

    def _measure_all(self, config: BitConfig, options: Iterable[_Option]) -> None:
        for option in options:
            if not self._ledger.exhausted:
                self._measure(config, option)

    def _measure(self, config: BitConfig, option: _Option) -> float:
        increase = _difference(self._ledger.loss(option.target), self._ledger.loss(config))
        self._predictor.note(option.move, increase)
        return increase


class _Ledger:
    """Every evaluation, each made once; how many there may be; the best configuration among them."""

    def __init__(
        self, evaluate: Callable[[BitConfig], float], utilisation: Callable[[BitConfig], float], *, limit: float
    ) -> None:
        self._evaluate = evaluate
        self._losses: dict[BitConfig, float] = {}
        self._best: BitConfig | None = None
        self.utilisation = utilisation
        self.limit = limit
        self.reserved = 0

    @property
    def count(self) -> int:
        return len(self._losses)

    @property
    def exhausted(self) -> bool:
        return self.count + self.reserved >= self.limit

    def losses(self) -> dict[BitConfig, float]:
        return dict(self._losses)

    def knows(self, config: BitConfig) -> bool:
        return config in self._losses

    def fits(self, config: BitConfig) -> bool:
        return self.utilisation(config) <= 1

    def loss(self, config: BitConfig) -> float:
        if config not in self._losses:
            loss = float(self._evaluate(config))
            self._losses[config] = loss if math.isfinite(loss) else math.inf
            if self.fits(config) and (self._best is None or self._losses[config] < self._losses[self._best]):
                self._best = config
        return self._losses[config]

    @property
    def best_fit(self) -> BitConfig:
        """The best evaluated configuration that fits; uniform ones are evaluated before all else."""
        if self._best is None:
            msg = "nothing that fits was evaluated"
            raise AssertionError(msg)
        return self._best

    def better_fit(self, config: BitConfig) -> BitConfig | None:
        """The best evaluated configuration that fits, if its loss is lower than that of `config`."""
        if self._best is None or self._losses[self._best] >= self._losses[config]:
            return None
        return self._best


class _Predictor:
    """Loss increases of single moves, remembered from other configurations."""

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self._lowerings: dict[tuple[str, Operand], dict[tuple[int, int], float]] = {}

    def note(self, move: Move, increase: float) -> None:
        """Remember a measured loss increase (of an up: with the sign reversed, as that of the down)."""
        low, high = sorted((move.before, move.after))
        known = self._lowerings.setdefault((move.path, move.operand), {})
        known[low, high] = increase if move.lowers else -increase

    def increase(self, move: Move) -> float | None:
        """The loss increase to expect of `move`; None if nothing is known of its operand."""
        known = self._lowerings.get((move.path, move.operand))
        if known is None:
            return None
        low, high = sorted((move.before, move.after))
        widths = [width for width in getattr(self._candidates[move.path], move.operand) if low <= width <= high]
        lowering = known.get((low, high))
        if lowering is None:
            lowering = sum(_extrapolated(known, *pair) for pair in itertools.pairwise(widths))
        return lowering if move.lowers else -lowering


@dataclass(frozen=True)
class _Option:
    """A move that may be made from a configuration, and where it leads."""

    move: Move
    target: BitConfig
    utilisation: float
    saving: float
    loss_below: float = math.inf


@dataclass(frozen=True)
class _Change:
    """An option of an exchange; `reduced` is its predicted loss increase less what its saving is worth."""

    option: _Option
    increase: float
    reduced: float


@dataclass(frozen=True)
class _Exchange:
    """Several options at once, and where they lead."""

    target: BitConfig
    options: list[_Option]


def _uniform_ladder(candidates: Candidates) -> list[BitConfig]:
    """Distinct configurations with one bit-width everywhere (as far as candidates allow), ascending."""
    widths = _widths(candidates, OPERANDS)
    return list(dict.fromkeys(_at_least(Bits(width, width), candidates) for width in widths)) or [BitConfig({})]


def _start(candidates: Candidates, utilisation: Callable[[BitConfig], float]) -> BitConfig:
    """The cheapest uniform configuration that does not fit, with what costs nothing more at its highest."""
    widths = _widths(candidates, OPERANDS)
    configs = {bits: _at_least(bits, candidates) for bits in itertools.starmap(Bits, itertools.product(widths, widths))}
    too_much = [width for width in widths if utilisation(configs[Bits(width, width)]) > 1]
    if not too_much:
        return _at_least(Bits(MAX_BITS, MAX_BITS), candidates)
    width = too_much[0]
    cost = utilisation(configs[Bits(width, width)])
    # A limit on size leaves activations free, for example.
    activation = max(other for other in widths if utilisation(configs[Bits(width, other)]) <= cost)
    weight = max(other for other in widths if utilisation(configs[Bits(other, activation)]) <= cost)
    return configs[Bits(weight, activation)]


def _maximal_pairs(candidates: Candidates, fits: Callable[[BitConfig], bool]) -> list[BitConfig]:
    """Uniform W x A configurations that fit, of which neither operand could be higher."""
    weights, activations = _widths(candidates, ["weight"]), _widths(candidates, ["activation"])
    pairs: list[Bits] = []
    for weight in reversed(weights):
        fitting = [width for width in activations if fits(_at_least(Bits(weight, width), candidates))]
        # Weights fall here, so a pair is maximal if its activations are higher than those of every pair before.
        if fitting and (not pairs or fitting[-1] > pairs[-1].activation):
            pairs.append(Bits(weight, fitting[-1]))
    return [_at_least(pair, candidates) for pair in pairs]


def _widths(candidates: Candidates, operands: Iterable[Operand]) -> list[int]:
    """Bit-widths that occur, ascending."""
    return sorted({width for layer in candidates.values() for operand in operands for width in getattr(layer, operand)})


def _at_least(bits: Bits, candidates: Candidates) -> BitConfig:
    return BitConfig({path: layer.at_least(bits) for path, layer in candidates.items()})


def _apply(config: BitConfig, moves: Iterable[Move]) -> BitConfig:
    changed: dict[str, Bits] = {}
    for move in moves:
        changed[move.path] = replace(changed.get(move.path, config[move.path]), **{move.operand: move.after})
    return config.replace(changed)


def _moves_between(before: BitConfig, after: BitConfig) -> tuple[Move, ...]:
    every = (
        Move(path, operand, getattr(before[path], operand), getattr(after[path], operand))
        for path in after
        for operand in OPERANDS
    )
    return tuple(move for move in every if move.before != move.after)


def _combinations(changes: Sequence[_Change], *, room: float) -> Iterator[tuple[_Change, ...]]:
    """Sets of changes of distinct operands with a predicted gain, and with room for what they cost."""
    for count in range(1, _MOST_CHANGES + 1):
        for chosen in itertools.combinations(changes, count):
            if sum(change.increase for change in chosen) >= 0:
                continue
            paths = {change.option.move.path for change in chosen}
            slack = _SLACK if len(paths) == count else _SLACK_WITHIN_LAYER
            if sum(-change.option.saving for change in chosen) > room + slack:
                continue
            if len({(change.option.move.path, change.option.move.operand) for change in chosen}) == count:
                yield chosen


def _scores(increases: Sequence[float], savings: Sequence[float], *, alpha: float) -> list[float]:
    """The trade of each move, lower is better."""
    pairs = zip(_normalised(increases), _normalised(savings), strict=True)
    return [alpha * increase - saving for increase, saving in pairs]


def _normalised(values: Sequence[float]) -> list[float]:
    """Finite values between their minimum (0) and maximum (1); infinite ones stay."""
    # Halves, since the range of two large floats may overflow.
    halves = [value / 2 for value in values]
    finite = [half for half in halves if math.isfinite(half)]
    lowest, width = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    return [half if math.isinf(half) else (half - lowest) / width if width > 0 else 0.0 for half in halves]


def _extrapolated(known: Mapping[tuple[int, int], float], low: int, high: int) -> float:
    """Loss increase from `high` to `low` bits: known, or scaled from the nearest that is by the law of noise."""
    nearest = min(known, key=lambda widths: (abs(widths[0] - low) + abs(widths[1] - high), widths))
    return known[nearest] * (_noise(low, high) / _noise(*nearest))


def _noise(low: int, high: int) -> float:
    """Quantization noise power that is added from `high` to `low` bits, up to a factor."""
    return 4.0**-low - 4.0**-high


def _difference(after: float, before: float) -> float:
    return 0.0 if after == before else after - before  # two infinite losses do not differ


def _ignore(_step: Step) -> None:
    """The default of `on_step`."""
