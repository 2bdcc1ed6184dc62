"""What the study compares: tracks (networks, images, epochs), methods, and the order of the runs.

A run is a track, a network, a method and a seed. Within one seed of a network all methods start from the same float network,
which was trained (or, pretrained, fine-tuned) for `start_epochs`, and take the same number of optimizer steps from there on
the same images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock
from torch import nn

import anyprec
from anyprec.bits import Candidates
from anyprec.training.losses import distillation_loss
from anyprec.training.scheduler import Instability
from benchmarks.common.pretrained import efficientnet_lite0

REVISION = 2
"""Of what anyprec trains: results from before a change of its quantizers or of its training step are another study's. 2: step
sizes learn at the speed of their range."""

Kind = Literal["float", "dedicated", "random paths", "one-shot", "any-precision"]
Group = Literal["core", "weight", "ablation", "rate", "variant", "interference"]
GROUPS: tuple[Group, ...] = get_args(Group)
"""Which question a method answers."""


# --- Networks -----------------------------------------------------------------------------------------------------


def thin_resnet(num_classes: int) -> nn.Module:
    """A timm ResNet of four basic blocks, 0.13 M parameters; at 32 px its stages see 16, 8, 4 and 2 positions."""
    settings: dict[str, Any] = {
        "block": BasicBlock,
        "layers": (1, 1, 1, 1),
        "channels": (16, 32, 48, 64),
        "stem_width": 8,
    }
    network = timm.create_model("test_resnet", num_classes=num_classes, **settings)
    network.maxpool = nn.Identity()
    return network


def small_mobile(num_classes: int) -> nn.Module:
    """A timm EfficientNet with the blocks of MobileNetV2, 0.1 M parameters; 16, 8 and 4 positions at 32 px."""
    blocks = [
        ["ds_r1_k3_s1_c16"],
        ["ir_r2_k3_s2_e6_c24"],
        ["ir_r2_k3_s2_e6_c40"],
        ["ir_r1_k3_s1_e6_c64"],
    ]
    return EfficientNet(
        decode_arch_def(blocks),
        num_classes=num_classes,
        num_features=256,
        stem_size=16,
        act_layer=nn.ReLU6,
    )


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet": thin_resnet,
    "mobile": small_mobile,
    "lite0": efficientnet_lite0,
}
"""How each network is made."""


# --- Tracks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Track:
    """Networks, images and length of training.

    Attributes:
        name: One letter.
        title: For the page.
        networks: Keys of `NETWORKS`.
        pretrained: Whether they have seen other images before.
        seeds: Of initial values, order of the images, augmentation and draws.
        fewer: The seeds of groups of methods that do not have all.
        bits: Candidate bit-widths.
        size: Of an image.
        images: To train on.
        search_images: To search on; others of the training archive.
        report_images: To report on; of the other archive.
        mixed_images: The first so many of these, for the random configurations.
        batch_size: In training.
        start_epochs, start_lr: Training of the float network that all methods start from.
        epochs, lr: Training of each method.
        weight_decay: In both.
        norm_batches: Training batches for norm statistics.
        mixed: Random configurations.
        search_evaluations: At most so many for one budget.
        search_norms: Statistics that the search judges by: those of the batch, as what it finds gets statistics of its own.
        searches: The methods for which budgets are searched.
    """

    name: str
    title: str
    networks: tuple[str, ...]
    pretrained: bool = False
    seeds: tuple[int, ...]
    fewer: Mapping[Group, tuple[int, ...]] = field(default_factory=dict)
    bits: tuple[int, ...] = anyprec.model.conversion.DEFAULT_BITS
    size: int
    images: int
    search_images: int
    report_images: int = 5_000
    mixed_images: int
    batch_size: int
    start_epochs: int
    start_lr: float
    epochs: int
    lr: float
    weight_decay: float
    norm_batches: int = 16
    mixed: int = 20
    search_evaluations: int
    search_norms: anyprec.searching.evaluator.Norms = "batch"
    searches: tuple[str, ...] = ("plain", "full", "ours")

    @property
    def steps(self) -> int:
        """Optimizer steps of a method."""
        return self.epochs * (self.images // self.batch_size)

    def seeds_of(self, group: Group) -> tuple[int, ...]:
        """The seeds of the methods of a group."""
        return self.fewer.get(group, self.seeds)

    def settings(self, *, shared: bool) -> dict[str, Any]:
        """What results depend on: results of other settings are another study's.

        Args:
            shared: Whether one set of weights serves several configurations; otherwise nothing is mixed or searched.
        """
        left_out = {"name", "title", "networks", "pretrained", "seeds", "fewer", "searches"}
        if not shared:
            left_out |= {name for name in vars(self) if name.startswith(("mixed", "search"))}
        values = {name: value for name, value in vars(self).items() if name not in left_out}
        return {**values, "bits": list(self.bits)}


_CORE_ONLY: dict[Group, tuple[int, ...]] = {group: () for group in GROUPS if group != "core"}

TRACKS: dict[str, Track] = {
    "S": Track(
        name="S",
        title="from scratch",
        networks=("resnet", "mobile"),
        seeds=(0, 1, 2),
        fewer={"ablation": (0,), "rate": (0,), "interference": (0,), "variant": (0,)},
        size=32,
        images=12_500,
        search_images=1_024,
        mixed_images=2_500,
        batch_size=125,
        start_epochs=9,
        start_lr=0.1,
        epochs=5,
        lr=0.1,
        weight_decay=1e-4,
        search_evaluations=250,
    ),
    "P": Track(
        name="P",
        title="pretrained",
        networks=("lite0",),
        pretrained=True,
        seeds=(0,),
        fewer=_CORE_ONLY,
        size=64,
        images=3_500,
        search_images=768,
        report_images=2_500,
        mixed_images=500,
        batch_size=50,
        start_epochs=2,
        start_lr=0.02,
        epochs=3,
        lr=0.02,
        weight_decay=2.5e-5,
        search_evaluations=400,
        searches=("ours",),
    ),
    "A": Track(
        name="A",
        title="pretrained, all images, on an accelerator",
        networks=("lite0",),
        pretrained=True,
        seeds=(0, 1),
        fewer=_CORE_ONLY,
        size=64,
        images=49_000,
        search_images=1_000,
        mixed_images=2_500,
        batch_size=250,
        start_epochs=2,
        start_lr=0.04,
        epochs=2,
        lr=0.04,
        weight_decay=2.5e-5,
        search_evaluations=250,
        searches=("ours",),
    ),
}
"""S and P fit two cores; A is for an accelerator, and only runs when it is asked for."""


def tiny(track: Track) -> Track:
    """The same track with hardly any images, to try the commands: its numbers mean nothing."""
    changes: dict[str, Any] = {
        "images": 4 * track.batch_size,
        "search_images": 32,
        "report_images": 200,
        "mixed_images": 100,
    }
    lengths: dict[str, Any] = {
        "start_epochs": 1,
        "epochs": 1,
        "norm_batches": 2,
        "mixed": 2,
        "search_evaluations": 40,
    }
    return dataclasses.replace(track, **changes, **lengths)


# --- Methods ------------------------------------------------------------------------------------------------------


PLAIN = {"sampler": "uniform", "random_weight": 1.0}
PAIRS = {"norm": "per-pair"}
"""Where our defaults are others: uniform draws and a norm per pair as in the paper, and all random paths together count as
much as the max path."""


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
        if self.kind in {"float", "dedicated"}:
            return 1
        return (
            len(self.widths)
            if self.kind == "any-precision"
            else 1 + self.recipe.get("random_paths", 3)
        )

    def is_whole(self, track: Track) -> bool:
        """Whether it serves all configurations of the track's candidates."""
        return self.is_shared and self.widths == track.bits

    def searches(self, track: Track) -> bool:
        """Whether budgets are searched for it."""
        return self.name in track.searches and self.is_whole(track)

    @property
    def is_shared(self) -> bool:
        """Whether one set of weights serves several configurations."""
        return self.kind in {"random paths", "one-shot", "any-precision"}


