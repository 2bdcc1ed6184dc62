"""The grid of the study: tracks (networks, images, epochs) and the order of the runs.

A run is a track, a network, a method and a seed. Within one seed of a network all methods start
from the same float network, which was trained (or, pretrained, fine-tuned) for `start_epochs`.
From there on they take the same number of optimizer steps on the same images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyprec
from benchmarks.study.methods import GROUPS, Group, Method, methods

REVISION = 2
"""Of what anyprec trains: results from before a change of its quantizers or of its training step
are another study's. 2: step sizes learn at the speed of their range."""


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
        search_norms: Statistics that the search judges by: those of the batch, as what it finds
            gets statistics of its own.
        searches: The methods for which budgets are searched.
    """

    name: str
    title: str
    networks: tuple[str, ...]
    pretrained: bool = False
    seeds: tuple[int, ...]
    fewer: Mapping[Group, tuple[int, ...]] = field(default_factory=dict)
    bits: tuple[int, ...] = anyprec.model.presets.DEFAULT_BITS
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
    search_norms: anyprec.searching.evaluator.SearchNorms = "batch"
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
            shared: Whether one set of weights serves several configurations. Otherwise nothing is
                mixed or searched.
        """
        settings = {**vars(self), "bits": list(self.bits)}
        for name in vars(self):
            is_of_shared = name.startswith(("mixed", "search"))
            if name in _NOT_SETTINGS or (is_of_shared and not shared):
                del settings[name]
        return settings

    def serves_all(self, method: Method) -> bool:
        """Whether a method's weights serve all configurations of the candidates."""
        return method.is_shared and method.widths == self.bits

    def searches_for(self, method: Method) -> bool:
        """Whether budgets are searched for a method."""
        return method.name in self.searches and self.serves_all(method)


_NOT_SETTINGS = {"name", "title", "networks", "pretrained", "seeds", "fewer", "searches"}

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
            settings["searches"] = self.track.searches_for(self.method)
        if self.method.kind != "float":
            settings["revision"] = REVISION
        return settings


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
    # Sorting is stable: within a seed the order is that of tracks, networks and methods.
    return sorted(_unordered(tracks, seeds), key=lambda run: (_rank(run), run.seed))


def _unordered(tracks: Sequence[Track], seeds: int | None) -> Iterator[Run]:
    for track in tracks:
        for network in track.networks:
            for method in methods(track.bits).values():
                for seed in track.seeds_of(method.group)[:seeds]:
                    yield Run(track, network, method, seed)


def _rank(run: Run) -> int:
    which = "first" if run.seed == run.track.seeds_of(run.method.group)[0] else "others"
    return _ORDER.index((run.method.group, which))
