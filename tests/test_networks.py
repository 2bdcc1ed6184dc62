"""One small network for each mechanism of the converter, and every promise tried on it.

The checks are those that `benchmarks/zoo` runs over all of timm, at full depth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torchvision
from timm.layers import CondConv2d, GroupNormAct, StdConv2d
from timm.models.byobnet import ByoBlockCfg
from timm.models.repghost import RepGhostNet
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer

import anyprec
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.owners import FunctionalOwner
from anyprec.testing import check_promises

BITS = (2, 4, 8)


def timm_model(name: str, **arguments: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **arguments)


class Encoder(nn.Module):
    """torch's own transformer layers, and attention to another sequence.

    The former fuse into one operator in eval mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.across = nn.MultiheadAttention(16, 2, kdim=16, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder(self.patches(x).flatten(2).transpose(1, 2))
        seen, _ = self.across(tokens[:, :1], tokens, tokens, need_weights=False)
        return self.fc(seen[:, 0])


class Tied(nn.Module):
    """One parameter in two layers, rows of another in `F.linear`, a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.first, self.second = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.second.weight = self.first.weight
        self.both = nn.Linear(8, 16)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(self.stem(x)))))
        x = x.mean(dim=(2, 3))
        keys = nn.functional.linear(x, self.both.weight[:8], self.both.bias[:8])
        values = nn.functional.linear(x, self.both.weight[8:])
        return self.fc(torch.sigmoid(keys) * values)


class Mixture(nn.Module):
    """A convolution whose weight is mixed for each image from those of several experts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.routing = nn.Linear(8, 4)
        self.mixed = CondConv2d(8, 12, 3, padding=1, bias=True, num_experts=4)
        self.norm = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.mixed(x, torch.sigmoid(self.routing(x.mean(dim=(2, 3)))))
        return self.fc(torch.relu(self.norm(x)).mean(dim=(2, 3)))


class Several(nn.Module):
    """Several outputs, one of them nested."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model("test_resnet", features_only=True)
        self.fc = nn.Linear(self.body.feature_info.channels()[-1], 5)

    def forward(self, x: Tensor) -> dict[str, object]:
        maps = self.body(x)
        return {"maps": maps, "logits": self.fc(maps[-1].mean(dim=(2, 3)))}


class Bypassed(nn.Module):
    """Nothing of one convolution reaches the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.heard, self.unheard = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.heard(x) + 0 * self.unheard(x)
        return self.head(x.mean(dim=(2, 3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain and depthwise": (timm_model("test_efficientnet", drop_rate=0.1), 32),
    "residual, drop path": (timm_model("test_resnet", drop_path_rate=0.2), 32),
    "scaled weight standardisation": (
        timm_model("test_nfnet", stem_chs=32, channels=(32, 64, 64, 64), num_features=64),
        32,
    ),
    "grouped, gated": (timm_model("test_byobnet"), 64),
    "pre-norm with StdConv": (
        lambda: ResNetV2(
            (1, 1),
            channels=(32, 64),
            stem_chs=16,
            num_classes=5,
            conv_layer=StdConv2d,
            norm_layer=partial(GroupNormAct, num_groups=8),
        ),
        48,
    ),
    "LayerNorm": (timm_model("test_convnext", depths=(1, 1, 1, 1), drop_path_rate=0.2), 32),
    "attention, patch drop": (
        timm_model("test_vit", img_size=48, depth=2, drop_rate=0.1, patch_drop_rate=0.25),
        48,
    ),
    "attention with relative positions": (timm_model("test_vit_relpos", img_size=32, depth=2), 32),
    "convolution and attention": (
        timm_model("test_coatnet", img_size=32, depths=(1, 1, 1, 1)),
        32,
    ),
    "state-space": (timm_model("test_mambaout", depths=(1, 1, 1, 1)), 32),
    "F.linear in the owner": (
        timm_model(
            "eva02_tiny_patch14_224",
            img_size=28,
            depth=2,
            embed_dim=48,
            num_heads=3,
            attn_drop_rate=0.1,
        ),
        28,
    ),
    "F.linear in the owner, table of positions": (
        timm_model("beit_base_patch16_224", img_size=48, depth=2, embed_dim=48, num_heads=2),
        48,
    ),
    "F.linear and constant inputs": (
        timm_model(
            "swinv2_tiny_window8_256",
            img_size=32,
            window_size=4,
            embed_dim=12,
            depths=(1, 1),
            num_heads=(2, 2),
            drop_path_rate=0.2,
        ),
        32,
    ),
    "norms after a concatenation": (
        timm_model("densenet121", growth_rate=4, block_config=(2, 2), drop_rate=0.1),
        32,
    ),
    "SAME padding": (
        timm_model("tf_mobilenetv3_small_minimal_100", depth_multiplier=0.3),
        32,
    ),
    "branches to merge": (
        timm_model(
            "repvgg_a0",
            stem_chs=16,
            blocks=(
                ByoBlockCfg("rep", d=2, c=16, s=2, gs=0, br=1),
                ByoBlockCfg("rep", d=2, c=32, s=2, gs=0, br=1),
            ),
        ),
        32,
    ),
    "several kinds of branches to merge": (
        lambda: RepGhostNet([[[3, 8, 16, 0, 1]], [[5, 24, 24, 0.25, 2]]], num_classes=5, width=0.5),
        32,
    ),
    "mixture of experts": (Mixture, 24),
    "LSTM": (
        timm_model(
            "sequencer2d_s",
            img_size=56,
            layers=(1, 1),
            embed_dims=(24, 32),
            hidden_sizes=(6, 8),
            mlp_ratios=(2, 2),
            patch_sizes=(7, 2),
        ),
        56,
    ),
    "bare parameter in a product": (
        timm_model("swiftformer_xs", layers=(1, 1), embed_dims=(8, 8), downsamples=(True, True)),
        32,
    ),
    "layers called several times": (
        timm_model(
            "coat_tiny",
            img_size=64,
            embed_dims=(32, 32, 32, 32),
            serial_depths=(1, 1, 1, 1),
            parallel_depth=1,
        ),
        64,
    ),
    "a transform before the first layer": (
        timm_model(
            "csatv2",
            depths=(1, 1, 1, 1),
            transformer_depths=(0, 0, 1, 1),
            dims=(16, 16, 16, 16),
        ),
        64,
    ),
    "attention and fused layers of torch": (Encoder, 32),
    "tied weights and rows of weights": (Tied, 32),
    "several outputs": (Several, 32),
    "torchvision resnet18": (
        lambda: torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5),
        32,
    ),
    "torchvision mobilenet_v3_small": (
        lambda: torchvision.models.MobileNetV3(
            [
                InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1),
                InvertedResidualConfig(16, 3, 32, 24, False, "RE", 2, 1, 1),
                InvertedResidualConfig(24, 5, 48, 24, True, "HS", 1, 1, 1),
            ],
            last_channel=64,
            num_classes=5,
        ),
        32,
    ),
    "torchvision convnext": (
        lambda: torchvision.models.ConvNeXt(
            [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=5
        ),
        32,
    ),
    "torchvision swin_v2": (
        lambda: SwinTransformer(
            [4, 4],
            16,
            [1, 1],
            [2, 2],
            [4, 4],
            num_classes=5,
            block=SwinTransformerBlockV2,
            downsample_layer=PatchMergingV2,
        ),
        32,
    ),
    "torchvision vit": (lambda: VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5), 32),
}
"""For each mechanism a network, as small as it can be, and the size of its images."""


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_network_of_each_kind_keeps_every_promise(name: str) -> None:
    create, size = NETWORKS[name]
    report = check_promises(create(), lambda: torch.randn(4, 3, size, size), bits=BITS)
    assert report.broken == {}
    assert report.held
    assert report.coverage.get("skipped", 0) == 0
    assert report.coverage["quantized"] > 0


@pytest.mark.parametrize("kind", ["ViT", "ResNet"])
def test_networks_of_hugging_face_keep_every_promise(kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")
    if kind == "ViT":
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        )
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1])
        model = transformers.ResNetForImageClassification(config)
    report = check_promises(model, lambda: torch.randn(4, 3, 32, 32), bits=BITS)
    assert report.broken == {}
    assert report.coverage.get("skipped", 0) == 0


