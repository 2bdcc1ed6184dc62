"""One-shot training in a loop of one's own with Hugging Face Accelerate (extra `accelerate`).

    python examples/accelerate_loop.py
    accelerate launch --num-processes 2 --cpu examples/accelerate_loop.py

Trains a small network on scikit-learn's digits, for all bit-widths at once, in as many processes as
Accelerate starts, and prints the accuracy on held-out images at several precisions.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext

import timm
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import anyprec


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=1500, help="training images")
    args = parser.parse_args()
    accelerator = Accelerator()
    torch.manual_seed(0)
    images, labels = digits()
    dataset = TensorDataset(images[: args.images], labels[: args.images])
    loader = DataLoader(dataset, batch_size=50, shuffle=True)

    network = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    model = anyprec.convert(network, example_input=images[:1])
    anyprec.calibrate(model, loader)
    groups = anyprec.param_groups(model, lr=0.1)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    network, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    total_steps = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total_steps)
    recipe = anyprec.Recipe(feature_weight=0.01, scheduler=anyprec.BitWidthScheduler())
    oneshot = anyprec.OneShot(model, total_steps=total_steps, recipe=recipe)

    network.train()
    for _ in range(args.epochs):
        for batch, targets in loader:
            for path in oneshot.paths():
                with synchronising(accelerator, network, is_last=path.is_last):
                    loss = path.loss(network(batch), targets, nn.functional.cross_entropy)
                    accelerator.backward(loss)
            accelerator.clip_grad_value_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            oneshot.step()
    anyprec.update_norms(model, loader, batches=16, include_float=True)

    model.eval()
    held_out, expected = images[1500:].to(accelerator.device), labels[1500:]
    for bits in (8, 4, 3, 2):
        with model.using_bits(bits), torch.no_grad():
            predicted = model(held_out).argmax(dim=1).cpu()
        accuracy = (predicted == expected).float().mean().item()
        accelerator.print(f"W{bits}A{bits}: {accuracy:.1%}")


def synchronising(
    accelerator: Accelerator, network: nn.Module, *, is_last: bool
) -> AbstractContextManager[None]:
    """Reduce gradients over the processes in the last backward pass of a step only."""
    if is_last:
        return nullcontext()
    return accelerator.no_sync(network)


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of handwritten digits, shape `(1, 32, 32)`, shuffled, and their labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order, None] / 8 - 1
    images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear")
    return images, torch.from_numpy(data.target)[order]


if __name__ == "__main__":
    main()
