"""Whether two versions of the code train the same weights.

    python -m benchmarks.speed.same_training --output REFERENCE.safetensors   # the one version
    python -m benchmarks.speed.same_training --against REFERENCE.safetensors  # the other

Small networks are trained for 20 one-shot steps from fixed seeds, by the default recipe and by one
with every term of the loss and the scheduler. A digest of each tells
at a glance whether anything differs at all. With `--against`, the largest difference of each kind
of tensor is printed, over the largest magnitude of the tensor.

`--noise 1e-7` multiplies the gradients of step sizes by `1 + 1e-7 * N(0, 1)`, about what another
order of summation does in float32. Against a run without it, that shows what rounding alone becomes
after 20 steps: a weight on a rounding threshold can take the other code.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import anyprec
from anyprec.model.converted import ConvertedModel
from anyprec.training.parameters import STEP_SIZES
from benchmarks.common import pages
from benchmarks.speed.small_networks import CLASSES, make_pair

NETWORKS = ("resnet18", "test_efficientnet", "vit_tiny_patch16_224", "test_nfnet")
STEPS = 20
BATCH = 8
STEP_LR_SCALE = 0.1
"""Step sizes learn slowly: one that nears zero would make any two runs differ."""

RECIPES = {
    "plain": anyprec.Recipe(lr=1e-3, conversion={"bits": (4, 6, 8)}),
    "all terms": anyprec.Recipe(
        feature_weight=0.01,
        error_weight=0.1,
        error_start=0.1,
        scheduler=anyprec.BitWidthScheduler(start=0.1, period=0.2, late=0.9),
        sampler="uniform",
        spare_decay=True,
        lr=1e-3,
        clip_norm=5.0,
        conversion={"norm": "per-pair", "bits": (2, 4, 6, 8)},
    ),
}


def main() -> None:
    """Train, print digests, and save or compare the weights."""
    options = make_parser().parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trained: dict[str, Tensor] = {}
    for network in options.networks:
        for label, recipe in RECIPES.items():
            weights = train(network, recipe, noise=options.noise)
            print(f"{network}, {label}: {digest(weights)}", flush=True)
            for name, tensor in weights.items():
                trained[f"{network}|{label}|{name}"] = tensor
    if options.output is not None:
        save_file(trained, options.output)
    if options.against is not None:
        print(pages.markdown(compare(load_file(options.against), trained), texts=4))


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--output", type=Path, help="write the weights to this file")
    parser.add_argument("--against", type=Path, help="compare with the weights of this file")
    parser.add_argument("--noise", type=float, default=0.0, help="relative, on step gradients")
    return parser


def train(network: str, recipe: anyprec.Recipe, *, noise: float) -> dict[str, Tensor]:
    """All parameters and buffers after the training of a network."""
    pair = make_pair(network, batch=BATCH, **recipe.conversion)
    model = pair.model
    model.train()
    optimizer = make_optimizer(model, recipe)
    oneshot = anyprec.OneShot(model, total_steps=STEPS, recipe=recipe)
    if recipe.spare_decay:
        oneshot.exempt_from_decay(optimizer)
    generator = torch.Generator().manual_seed(1)
    noise_generator = torch.Generator().manual_seed(3)
    torch.manual_seed(2)
    for _ in range(STEPS):
        images = torch.randn(pair.images.shape, generator=generator)
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        for path in oneshot.paths():
            path.loss(model(images), labels, nn.functional.cross_entropy).backward()
        if noise:
            disturb(optimizer, noise, noise_generator)
        recipe.clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        oneshot.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def make_optimizer(model: ConvertedModel, recipe: anyprec.Recipe) -> torch.optim.Optimizer:
    """SGD, as in `fit`."""
    groups = anyprec.param_groups(
        model, lr=recipe.lr, weight_decay=recipe.weight_decay, step_lr_scale=STEP_LR_SCALE
    )
    return torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=True)


def disturb(optimizer: torch.optim.Optimizer, noise: float, generator: torch.Generator) -> None:
    """Multiply gradients of step sizes by a little noise."""
    for group in optimizer.param_groups:
        if group["name"] != STEP_SIZES:
            continue
        for step in group["params"]:
            if step.grad is not None:
                step.grad *= 1 + noise * torch.randn(step.shape, generator=generator)


def digest(weights: Mapping[str, Tensor]) -> str:
    """Twelve characters that differ if any bit of any tensor does."""
    hashed = hashlib.sha256()
    for name in sorted(weights):
        hashed.update(name.encode())
        hashed.update(weights[name].contiguous().numpy().tobytes())
    return hashed.hexdigest()[:12]


def compare(reference: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> pd.DataFrame:
    """Largest relative difference of each kind of tensor, and the tensor that has it."""
    rows = []
    for name, tensor in weights.items():
        network, recipe, path = name.split("|")
        rows.append(
            {
                "network": network,
                "recipe": recipe,
                "tensor": path,
                "kind": path.rpartition(".")[2],
                "difference": relative_difference(reference[name], tensor),
            }
        )
    table = pd.DataFrame(rows)
    worst = table.loc[table.groupby(["network", "recipe", "kind"]).difference.idxmax()]
    worst = worst.sort_values(["network", "recipe", "difference"], ascending=[True, True, False])
    worst["difference"] = worst.difference.map("{:.1e}".format)
    return worst[["network", "recipe", "kind", "tensor", "difference"]]


def relative_difference(reference: Tensor, tensor: Tensor) -> float:
    """Largest difference of elements, over the largest magnitude of the reference.

    What is missing in both is equal; what is missing in one of them differs infinitely.
    """
    if not torch.equal(reference.isnan(), tensor.isnan()):
        return math.inf
    expected, actual = reference.double().nan_to_num(), tensor.double().nan_to_num()
    largest = expected.abs().max().clamp_min(1e-30)
    return float((expected - actual).abs().max() / largest)


if __name__ == "__main__":
    main()
