"""The whole life of a network on an accelerator: converted, trained, searched, saved, loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import anyprec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BITS = (2, 3, 4, 8)
Loader = list[tuple[Tensor, Tensor]]


# Parts of torch that its compiler imports are deprecated, and the compiler gives advice. A graph
# without any kernel is part of how torch warms up.
compiles = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]


def compiling(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that compiles a network."""
    for mark in compiles:
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def _exact() -> None:
    """Convolutions in float32 proper, so that results can be compared with the processor's."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


@pytest.fixture
def on_gpu(float_net: nn.Module, loader: Loader) -> anyprec.ConvertedModel:
    """Converted and calibrated on the accelerator."""
    model = anyprec.convert(float_net.cuda(), bits=BITS, example_input=loader[0][0][:1])
    anyprec.calibrate(model, loader)
    return model


def logits(model: nn.Module, images: Tensor, bits: object) -> Tensor:
    assert isinstance(model, anyprec.ConvertedModel)
    device = next(model.parameters()).device
    with model.using_bits(bits), torch.no_grad():  # type: ignore[arg-type]
        return model.eval()(images.to(device)).cpu()


def everything(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_what_is_made_on_the_accelerator_stays_there_and_equals_the_processors(
    float_net: nn.Module, loader: Loader
) -> None:
    images = loader[0][0]
    made = {}
    for device in ("cpu", "cuda"):
        network = copy.deepcopy(float_net).to(device)
        with torch.no_grad():
            before = network(images.to(device))
        made[device] = anyprec.convert(network, bits=BITS, example_input=images[:1])
        anyprec.calibrate(made[device], loader)
        assert {tensor.device.type for tensor in everything(made[device])} == {device}
        assert torch.equal(logits(made[device], images, None), before.cpu())
    there, here = made["cuda"].state_dict(), made["cpu"].state_dict()
    for name, value in here.items():
        # Steps are found by search over a grid: sums in another order can tip one between two
        # neighbours.
        torch.testing.assert_close(there[name].cpu(), value, rtol=0.05, atol=1e-4, msg=name)


@pytest.mark.parametrize("bits", [None, 2, 3, 4, 8, (2, 8), {"head": (4, 3)}])
def test_a_model_that_is_moved_says_the_same_on_both_devices(
    net: anyprec.ConvertedModel, loader: Loader, bits: object
) -> None:
    images = loader[0][0]
    here = logits(net, images, bits)
    there = logits(copy.deepcopy(net).cuda(), images, bits)
    # A rounding can flip where a value lies between two codes.
    assert ((here - there).abs() < 1e-4).float().mean() > 0.8
    torch.testing.assert_close(there, here, rtol=0.1, atol=0.1)


def test_switching_there_and_back_is_exact(on_gpu: anyprec.ConvertedModel, loader: Loader) -> None:
    images = loader[0][0]
    first = {bits: logits(on_gpu, images, bits) for bits in (2, 4, 8)}
    assert all(torch.equal(logits(on_gpu, images, bits), first[bits]) for bits in (8, 2, 4))
    assert torch.equal(logits(copy.deepcopy(on_gpu), images, 2), first[2])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_fit_teaches_every_bit_width(
    float_net: nn.Module, loader: Loader, autocast: torch.dtype | None
) -> None:
    model = anyprec.convert(float_net.cuda(), bits=BITS, example_input=loader[0][0][:1])
    history = anyprec.fit(model, loader, epochs=8, lr=0.1, autocast=autocast)
    assert sum(history[-1].losses) < 0.7 * sum(history[0].losses)
    images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    for bits in (*BITS, (2, 8), None):
        assert (logits(model, images, bits).argmax(dim=1) == labels).float().mean() > 0.8, bits


def test_the_papers_recipe_trains_there(on_gpu: anyprec.ConvertedModel, loader: Loader) -> None:
    recipe = anyprec.Recipe.paper().changed(
        scheduler=anyprec.BitWidthScheduler(start=0.0, period=0.2)
    )
    history = anyprec.fit(on_gpu, loader, epochs=2, recipe=recipe)
    assert len(history) == 2
    assert all(torch.isfinite(tensor).all() for tensor in on_gpu.parameters())


@compiling
def test_compiled_training_is_eager_training(
    on_gpu: anyprec.ConvertedModel, loader: Loader
) -> None:
    eager = copy.deepcopy(on_gpu)
    found = [
        anyprec.fit(model, loader, epochs=1, lr=0.01, compiled=flag)
        for model, flag in ((on_gpu, True), (eager, False))
    ]
    torch.testing.assert_close(
        torch.tensor(found[0][0].losses), torch.tensor(found[1][0].losses), rtol=0.02, atol=0.01
    )


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A CUDA graph for each time that one is captured."""
    captured: list[object] = []
    begin = torch.cuda.CUDAGraph.capture_begin

    def noted(graph: torch.cuda.CUDAGraph, *args: object, **settings: object) -> None:
        captured.append(graph)
        begin(graph, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", noted)
    return captured


@compiling
def test_one_cuda_graph_evaluates_every_configuration(
    on_gpu: anyprec.ConvertedModel, loader: Loader, captures: list[object]
) -> None:
    images = loader[0][0].cuda()
    torch.compiler.reset()
    compiled = torch.compile(on_gpu.eval(), mode="reduce-overhead")
    with torch.no_grad():
        for bits in (4, 8, 2):
            on_gpu.set_bits(bits)
            compiled(images)
        seen = len(captures)
        assert seen > 0
        for bits in (3, 2, (2, 8), 8, {"head": (4, 3)}):
            on_gpu.set_bits(bits)  # type: ignore[arg-type]
            replayed = compiled(images).clone()
            # A rounding can flip where a value lies between two codes.
            close = (replayed - on_gpu(images)).abs() < 1e-4
            assert close.float().mean() > 0.8, bits
    assert len(captures) == seen


@compiling
def test_one_cuda_graph_trains_every_configuration(
    on_gpu: anyprec.ConvertedModel, loader: Loader, captures: list[object]
) -> None:
    images, labels = (tensor.cuda() for tensor in loader[0])
    torch.compiler.reset()
    compiled = torch.compile(on_gpu.train(), mode="reduce-overhead")

    def gradients(network: nn.Module, bits: object) -> list[Tensor]:
        on_gpu.set_bits(bits)  # type: ignore[arg-type]
        on_gpu.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        return [parameter.grad.clone() for parameter in on_gpu.parameters() if _learns(parameter)]

    for bits in (4, 8, 2, 4):
        gradients(compiled, bits)
    seen = len(captures)
    assert seen > 0
    for bits in (3, 2, (2, 8), 8):
        replayed = torch.cat([each.flatten() for each in gradients(compiled, bits)])
        expected = torch.cat([each.flatten() for each in gradients(on_gpu, bits)])
        assert nn.functional.cosine_similarity(replayed, expected, dim=0) > 0.98, bits
    assert len(captures) == seen


def _learns(parameter: Tensor) -> bool:
    return parameter.grad is not None


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nobody_waits_for_the_device(on_gpu: anyprec.ConvertedModel, loader: Loader) -> None:
    images, labels = (tensor.cuda() for tensor in loader[0])
    oneshot = anyprec.OneShot(on_gpu.train(), total_steps=4)

    def step() -> None:
        for path in oneshot.paths():
            path.loss(on_gpu(images), labels, nn.functional.cross_entropy).backward()
        oneshot.step()

    step()  # what is made at first use may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        on_gpu.eval()
        with torch.no_grad():
            for bits in (2, (3, 8), {"head": (4, 3)}, 8):
                on_gpu.set_bits(bits)  # type: ignore[arg-type]
                on_gpu(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_that_was_stopped_goes_on_from_its_snapshot(
    on_gpu: anyprec.ConvertedModel, loader: Loader, tmp_path: Path
) -> None:
    whole, stopped, resumed = on_gpu, copy.deepcopy(on_gpu), copy.deepcopy(on_gpu)
    anyprec.fit(whole, loader, epochs=2, lr=0.05)

    class StoppedError(Exception):
        pass

    def stop(record: anyprec.EpochRecord) -> None:
        if record.epoch == 0:
            raise StoppedError

    with pytest.raises(StoppedError):
        anyprec.fit(
            stopped,
            loader,
            epochs=2,
            lr=0.05,
            snapshot=tmp_path / "run",
            snapshot_steps=2,
            on_epoch_end=stop,
        )
    anyprec.fit(resumed, loader, epochs=2, lr=0.05, snapshot=tmp_path / "run", snapshot_steps=2)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(
            resumed.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("objective", ["loss", "divergence"])
@pytest.mark.parametrize("norms", ["stored", "batch"])
def test_what_search_finds_fits_and_is_no_worse_than_uniform(
    on_gpu: anyprec.ConvertedModel, loader: Loader, objective: str, norms: str, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in on_gpu.state_dict().items()}
    settings = {
        "objective": objective,
        "norms": norms,
        "resume": tmp_path / "search",
        "max_evaluations": 60,
    }
    result = anyprec.search(on_gpu, loader, "W3A3", **settings)  # type: ignore[arg-type]
    assert result.cost.bitops <= anyprec.cost_of(on_gpu, 3).bitops
    assert all(torch.equal(value, before[name]) for name, value in on_gpu.state_dict().items())
    again = anyprec.search(on_gpu, loader, "W3A3", **settings)  # type: ignore[arg-type]
    assert again.config == result.config
    anyprec.update_norms(on_gpu, loader, result.config)
    assert torch.isfinite(logits(on_gpu, loader[0][0], result.config)).all()


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_one_device_is_read_on_the_other(
    on_gpu: anyprec.ConvertedModel,
    small_net: type[nn.Module],
    loader: Loader,
    tmp_path: Path,
    packed: bool,
) -> None:
    images, file = loader[0][0], tmp_path / "net.safetensors"
    anyprec.save(on_gpu, file, packed=packed, rebuildable=False)
    there = anyprec.load(file, small_net().cuda().eval())
    assert {tensor.device.type for tensor in everything(there)} == {"cuda"}
    here = anyprec.load(file, small_net().eval()).cuda()
    for bits in BITS:
        expected = logits(on_gpu, images, bits)
        assert torch.equal(logits(there, images, bits), expected)
        assert torch.equal(logits(here, images, bits), expected)
    alone = anyprec.load(file, small_net().cuda().eval(), bits=3)
    assert torch.equal(logits(alone, images, 3), logits(on_gpu, images, 3))


def test_a_file_that_can_be_rebuilt_goes_to_the_device_that_is_named(tmp_path: Path) -> None:
    import timm  # noqa: PLC0415 (only here)

    images = torch.randn(2, 3, 64, 64)
    model = anyprec.convert(
        timm.create_model("test_resnet", num_classes=4).cuda().eval(), example_input=images[:1]
    )
    anyprec.calibrate(model, [images])
    anyprec.save(model, tmp_path / "net.safetensors", packed=True)
    again = anyprec.load(tmp_path / "net.safetensors", device="cuda")
    assert {tensor.device.type for tensor in everything(again)} == {"cuda"}
    assert torch.equal(logits(again, images, 4), logits(model, images, 4))
