"""Rebuilding a timm network by its name: what is found out, what must be said, what is refused."""

from __future__ import annotations

import pytest
import timm
import torch

import anyprec
from anyprec.checkpoint.document import Architecture, Document
from anyprec.checkpoint.rebuilding import FORBIDDEN_ARGUMENTS, create, create_skeleton
from anyprec.runtime.storage import read_file


def _saved(tmp_path, network, shape, **options):
    model = anyprec.convert(network.eval(), bits=(2, 4), example_input=torch.randn(shape))
    anyprec.calibrate(model, [torch.randn(shape)])
    anyprec.save(model, tmp_path / "net", **options)
    return model


def _reloads(tmp_path, model, shape):
    loaded = anyprec.load(tmp_path / "net")
    images = torch.randn(shape)
    for bits in (None, 4):
        model.set_bits(bits)
        loaded.set_bits(bits)
        with torch.no_grad():
            assert torch.equal(loaded(images), model(images))
    return loaded


@pytest.mark.parametrize(
    ("name", "shape", "arguments"),
    [
        ("test_resnet", (2, 3, 64, 64), {"num_classes": 7}),
        ("test_efficientnet", (2, 1, 64, 64), {"in_chans": 1}),
        ("test_resnet", (2, 3, 64, 64), {"drop_rate": 0.2}),
        ("test_resnet", (2, 3, 64, 64), {"global_pool": "max"}),
        ("test_vit", (2, 3, 96, 96), {"img_size": 96}),
        (
            "test_vit",
            (2, 1, 64, 96),
            {"img_size": (64, 96), "in_chans": 1, "num_classes": 3, "global_pool": "avg"},
        ),
    ],
)
def test_common_arguments_are_found_out(tmp_path, name, shape, arguments):
    model = _saved(tmp_path, timm.create_model(name, **arguments), shape)
    _reloads(tmp_path, model, shape)


def test_a_classifier_that_was_reset_is_rebuilt(tmp_path, converted):
    model = converted("test_resnet")
    model.reset_classifier(7)
    anyprec.save(model, tmp_path / "net")
    assert anyprec.load(tmp_path / "net").fc.out_features == 7


@pytest.mark.parametrize(
    ("name", "size", "arguments", "message"),
    [
        ("test_resnet", 64, {"act_layer": "silu"}, "class of 'conv1.2' is ReLU instead of SiLU"),
        (
            "test_vit",
            160,
            {"drop_path_rate": 0.1},
            r"class of 'blocks.1.drop_path1' is Identity instead of DropPath",
        ),
        (
            "test_vit",
            160,
            {"proj_drop_rate": 0.1},
            r"p of 'blocks.0.attn.proj_drop' is 0.0 instead of 0.1",
        ),
        (
            "test_vit",
            96,
            {"img_size": 96, "init_values": 0.1},
            "class of 'blocks.0.ls1' is Identity instead of LayerScale",
        ),
    ],
)
def test_other_arguments_are_asked_for_by_the_error(tmp_path, name, size, arguments, message):
    shape = (2, 3, size, size)
    network = timm.create_model(name, **arguments)
    with pytest.raises(
        anyprec.CheckpointError,
        match=rf"cannot be rebuilt .*{message}.* as model_args=.* or rebuildable",
    ):
        _saved(tmp_path, network, shape)
    assert not list(tmp_path.iterdir())
    anyprec.save(network, tmp_path / "net", model_args=arguments)
    _reloads(tmp_path, network, shape)


def test_a_setting_that_no_module_shows_is_compared_too(tmp_path):
    network = timm.create_model("test_vit")
    network.reset_classifier(5, global_pool="max")
    network.pool_include_prefix = True
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"pool_include_prefix of the network is False instead of True",
    ):
        _saved(tmp_path, network, (1, 3, 160, 160))


def test_parameters_tied_after_creation_are_noticed(tmp_path):
    network = timm.create_model("test_vit")
    network.blocks[1].norm1.weight = network.blocks[0].norm1.weight
    with pytest.raises(
        anyprec.CheckpointError, match=r"instead of .* tied to blocks.0.norm1.weight"
    ):
        _saved(tmp_path, network, (1, 3, 160, 160))


def test_switches_of_training_do_not_count(tmp_path):
    network = timm.create_model("test_vit")
    network.set_grad_checkpointing()
    _reloads(tmp_path, _saved(tmp_path, network, (1, 3, 160, 160)), (1, 3, 160, 160))


def test_a_network_that_need_not_be_rebuilt_is_loaded_only_into_one(tmp_path):
    arguments = {"act_layer": "silu"}
    _saved(
        tmp_path, timm.create_model("test_resnet", **arguments), (1, 3, 64, 64), rebuildable=False
    )
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"does not say how to rebuild its network: pass it as load\(path, m",
    ):
        anyprec.load(tmp_path / "net")
    anyprec.load(tmp_path / "net", timm.create_model("test_resnet", **arguments))


def test_a_network_that_is_not_of_timm_says_nothing_of_rebuilding(path):
    with pytest.raises(anyprec.CheckpointError, match=r"pass it as load\(path, model\)"):
        anyprec.load(path)


def test_model_args_of_a_network_that_is_not_of_timm_are_refused(tmp_path, model):
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"model_args=.* was given, but Sequential does not come from timm",
    ):
        anyprec.save(model, tmp_path / "net", model_args={"num_classes": 3})