def test_the_checks_find_a_weight_that_is_not_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail is none: what others do in silence must not pass here."""
    monkeypatch.setattr(
        FunctionalOwner, "forward", lambda self, *args: super(FunctionalOwner, self).forward(*args)
    )
    report = check_promises(Tied(), lambda: torch.randn(4, 3, 32, 32), bits=BITS)
    assert "layer 'both' was not reached" in report.broken["calibrate"]
    monkeypatch.undo()
    monkeypatch.setattr(
        QuantizedLayer,
        "quantized_operands",
        lambda self, values, weight: (self.input_quantizer(values, self.input_index), weight),
    )
    report = check_promises(Tied(), lambda: torch.randn(4, 3, 32, 32), bits=BITS)
    assert {"gradients at 2 bits", "gradients at 8 bits"} <= report.broken.keys()


def test_a_weight_that_depends_on_the_image_is_quantized_anew_for_each() -> None:
    images = torch.randn(4, 3, 24, 24)
    model = anyprec.convert(Mixture().eval(), bits=BITS, example_input=images[:1])
    anyprec.calibrate(model, [images])
    model.set_bits(8)
    with torch.no_grad():
        one_by_one = torch.cat([model(image) for image in images.split(1)])
        # Convolutions of other batch sizes add in another order; kernels of another image would be
        # far off.
        torch.testing.assert_close(one_by_one, model(images), rtol=1e-3, atol=1e-4)


def test_experts_count_once_in_the_size() -> None:
    model = anyprec.convert(Mixture(), bits=BITS, example_input=torch.randn(1, 3, 24, 24))
    layers = anyprec.cost_model(model).layers
    assert layers["mixed.matrices.weight"].weights == 4 * 12 * 8 * 9
    assert layers["mixed"].weights == 0
    assert layers["mixed"].macs == 12 * 12 * 12 * 8 * 9


def test_a_layer_to_which_the_float_network_passes_no_gradient_is_named_and_excused() -> None:
    report = check_promises(Bypassed(), lambda: torch.randn(4, 3, 16, 16), bits=BITS)
    assert report.broken == {}
    assert report.unreached == ["unheard"]