SCHEDULER = {"scheduler": anyprec.BitWidthScheduler()}
FEATURES = {"feature_weight": 0.01}
FULL = {**SCHEDULER, **FEATURES, "error_weight": 0.1, "spare_decay": True}
SANDWICH = {"sampler": "sandwich"}
AFFINE = {"norm": "shared-affine"}
OURS = {**SANDWICH, "random_weight": 2.0}
"""With `AFFINE`, the defaults of anyprec."""
RATES = {"half": 0.5, "double": 2.0}
"""Other learning rates, to see that the track's favours nobody."""


def methods(widths: Sequence[int]) -> dict[str, Method]:
    """All methods, for these candidate bit-widths."""
    every = tuple(sorted(widths))
    found = [Method(name="float", title="float", group="core", kind="float", widths=())]
    found += [
        Method(name=f"dedicated-{width}", title=f"dedicated, {width} bits", group="core", kind="dedicated", widths=(width,))
        for width in every
    ]  # fmt: skip
    found += [
        _one_shot(every, "ours", "ours: sandwich + shared affine + weight 2", "core", OURS, AFFINE),
        _one_shot(every, "plain", "one-shot, plain", "core", {}),
        _one_shot(every, "full", "full method", "core", FULL),
        Method(
            name="random",
            title="random paths and labels only",
            group="ablation",
            kind="random paths",
            widths=every,
        ),
        _one_shot(every, "scheduler", "plain + scheduler", "ablation", SCHEDULER),
        _one_shot(every, "distortion", "plain + distortion mitigation", "ablation", FEATURES),
        _one_shot(every, "both", "plain + both", "ablation", {**SCHEDULER, **FEATURES}),
        _one_shot(every, "sandwich", "plain + sandwich", "ablation", SANDWICH),
        _one_shot(every, "affine", "plain + shared affine", "ablation", {}, AFFINE),
        _one_shot(
            every, "sandwich-affine", "plain + sandwich + shared affine", "weight", SANDWICH, AFFINE
        ),
        _one_shot(
            every,
            "weight-1.5",
            "the same, weight 1.5",
            "weight",
            {**SANDWICH, "random_weight": 1.5},
            AFFINE,
        ),
        Method(
            name="any-precision",
            title="Any-Precision DNN",
            group="ablation",
            kind="any-precision",
            widths=every,
            recipe={"distillation": 0.0, "random_weight": len(every) - 1.0},
            convert=PAIRS,  # only uniform pairs are trained: a copy per weight bit-width, as in the paper
        ),
    ]
    for held in (f"dedicated-{every[0]}", f"dedicated-{every[-1]}", "ours"):
        (at_one,) = (method for method in found if method.name == held)
        found += [
            dataclasses.replace(
                at_one,
                name=f"{held}-{times}-rate",
                title=f"{at_one.title}, {times} rate",
                group="rate",
                rate=rate,
            )
            for times, rate in RATES.items()
        ]
    found += [
        Method(
            name=f"random-{every[lowest]}-up",
            title=f"random paths of {every[lowest]} bits and more",
            group="interference",
            kind="random paths",
            widths=every[lowest:],
        )
        for lowest in range(len(every) - 2, 0, -1)
    ]
    found += [
        _variant(every, "norm-shared", "one norm, weights corrected", convert={"norm": "shared"}),
        _variant(every, "one-path", "1 path: the lowest or a random one", random_paths=1),
        _variant(every, "two-paths", "2 paths: the lowest, 1 random", random_paths=2),
        _variant(every, "per-tensor", "weight steps per tensor", convert={"per_channel": False}),
        _variant(every, "instability", "instability sampler", sampler="instability"),
    ]
    return {method.name: method for method in found}


