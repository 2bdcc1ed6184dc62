"""The methods that the study compares. Each answers one question, which is its group."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import anyprec

Kind = Literal["float", "dedicated", "random paths", "one-shot", "any-precision"]
Group = Literal["core", "weight", "ablation", "rate", "variant", "interference"]
GROUPS: tuple[Group, ...] = get_args(Group)
"""Which question a method answers."""

PLAIN = {"sampler": "uniform", "random_weight": 1.0}
PAIRS = {"norm": "per-pair"}
"""Where our defaults differ: uniform draws and a norm per pair are the paper's; all random paths
together count as much as the max path."""

SCHEDULER = {"scheduler": anyprec.BitWidthScheduler()}
FEATURES = {"feature_weight": 0.01}
FULL = {**SCHEDULER, **FEATURES, "error_weight": 0.1, "spare_decay": True}
SANDWICH = {"sampler": "sandwich"}
AFFINE = {"norm": "shared-affine"}
OURS = {**SANDWICH, "random_weight": 2.0}
"""With `AFFINE`, the defaults of anyprec."""

RATES = {"half": 0.5, "double": 2.0}
"""Other learning rates, to see that the track's favours nobody."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train.

    Attributes:
        name: For results and commands.
        title: For the page.
        group: Which question it answers; it sets the order of the runs.
        kind: What trains it.
        widths: Uniform bit-widths that it is trained for and reported at.
        recipe: Settings of `anyprec.Recipe`, besides those of the track.
        rate: Times the track's learning rate.
        convert: Arguments of `anyprec.convert`, besides the candidates.
    """

    name: str
    title: str
    group: Group
    kind: Kind
    widths: tuple[int, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    convert: Mapping[str, Any] = field(default_factory=PAIRS.copy)

    @property
    def passes(self) -> int:
        """Forward-backward passes in a step."""
        if not self.is_shared:
            return 1
        if self.kind == "any-precision":
            return len(self.widths)
        random_paths: int = self.recipe.get("random_paths", 3)
        return 1 + random_paths

    @property
    def is_shared(self) -> bool:
        """Whether one set of weights serves several configurations."""
        return self.kind in {"random paths", "one-shot", "any-precision"}


def methods(widths: Sequence[int]) -> dict[str, Method]:
    """All methods, for these candidate bit-widths."""
    widths = tuple(sorted(widths))
    core = list(_core(widths))
    listed = [*core, *_parts(widths), *_rates(core), *_interference(widths), *_variants(widths)]
    return {method.name: method for method in listed}


def _core(widths: tuple[int, ...]) -> Iterator[Method]:
    yield Method(name="float", title="float", group="core", kind="float", widths=())
    for width in widths:
        yield Method(
            name=f"dedicated-{width}",
            title=f"dedicated, {width} bits",
            group="core",
            kind="dedicated",
            widths=(width,),
        )
    title = "ours: sandwich + shared affine + weight 2"
    yield _one_shot(widths, "ours", title, group="core", recipe=OURS, convert=AFFINE)
    yield _one_shot(widths, "plain", "one-shot, plain", group="core")
    yield _one_shot(widths, "full", "full method", group="core", recipe=FULL)


def _parts(widths: tuple[int, ...]) -> Iterator[Method]:
    """Plain one-shot training without and with single parts of the full method and of ours."""
    yield Method(
        name="random",
        title="random paths and labels only",
        group="ablation",
        kind="random paths",
        widths=widths,
    )
    yield _one_shot(widths, "scheduler", "plain + scheduler", recipe=SCHEDULER)
    yield _one_shot(widths, "distortion", "plain + distortion mitigation", recipe=FEATURES)
    yield _one_shot(widths, "both", "plain + both", recipe={**SCHEDULER, **FEATURES})
    yield _one_shot(widths, "sandwich", "plain + sandwich", recipe=SANDWICH)
    yield _one_shot(widths, "affine", "plain + shared affine", convert=AFFINE)
    heavier = {**SANDWICH, "random_weight": 1.5}
    for name, title, recipe in (
        ("sandwich-affine", "plain + sandwich + shared affine", SANDWICH),
        ("weight-1.5", "the same, weight 1.5", heavier),
    ):
        yield _one_shot(widths, name, title, group="weight", recipe=recipe, convert=AFFINE)
    yield Method(
        name="any-precision",
        title="Any-Precision DNN",
        group="ablation",
        kind="any-precision",
        widths=widths,
        recipe={"distillation": 0.0, "random_weight": len(widths) - 1.0},
        convert=PAIRS,  # only uniform pairs are trained: a copy per bit-width, as in the paper
    )


def _rates(core: Sequence[Method]) -> Iterator[Method]:
    """Ours and the extreme dedicated networks at other learning rates."""
    dedicated = [method for method in core if method.kind == "dedicated"]
    ours = next(method for method in core if method.name == "ours")
    for method in (dedicated[0], dedicated[-1], ours):
        for times, rate in RATES.items():
            yield dataclasses.replace(
                method,
                name=f"{method.name}-{times}-rate",
                title=f"{method.title}, {times} rate",
                group="rate",
                rate=rate,
            )


def _interference(widths: tuple[int, ...]) -> Iterator[Method]:
    """Random paths of more and more candidates; all of them are the method `random`."""
    for start in range(len(widths) - 2, 0, -1):
        yield Method(
            name=f"random-{widths[start]}-up",
            title=f"random paths of {widths[start]} bits and more",
            group="interference",
            kind="random paths",
            widths=widths[start:],
        )


def _variants(widths: tuple[int, ...]) -> Iterator[Method]:
    """Ours with one choice made in another way."""
    corrected, per_tensor = {**AFFINE, "norm": "shared"}, {**AFFINE, "per_channel": False}
    for name, title, recipe, convert in (
        ("norm-shared", "one norm, weights corrected", {}, corrected),
        ("one-path", "1 path: the lowest or a random one", {"random_paths": 1}, AFFINE),
        ("two-paths", "2 paths: the lowest, 1 random", {"random_paths": 2}, AFFINE),
        ("per-tensor", "weight steps per tensor", {}, per_tensor),
        ("instability", "instability sampler", {"sampler": "instability"}, AFFINE),
    ):
        yield _one_shot(
            widths,
            f"ours-{name}",
            title,
            group="variant",
            recipe={**OURS, **recipe},
            convert=convert,
        )


def _one_shot(
    widths: tuple[int, ...],
    name: str,
    title: str,
    *,
    group: Group = "ablation",
    recipe: Mapping[str, Any] | None = None,
    convert: Mapping[str, Any] = PAIRS,
) -> Method:
    """Plain one-shot training, but for what `recipe` and `convert` change."""
    return Method(
        name=name,
        title=title,
        group=group,
        kind="one-shot",
        widths=widths,
        recipe={**PLAIN, **(recipe or {})},
        convert=convert,
    )
