"""Compiled networks: the numbers of eager ones, and no compilation when bit-widths change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import anyprec
from anyprec.nn.functional import fake_quantize, fake_quantize_with


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


class Net(nn.Module):
    """One of each kind of norm and layer, and no more: each takes seconds to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.stem_norm = nn.BatchNorm2d(4)
        self.pointwise = nn.Conv2d(4, 4, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(4)
        self.joint_norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = self.pointwise_norm(self.pointwise(x))
        x = self.head(torch.relu(self.joint_norm(torch.cat((x + y, y), dim=1))))
        return self.fc(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_limits_as_data_give_the_same_values_and_gradients(bits: int, axis: int | None) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    start = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    steps = torch.tensor(0.3) if axis is None else 0.1 + torch.rand(start.shape[axis])
    found = []
    for use_data in (False, True):
        values, step = start.clone().requires_grad_(), steps.double().clone().requires_grad_()
        if use_data:
            limits = {"qmin": torch.tensor([float(low)]), "qmax": torch.tensor([float(high)])}
            result = fake_quantize_with(
                values, step, axis=axis, gradient_scale=torch.tensor([0.1]), **limits
            )
        else:
            result = fake_quantize(values, step, qmin=low, qmax=high, axis=axis, gradient_scale=0.1)
        (result * torch.arange(result.numel()).reshape(result.shape)).sum().backward()
        found.append((result.detach(), values.grad, step.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore::anyprec.StaleNormsWarning")  # equal programs are the matter
@pytest.mark.parametrize("norm", ["per-pair", "shared-affine", "shared"])
def test_training_and_evaluation_are_compiled_once_whatever_the_bits(
    norm: str, images: Tensor, labels: Tensor
) -> None:
    net = anyprec.convert(Net().eval(), bits=(2, 3, 4, 8), norm=norm, example_input=images[:1])
    anyprec.calibrate(net, [images])
    eager = copy.deepcopy(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    settings = {
        "feature_weight": 0.1, "error_weight": 0.1, "error_start": 0.0,
        "scheduler": anyprec.BitWidthScheduler(start=0.0, period=0.1),
    }  # fmt: skip
    oneshots = [
        anyprec.OneShot(net, total_steps=5, compiled=True, **settings),
        anyprec.OneShot(eager, total_steps=5, **settings),
    ]
    for model, network, oneshot in zip((net, eager), (compiled, eager), oneshots, strict=True):
        optimizer = torch.optim.SGD(anyprec.param_groups(model, lr=0.01), lr=0.01)
        model.train()
        for _ in range(5):
            for path in oneshot.paths():
                path.loss(network(images), labels, F.cross_entropy).backward()
            optimizer.step()
            optimizer.zero_grad()
            oneshot.step()
    assert net.frozen == eager.frozen
    for name, value in net.state_dict().items():
        # Sums in another order, and the roundings that they flip.
        torch.testing.assert_close(
            value, eager.state_dict()[name], rtol=1e-2, atol=1e-3, equal_nan=True
        )
    # The max path, which keeps features, and the others, which are compared with it.
    assert counter.frame_count == 2
    oneshots[0].close()
    net.eval()
    with torch.no_grad():
        for bits in (2, 3, 8, (2, 8), {"head": (4, 3)}):
            net.set_bits(bits)
            torch.testing.assert_close(compiled(images), net(images))
    assert counter.frame_count == 3
    anyprec.update_norms(net, [images])
    with torch.no_grad():
        for bits in (2, 3, 8, (2, 8), 4, {"head": (4, 3)}, 2):
            net.set_bits(bits)
            torch.testing.assert_close(compiled(images), net(images))
    # Statistics of uniform bit-widths, which stand beside the copies, are data too.
    assert counter.frame_count == 3


def test_fit_trains_compiled_networks(images: Tensor, labels: Tensor) -> None:
    net = anyprec.convert(Net(), bits=(2, 3, 8), example_input=images[:1])
    counter = CompileCounterWithBackend("aot_eager")
    history = anyprec.fit(
        net,
        [(images, labels)],
        epochs=4,
        compiled={"backend": counter},
        lr=0.1,
        feature_weight=0.01,
    )
    assert counter.frame_count == 2
    assert sum(history[-1].losses) < sum(history[0].losses)
    assert not net.stem_norm.output_observers
    assert not net.pointwise_norm.output_observers
    net.set_bits(3)
    assert torch.isfinite(net(images)).all()


def test_compiled_networks_use_powers_of_two_too(images: Tensor, labels: Tensor) -> None:
    net = anyprec.convert(
        Net().eval(),
        bits=(2, 8),
        activation_grid="signed",
        activation_scale="power-of-two",
        example_input=images[:1],
    )
    anyprec.calibrate(net, [images])
    with torch.no_grad():
        for layer in net.quantized_layers.values():
            layer.input_quantizer.step.mul_(1.3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    gradients = []
    for network in (compiled, net):
        for bits in (2, 8):
            net.set_bits(bits)
            loss = F.cross_entropy(network(images), labels)
            gradients += torch.autograd.grad(loss, net.head.input_quantizer.step)
    torch.testing.assert_close(gradients[:2], gradients[2:], rtol=1e-3, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::anyprec.StaleNormsWarning")  # equal programs are the matter
def test_integer_placement_is_compiled_once_whatever_the_bits(
    images: Tensor, labels: Tensor
) -> None:
    net = anyprec.convert(
        Net().eval(), bits=(2, 4, 8), example_input=images[:1], placement="integer"
    )
    anyprec.calibrate(net, [images])
    eager = copy.deepcopy(net)
    assert any(name.endswith("output_quantizers.0.step") for name, _ in net.named_parameters())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with torch.no_grad():
        for bits in (2, 8, (2, 8), {"head": (4, 2)}):
            net.set_bits(bits)
            eager.set_bits(bits)
            torch.testing.assert_close(compiled(images), eager(images))
    assert counter.frame_count == 1
    for bits in (8, 2):
        gradients = []
        for model, network in ((net, compiled), (eager, eager)):
            model.train().set_bits(bits)
            model.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            gradients.append(
                {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            )
        for name, gradient in gradients[1].items():
            torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-2, atol=1e-4)
    assert counter.frame_count == 2


def test_blocks_that_are_compiled_by_themselves_share_a_program() -> None:
    network = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(4)))
    x = torch.randn(2, 6)
    net = anyprec.convert(network, bits=(2, 8), first_last_bits=None, example_input=x)
    anyprec.calibrate(net, [x])
    eager = copy.deepcopy(net.eval())
    counter = CompileCounterWithBackend("eager")
    for block in net:
        block.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        for bits in (2, 8, {"1.0": (2, 8), "2.0": (8, 2)}):
            net.set_bits(bits)
            eager.set_bits(bits)
            torch.testing.assert_close(net(x), eager(x))
    assert counter.frame_count == 1