def _one_shot(
    widths: tuple[int, ...],
    name: str,
    title: str,
    group: Group,
    recipe: Mapping[str, Any],
    convert: Mapping[str, Any] = PAIRS,
) -> Method:
    recipe = {**PLAIN, **recipe}
    return Method(
        name=name,
        title=title,
        group=group,
        kind="one-shot",
        widths=widths,
        recipe=recipe,
        convert=convert,
    )


def _variant(
    widths: tuple[int, ...],
    name: str,
    title: str,
    *,
    convert: Mapping[str, Any] | None = None,
    **recipe: Any,
) -> Method:
    return _one_shot(
        widths, f"ours-{name}", title, "variant", {**OURS, **recipe}, {**AFFINE, **(convert or {})}
    )


@dataclass(frozen=True)
class DescendingWidths:
    """A sampler for Any-Precision DNN: every layer at the second highest bit-width, then the third, and so on.

    Any-Precision DNN (Yu et al., AAAI 2021) knows uniform bit-widths only.
    """

    widths: tuple[int, ...]

    def draw(
        self,
        candidates: Candidates,
        count: int,
        *,
        generator: torch.Generator,
        instability: Instability,
    ) -> list[anyprec.BitConfig]:
        """See `anyprec.training.samplers.Sampler`."""
        del generator, instability  # nothing is drawn
        descending = sorted(self.widths, reverse=True)[1:]
        return [anyprec.bits.uniform(width, candidates) for width in descending[:count]]


