"""What a loader may yield: everything else is refused with what is wrong, and nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import anyprec
from anyprec.errors import BatchError, CalibrationError, NoValuesError, TrainingError

CALLS: dict[str, Callable[[anyprec.ConvertedModel, Any], object]] = {
    "calibrate": anyprec.calibrate,
    "update_norms": anyprec.update_norms,
    "update_norms of a configuration": lambda net, loader: anyprec.update_norms(net, loader, 4),
    "search": lambda net, loader: anyprec.search(net, loader, "W4A4", objective="divergence"),
}


class Dataset:
    """Single images with their labels: not a loader."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], 0


LOADERS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "bytes": (
        lambda x: [(x * 20 + 128).byte()],
        BatchError,
        r"\(8, 3, 16, 16\) and dtype torch.uint8 .*images.float\(\) / 255",
    ),
    "float64": (lambda x: [x.double()], BatchError, r"dtype torch.float64 .*to\(torch.float32\)"),
    "half": (lambda x: [x.half()], BatchError, r"dtype torch.float16 .*to\(torch.float32\)"),
    "channels last": (lambda x: [x.permute(0, 2, 3, 1)], BatchError, r"permute\(0, 3, 1, 2\)"),
    "one channel": (
        lambda x: [x[:, :1]],
        BatchError,
        "have 1 channels, and it was converted with 3",
    ),
    "four channels": (
        lambda x: [torch.cat((x, x[:, :1]), dim=1)],
        BatchError,
        "have 4 channels, and it was converted with 3",
    ),
    "a single image": (lambda x: [x[0]], BatchError, r"\(3, 16, 16\) have no batch axis.*\[None\]"),
    "a single grey image": (lambda x: [x[0, 0]], BatchError, r"shape \(16, 16\)"),
    "a dataset": (Dataset, BatchError, "no batch axis.*DataLoader"),
    "a tensor": (lambda x: x, BatchError, r"the loader is a tensor of shape \(8, 3, 16, 16\)"),
    "an array": (lambda x: [x.numpy()], BatchError, "type ndarray.*torch.from_numpy"),
    "arrays": (lambda x: [(x.numpy(), 0)], BatchError, r"tuple \(ndarray, int\).*torch.from_numpy"),
    "pictures": (
        lambda x: [[Image.new("RGB", (16, 16))] * 4],
        BatchError,
        r"list \(Image, Image, Image, ...\).*ToTensor",
    ),
    "foreign keys": (lambda x: [{"img": x}], BatchError, r"dict with the keys \('img',\)"),
    "nothing": (lambda x: [None], BatchError, "type NoneType"),
    "no loader": (lambda x: 7, BatchError, "the loader is a int, which yields no batches"),
    "no batch": (lambda x: [], anyprec.AnyprecError, "the loader yields no batch"),
    "a used iterator": (
        lambda x: iter([]),
        anyprec.AnyprecError,
        "an iterator that was used before has none left",
    ),
    "an empty generator": (lambda x: (x for _ in ()), anyprec.AnyprecError, "yields no batch"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_that_does_not_fit_is_refused_and_nothing_changes(
    name: str, call: str, net: anyprec.ConvertedModel, images: Tensor
) -> None:
    make, error, text = LOADERS[name]
    net.train().set_bits(3)
    before, bits = copy.deepcopy(net.state_dict()), net.bits
    with pytest.raises(error, match=text):
        CALLS[call](net, make(images))
    assert all(map(torch.equal, net.state_dict().values(), before.values()))
    assert net.bits == bits
    assert net.training
    assert not net.anyprec_record.statistics


def test_the_networks_own_error_is_the_cause(net: anyprec.ConvertedModel, images: Tensor) -> None:
    with pytest.raises(BatchError) as caught:
        anyprec.calibrate(net, [images.double()])
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("bits", [None, 4])
def test_bytes_are_refused_at_every_precision(
    bits: int | None, net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.eval().set_bits(bits)
    with pytest.raises(RuntimeError, match="Byte"):
        net((images * 20 + 128).byte())


def test_images_that_the_network_converts_itself_are_taken(
    small_net: Callable[..., nn.Module], images: Tensor
) -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.float() / 255)

    pictures = (images * 20 + 128).byte()
    model = anyprec.convert(Bytes().eval(), bits=(4, 8), example_input=pictures[:1])
    anyprec.calibrate(model, [pictures])
    model.set_bits(4)
    assert torch.isfinite(model(pictures)).all()


def test_mappings_with_the_usual_keys_and_iterators_are_loaders(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    for loader in ([{"pixel_values": images}], iter([images]), (batch for batch in [images])):
        anyprec.calibrate(net, loader)


@pytest.mark.parametrize("name", ["batches", "norm_batches"])
@pytest.mark.parametrize("count", [0, -1, 1.5, None, True, "4"])
def test_a_number_of_batches_that_leaves_none_is_refused(
    name: str, count: Any, net: anyprec.ConvertedModel, images: Tensor
) -> None:
    with pytest.raises(CalibrationError, match=f"{name}={count!r} leaves no batch"):
        anyprec.calibrate(net, [images], **{name: count})


@pytest.mark.parametrize("count", [0, -3, 1.5])
def test_norm_statistics_of_no_batch_are_refused(
    count: Any, net: anyprec.ConvertedModel, images: Tensor
) -> None:
    for bits in ("all", 4):
        with pytest.raises(CalibrationError, match=f"batches={count!r} leaves no batch"):
            anyprec.update_norms(net, [images], bits, batches=count)


@pytest.mark.parametrize("call", CALLS)
def test_a_network_without_values_is_refused(
    call: str, small_net: Callable[..., nn.Module], images: Tensor
) -> None:
    with torch.device("meta"):
        network = small_net().eval()
    model = anyprec.convert(network, bits=(4, 8), example_input=images.to("meta"))
    with pytest.raises(NoValuesError, match=r"needs a network with values; .*meta device \('stem"):
        CALLS[call](model, [images])


def test_a_network_that_lacks_some_values_is_refused(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.fc.weight = nn.Parameter(net.fc.weight.detach().to("meta"))
    with pytest.raises(NoValuesError, match=r"1 of its tensors .* \('fc.weight'\)"):
        anyprec.calibrate(net, [images])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x.double(), r"dtype torch.float64 .*to\(torch.float32\)"),
        (lambda x: x.permute(0, 2, 3, 1), r"permute\(0, 3, 1, 2\)"),
        (lambda x: x[0], "no batch axis"),
        (lambda x: x.numpy(), "torch.from_numpy"),
    ],
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_training_on_images_that_do_not_fit_is_refused(
    change: Callable[[Tensor], Any],
    text: str,
    calibrated: bool,
    net: anyprec.ConvertedModel,
    small_net: Callable[..., nn.Module],
    images: Tensor,
    labels: Tensor,
) -> None:
    model = net if calibrated else anyprec.convert(small_net(), example_input=images)
    with pytest.raises(BatchError, match=text):
        anyprec.fit(model, [(change(images), labels)], epochs=1, show_progress=False)


def test_training_goes_through_its_loader_more_than_once(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    for loader in (iter([(images, labels)]), (batch for batch in [(images, labels)])):
        with pytest.raises(TrainingError, match="iterator, which can be gone through only once"):
            anyprec.fit(net, loader, epochs=1, show_progress=False)


def test_training_without_values_is_refused(
    small_net: Callable[..., nn.Module], images: Tensor, labels: Tensor
) -> None:
    with torch.device("meta"):
        network = small_net()
    model = anyprec.convert(network, bits=(4, 8), example_input=images.to("meta"))
    with pytest.raises(NoValuesError, match="fit needs a network with values"):
        anyprec.fit(model, [(images, labels)], epochs=1, show_progress=False)


@pytest.mark.parametrize("norm_batches", [-1, 1.5])
def test_a_negative_number_of_norm_batches_is_refused_before_training(
    norm_batches: Any, net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=f"norm_batches={norm_batches}"):
        anyprec.fit(
            net, [(images, labels)], epochs=1, norm_batches=norm_batches, show_progress=False
        )
    assert all(map(torch.equal, net.state_dict().values(), before.values()))
