"""Small networks and data that many tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Tests run side by side, one thread each. The last bit of a sum may depend on it, so processes
# that tests start have it too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import timm
import torch
from filelock import FileLock
from torch import Tensor, nn

import anyprec
from tests import processes

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def under_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes wrote under torchrun: one launch for all tests."""
    temporary = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        temporary = temporary.parent  # the run's own folder, which its workers share
    folder = temporary / "torchrun"
    with FileLock(temporary / "torchrun.lock"):
        if not folder.exists():
            folder.mkdir()
            processes.torchrun("tests.under_torchrun", folder)
    return folder


class SmallNet(nn.Module):
    """A stem, a depthwise block with a sum, a concatenation, a classifier: each kind of edge."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 8, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(8)
        self.joint_norm = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.depthwise_norm(self.depthwise(x)))
        y = self.pointwise_norm(self.pointwise(y))
        x = torch.cat((x + y, y), dim=1)
        x = nn.functional.silu(self.head(nn.functional.silu(self.joint_norm(x))))
        return self.fc(x.mean(dim=(2, 3)))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(8) % 5


@pytest.fixture
def loader() -> list[tuple[Tensor, Tensor]]:
    """Images whose class is the channel that is brighter than the others."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(6):
        labels = torch.randint(3, (16,), generator=generator)
        images = torch.randn(16, 3, 16, 16, generator=generator)
        images[torch.arange(16), labels] += 1.0
        batches.append((images, labels))
    return batches


@pytest.fixture
def float_net() -> nn.Module:
    """A float network whose norms have seen data, so that statistics are not the trivial ones."""
    net = SmallNet()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(16, 3, 16, 16))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return net.eval()


@pytest.fixture
def net(float_net: nn.Module, images: Tensor) -> anyprec.ConvertedModel:
    """The same network, converted and calibrated."""
    model = anyprec.convert(float_net, bits=(2, 3, 4, 8), example_input=images[:1])
    anyprec.calibrate(model, [images])
    return model


@pytest.fixture
def small_net() -> Callable[..., nn.Module]:
    return SmallNet


@pytest.fixture
def converted() -> Callable[..., anyprec.ConvertedModel]:
    """Makes a converted and calibrated timm network at a small image size."""

    def make(
        name: str, *, size: int = 64, bits: tuple[int, ...] = (2, 4, 8), **arguments: object
    ) -> anyprec.ConvertedModel:
        batch = torch.randn(4, 3, size, size)
        model = anyprec.convert(
            timm.create_model(name, **arguments).eval(), bits=bits, example_input=batch[:1]
        )
        anyprec.calibrate(model, [batch])
        return model

    return make