@pytest.mark.parametrize("value", [torch.nn.SiLU, float("nan")])
def test_model_args_that_json_cannot_hold_are_refused(tmp_path, converted, value):
    with pytest.raises(
        anyprec.CheckpointError, match=r"cannot be written as JSON .* name classes by strings"
    ):
        anyprec.save(converted("test_resnet"), tmp_path / "net", model_args={"act_layer": value})


def test_model_args_that_timm_refuses_are_shown(tmp_path, converted):
    message = r"timm.create_model\('test_resnet', depth=3, .*fails: TypeError: .*'depth'"
    with pytest.raises(anyprec.CheckpointError, match=message):
        anyprec.save(converted("test_resnet"), tmp_path / "net", model_args={"depth": 3})


def test_the_description_of_the_images_survives_but_no_address_does(tmp_path):
    network = timm.create_model("test_resnet")
    network.pretrained_cfg = {
        **network.pretrained_cfg,
        "mean": (0.1, 0.2, 0.3),
        "url": "http://x",
        "file": "x.pth",
    }
    _saved(tmp_path, network, (1, 3, 64, 64))
    loaded = anyprec.load(tmp_path / "net")
    assert loaded.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert loaded.default_cfg is loaded.pretrained_cfg
    fresh = timm.create_model("test_resnet").pretrained_cfg
    assert {key: loaded.pretrained_cfg.get(key) for key in ("url", "file")} == {
        key: fresh.get(key) for key in ("url", "file")
    }


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:timm/resnet18",
        "local-dir:.",
        "../resnet18",
        "resnet18.a1_in1k",
        "",
        "no_such_net",
        "\u0663",
        "x" * 9999,
    ],
)
def test_only_plain_names_of_the_registry_reach_timm(monkeypatch, name):
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **kwargs: pytest.fail("timm was called")
    )
    with pytest.raises(
        anyprec.CheckpointError, match=r"this timm \(.*\) has no model '.*': update timm"
    ):
        create(Architecture(name, {}))


@pytest.mark.parametrize("argument", sorted(FORBIDDEN_ARGUMENTS))
def test_arguments_that_name_other_files_never_reach_timm(monkeypatch, argument):
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **kwargs: pytest.fail("timm was called")
    )
    with pytest.raises(
        anyprec.CheckpointError,
        match=rf"'{argument}' is no argument that a network is rebuilt with",
    ):
        create(Architecture("test_resnet", {argument: True}))


@pytest.mark.parametrize(
    "arguments",
    [
        {"nonsense": 1},
        {"num_classes": "many"},
        {"num_classes": -1},
        {"in_chans": 0},
        {"act_layer": ["relu"]},
        {"act_layer": "no_such"},
        {"layers": {}},
        {"stem_width": 1e18},
        {"features_only": True, "out_indices": [99]},
        {"channels": None, "block_args": 3},
    ],
    ids=str,
)
def test_whatever_timm_raises_is_a_checkpoint_error(tamper, model, tmp_path, arguments):
    path = tamper(
        lambda raw: raw.update(architecture={"name": "test_resnet", "arguments": arguments})
    )
    with pytest.raises(
        anyprec.CheckpointError, match=r"timm.create_model.*fails|does not match the network"
    ):
        anyprec.load(path)


def test_a_network_too_large_for_its_file_takes_no_memory(tamper):
    huge = {"name": "test_resnet", "arguments": {"num_classes": 10**12}}
    create_skeleton(Architecture(**huge))
    path = tamper(lambda raw: raw.update(architecture=huge))
    with pytest.raises(
        anyprec.CheckpointError, match=r"does not match the network; .* tensors are missing"
    ):
        anyprec.load(path)


def test_the_file_names_network_and_arguments(tmp_path):
    _saved(tmp_path, timm.create_model("test_resnet", in_chans=1), (1, 1, 64, 64))
    document = Document.from_json(read_file(tmp_path / "net")[1])
    assert document.architecture == Architecture(
        "test_resnet", {"num_classes": 1000, "in_chans": 1}
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_network_made_without_memory_has_all_of_its_constants(tmp_path, converted, packed):
    """Those that no state holds, which compiled networks read; nothing stays on the meta device."""
    anyprec.save(converted("test_resnet"), tmp_path / "net", packed=packed)
    loaded = anyprec.load(tmp_path / "net")
    assert not [
        name
        for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers())
        if tensor.is_meta
    ]
    for layer in loaded.quantized_layers.values():
        assert tuple(layer.weight_quantizer.widths.tolist()) == layer.candidates.weight
        assert tuple(layer.input_quantizer.widths.tolist()) == layer.candidates.activation


def test_a_network_that_computes_tensors_when_it_is_made_gets_them(tmp_path, converted):
    arguments = {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 12,
        "depths": (1, 1),
        "num_heads": (2, 2),
    }
    model = converted("swinv2_tiny_window8_256", size=32, **arguments)
    anyprec.save(model, tmp_path / "net", packed=True, model_args=arguments)
    loaded = anyprec.load(tmp_path / "net")
    own = dict(model.named_buffers())
    computed = {name for name in own if name.endswith("relative_position_index")}
    assert computed
    assert all(torch.equal(dict(loaded.named_buffers())[name], own[name]) for name in computed)