class RecursiveDistillation:
    """Criterion of Any-Precision DNN: labels for the highest bit-width, for each lower one the next higher's predictions.

    Args:
        passes: In a step; the first one is the highest bit-width's.
    """

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self._done = 0
        self._target = torch.empty(0)

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of the next pass."""
        first = self._done == 0
        loss = (
            nn.functional.cross_entropy(logits, labels)
            if first
            else distillation_loss(logits, self._target)
        )
        self._target = logits.detach()
        self._done = (self._done + 1) % self._passes
        return loss


# --- Runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    track: Track
    network: str
    method: Method
    seed: int

    @property
    def name(self) -> str:
        """As `--only` has it."""
        return f"{self.track.name}/{self.network}/{self.method.name}/{self.seed}"

    @property
    def start_name(self) -> str:
        """Of the network that it starts from."""
        return f"{self.track.name}/{self.network}/{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What its results depend on."""
        settings = self.track.settings(shared=self.method.is_shared)
        if self.method.is_shared:
            settings["searches"] = self.method.searches(self.track)
        return settings if self.method.kind == "float" else {**settings, "revision": REVISION}


_ORDER = (
    ("core", "first"),
    ("core", "others"),
    ("weight", "first"),
    ("weight", "others"),
    ("ablation", "first"),
    ("rate", "first"),
    ("variant", "first"),
    ("interference", "first"),
    ("ablation", "others"),
    ("rate", "others"),
    ("variant", "others"),
    ("interference", "others"),
)


def grid(tracks: Sequence[Track], *, seeds: int | None = None) -> list[Run]:
    """All runs, the most valuable first: if they are stopped halfway, what is there can be used.

    Args:
        tracks: Which ones.
        seeds: At most so many of each group of methods.
    """
    runs = [
        Run(track, network, method, seed)
        for seed in sorted({seed for track in tracks for seed in track.seeds})
        for track in tracks
        for network in track.networks
        for method in methods(track.bits).values()
        if seed in track.seeds_of(method.group)[:seeds]
    ]
    return sorted(runs, key=_rank)


def _rank(run: Run) -> int:
    which = "first" if run.seed == run.track.seeds_of(run.method.group)[0] else "others"
    return _ORDER.index((run.method.group, which))
