"""The document in the metadata is not trusted: loading succeeds or raises `CheckpointError`."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anyprec
from anyprec.checkpoint.document import Document
from anyprec.runtime.storage import read_file, write_file


def _layer(**changes):
    return lambda raw: raw["layers"][0].update(changes)


def _settings(**changes):
    return lambda raw: raw["settings"].update(changes)


def _packing(**changes):
    return lambda raw: raw.update(
        packing={"coding": "fixed", "layers": {}, "latent": {}, "compressed": {}, **changes}
    )


HOSTILE = [
    (
        lambda raw: raw.update(format=3),
        "has format 3, this anyprec reads format 2: update anyprec",
    ),
    (
        lambda raw: raw.update(format=0),
        "has format 0, this anyprec reads format 2: save the network again",
    ),
    (
        lambda raw: raw.update(format=1),
        "has format 1, this anyprec reads format 2: save the network again",
    ),
    (
        lambda raw: raw.update(format="1"),
        "Expected `int`, got `str` - at `$.format`",
    ),
    (
        lambda raw: raw.update(format=True),
        "Expected `int`, got `bool` - at `$.format`",
    ),
    (
        lambda raw: raw.update(strange=1),
        "Object contains unknown field `strange`",
    ),
    (
        lambda raw: raw.update(version=1),
        "Expected `str`, got `int` - at `$.version`",
    ),
    (
        lambda raw: raw.update(architecture=[]),
        "Expected `object | null`, got `array` - at `$.architecture`",
    ),
    (
        lambda raw: raw.update(architecture={"arguments": {}}),
        "Object missing required field `name` - at `$.architecture`",
    ),
    (
        lambda raw: raw.update(architecture={"name": 1, "arguments": {}}),
        "Expected `str`, got `int` - at `$.architecture.name`",
    ),
    (
        lambda raw: raw.update(architecture={"name": "x", "arguments": []}),
        "Expected `object`, got `array` - at `$.architecture.arguments`",
    ),
    (
        lambda raw: raw.update(settings=None),
        "Expected `object`, got `null` - at `$.settings`",
    ),
    (
        _settings(bits=[]),
        "Expected `array` of length >= 1 - at `$.settings.bits`",
    ),
    (
        _settings(bits=[1, 2]),
        "Expected `int` >= 2 - at `$.settings.bits[0]`",
    ),
    (
        _settings(bits=[4, 2]),
        "bits is (4, 2), expected ascending bit-widths - at `$.settings`",
    ),
    (
        _settings(bits=[4, 4]),
        "bits is (4, 4), expected ascending bit-widths - at `$.settings`",
    ),
    (
        _settings(bits=[True, 4]),
        "Expected `int`, got `bool` - at `$.settings.bits[0]`",
    ),
    (
        _settings(bits=[2.0]),
        "Expected `int`, got `float` - at `$.settings.bits[0]`",
    ),
    (
        _settings(activation_bits=[2, 99]),
        "Expected `int` <= 8 - at `$.settings.activation_bits[1]`",
    ),
    (
        _settings(first_last_bits=64),
        "Expected `int` <= 8 - at `$.settings.first_last_bits`",
    ),
    (
        _settings(depthwise_min_bits=-1),
        "Expected `int` >= 2 - at `$.settings.depthwise_min_bits`",
    ),
    (
        _settings(per_channel=1),
        "Expected `bool`, got `int` - at `$.settings.per_channel`",
    ),
    (
        _settings(include="*"),
        "Expected `array | null`, got `str` - at `$.settings.include`",
    ),
    (
        _settings(exclude=[1]),
        "Expected `str`, got `int` - at `$.settings.exclude[0]`",
    ),
    (
        lambda raw: raw.update(layers={}),
        "Expected `array`, got `object` - at `$.layers`",
    ),
    (
        lambda raw: raw.update(layers=[3]),
        "Expected `object`, got `int` - at `$.layers[0]`",
    ),
    (
        lambda raw: raw["layers"].append(raw["layers"][0]),
        "layers lists '0' twice",
    ),
    (
        _layer(path=None),
        "Expected `str`, got `null` - at `$.layers[0].path`",
    ),
    (
        _layer(macs=-1),
        "Expected `int` >= 0 - at `$.layers[0].macs`",
    ),
    (
        _layer(calls=-1),
        "Expected `int` >= 0 - at `$.layers[0].calls`",
    ),
    (
        _layer(weights=-1),
        "Expected `int` >= 0 - at `$.layers[0].weights`",
    ),
    (
        _layer(macs=1.5),
        "Expected `int`, got `float` - at `$.layers[0].macs`",
    ),
    (
        _layer(owner=[]),
        "Expected `str | null`, got `array` - at `$.layers[0].owner`",
    ),
    (
        _layer(first=0),
        "Expected `bool`, got `int` - at `$.layers[0].first`",
    ),
    (
        _layer(problem=1),
        "Expected `str | null`, got `int` - at `$.layers[0].problem`",
    ),
    (
        lambda raw: raw.update(norms=[]),
        "Expected `object`, got `array` - at `$.norms`",
    ),
    (
        lambda raw: raw["norms"].update({"1": "nothing"}),
        "norms['1'] is 'nothing', which layers does not list",
    ),
    (
        lambda raw: raw["norms"].update({"1": ["0"]}),
        "Expected `str | null`, got `array` - at `$.norms[...]`",
    ),
    (
        lambda raw: raw.update(uncounted={"a": 1}),
        "Expected `array`, got `int` - at `$.uncounted[...]`",
    ),
    (
        lambda raw: raw.update(uncounted={"a": [1]}),
        "Expected `array` of length 2, got 1 - at `$.uncounted[...]`",
    ),
    (
        lambda raw: raw.update(uncounted={"a": [1, -1]}),
        "Expected `int` >= 0 - at `$.uncounted[...][1]`",
    ),
    (
        lambda raw: raw.update(uncounted={"a": [1, True]}),
        "Expected `int`, got `bool` - at `$.uncounted[...][1]`",
    ),
    (
        lambda raw: raw.update(example_shape=[]),
        "Expected `array` of length >= 1 - at `$.example_shape`",
    ),
    (
        lambda raw: raw.update(example_shape=[1, 0, 8]),
        "Expected `int` >= 1 - at `$.example_shape[1]`",
    ),
    (
        lambda raw: raw.update(example_shape=["1"]),
        "Expected `int`, got `str` - at `$.example_shape[0]`",
    ),
    (
        lambda raw: raw.update(example_shape="1x3"),
        "Expected `array`, got `str` - at `$.example_shape`",
    ),
    (
        lambda raw: raw.update(untraceable=False),
        "Expected `str | null`, got `bool` - at `$.untraceable`",
    ),
    (
        lambda raw: raw.update(configs=[]),
        "Expected `object`, got `array` - at `$.configs`",
    ),
    (
        lambda raw: raw.update(configs={"x": ["W4A4"]}),
        "expected an object of precisions such as 'W4A6' - at `$.configs[...]`",
    ),
    (
        lambda raw: raw.update(configs={"x": {"0": "4"}}),
        "cannot read '4' as a precision: write it as 'W4A6' "
        "(weight bits, activation bits) - at `$.configs[...]`",
    ),
    (
        lambda raw: raw.update(configs={"x": {"0": "W1A9"}}),
        "weight bit-width 1 is not supported: use an int from 2 to 8 - at `$.configs[...]`",
    ),
    (
        lambda raw: raw.update(configs={"x": {"0": f"W{'9' * 5000}A4"}}),
        "cannot read 'W99999999",
    ),
    (
        lambda raw: raw.update(configs={"x": {"nothing": "W4A4"}}),
        "configuration 'x' does not fit the network: path 'nothing' matches no layer",
    ),
    (
        lambda raw: raw.update(aliases={"a": 1}),
        "Expected `str`, got `int` - at `$.aliases[...]`",
    ),
    (
        lambda raw: raw.update(pretrained_cfg=1),
        "Expected `object`, got `int` - at `$.pretrained_cfg`",
    ),
    (
        lambda raw: raw.update(latents="float1"),
        "'float1' is no dtype of a checkpoint, expected one of float64, float32,",
    ),
    (
        lambda raw: raw.update(notes={"x": 1}),
        "Expected `object`, got `int` - at `$.notes[...]`",
    ),
    (
        lambda raw: raw["notes"]["small"].update(size=-1),
        "Expected `int` >= 0 - at `$.notes[...].size`",
    ),
    (
        lambda raw: raw["notes"]["small"].update(score="x"),
        "Expected `int | float | null`, got `str` - at `$.notes[...].score`",
    ),
    (
        lambda raw: raw["notes"]["small"].update(found={"a": []}),
        "Expected `int | float | str`, got `array` - at `$.notes[...].found[...]`",
    ),
    (
        _settings(only={"0": "x"}),
        "cannot read 'x' as a precision: write it as 'W4A6' "
        "(weight bits, activation bits) - at `$.settings.only`",
    ),
    (
        lambda raw: raw.update(packing=3),
        "Expected `object | null`, got `int` - at `$.packing`",
    ),
    (
        _packing(coding="zip"),
        "Invalid enum value 'zip' - at `$.packing.coding`",
    ),
    (
        _packing(layers={"0": {"dtype": "float32", "shape": [-1]}}),
        "Expected `int` >= 0 - at `$.packing.layers[...].shape[0]`",
    ),
    (
        _packing(layers={"x": {"dtype": "float32", "shape": [1]}}),
        "metadata.packing names 'x', which is not there",
    ),
    (
        _packing(layers={"0": {"dtype": "int8", "shape": [4, 3, 3, 3]}}),
        "holds codes of layer '0' for a weight (4, 3, 3, 3) torch.int8, the network's",
    ),
    (
        _packing(layers={"0": {"dtype": "float32", "shape": [4, 3, 3]}}),
        "holds codes of layer '0' for a weight (4, 3, 3) torch.float32, the network's",
    ),
    (
        _packing(layers={"0": {"dtype": "float32", "shape": [4, 3, 3, 3]}}),
        "does not match the network; 1 are unknown to the network: '0.weight'",
    ),
    (
        _packing(compressed={"0.weight": {"dtype": "float32", "shape": [1]}}),
        "tensor '0.weight' is compressed, but not stored as bytes",
    ),
    (
        _packing(compressed={"y": {"dtype": "float32", "shape": [1]}}),
        "metadata.packing names 'y', which is not there",
    ),
    (
        _packing(latent={"0": 1}),
        "Expected `str`, got `int` - at `$.packing.latent[...]`",
    ),
    (
        _layer(macs=10**30),
        "metadata holds a number of more than 63 bits",
    ),
    (
        lambda raw: raw.update(pretrained_cfg={"mean": [float("nan")]}),
        "metadata is not valid JSON: JSON is malformed: invalid character",
    ),
    (
        lambda raw: raw.update(pretrained_cfg={"mean": [float("-inf")]}),
        "metadata is not valid JSON: JSON is malformed: invalid character",
    ),
    (
        lambda raw: raw["layers"][0].update({"x" * 10**6: 1}),
        "Object contains unknown field `xxx",
    ),
    (
        _settings(stride=1),
        "Object contains unknown field `stride` - at `$.settings`",
    ),
    (
        _packing(layers={"0": {"dtype": 3, "shape": [1]}}),
        "3 is no dtype of a checkpoint, expected one of float64, float32,",
    ),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_document_is_refused_and_the_network_left(
    tamper, plain, photograph, change, message
):
    path = tamper(change)
    network = plain()
    check = photograph(network)
    with pytest.raises(anyprec.CheckpointError, match=re.escape(message)):
        anyprec.load(path, network)
    check()


@pytest.mark.parametrize("field", [
    "format", "version", "architecture", "settings", "layers", "norms", "uncounted",
    "example_shape", "untraceable", "configs", "aliases", "pretrained_cfg",
])  # fmt: skip
def test_a_missing_field_is_named(tamper, plain, field):
    path = tamper(lambda raw: raw.pop(field))
    with pytest.raises(
        anyprec.CheckpointError, match=rf"not as expected: Object missing required field `{field}`"
    ):
        anyprec.load(path, plain())


TEXTS = [
    ("", "is not valid JSON"),
    ("{", "is not valid JSON"),
    ("[]", "metadata is not as expected: Expected `object`, got `array`"),
    ("null", "metadata is not as expected: Expected `object`, got `null`"),
    ('{"format": 1', "is not valid JSON"),
    ('{"format": ' + "9" * 5000 + "}", "is not valid JSON: Integer value out of range"),
    ("[" * 100_000, "is not valid JSON"),
    ("[" * 100_000 + "]" * 100_000, "is not valid JSON"),
    ('{"format": ' + "[" * 500 + "]" * 500 + "}", "is nested deeper than 16 levels"),
    ('{"format": ' + "9" * 30 + "}", "holds a number of more than 63 bits"),
    ('{"format": 1e30}', "holds a number of more than 63 bits"),
    ('{"format": 1e999}', "is not valid JSON: Number out of range"),
    ('{"format": NaN}', "is not valid JSON: JSON is malformed"),
    ('{"format": "\\ud800"}', "is not valid JSON"),
    ('{"format": "\ud800"}', "is not valid JSON"),
    ('{"format": 2, "format": "2"}', "Expected `int`, got `str` - at `$.format`"),
]


@pytest.mark.parametrize(("text", "message"), TEXTS, ids=range(len(TEXTS)))
def test_a_document_that_is_no_object_of_the_right_kind_is_refused(text, message):
    with pytest.raises(anyprec.CheckpointError, match=re.escape(message)):
        Document.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["settings"].update(bits="x" * 10**6),
        lambda raw: raw["settings"].update(norm="x" * 10**6),
        lambda raw: raw["settings"].update({"x" * 10**6: 1}),
        lambda raw: raw["configs"].update(x={"x" * 10**6: "W0A0"}),
        lambda raw: raw["norms"].update({"x" * 10**6: "y" * 10**6}),
        lambda raw: raw.update(latents="x" * 10**6),
    ],
)
def test_messages_stay_short(tamper, plain, change):
    path = tamper(change)
    with pytest.raises(anyprec.CheckpointError) as caught:
        anyprec.load(path, plain())
    assert len(str(caught.value)) < 500


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(list("01358x")), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_value_anywhere_loads_or_raises_our_error(path, plain, data):
    """One place of the document, however deep, takes a random value."""
    original = path.read_bytes()
    tensors, text = read_file(path)
    document = json.loads(text)
    document["architecture"] = {"name": "test_resnet", "arguments": {}}
    place = document
    while True:
        key = data.draw(
            st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))
        )
        if not (isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans())):
            break
        place = place[key]
    place[key] = data.draw(_JSON)
    try:
        write_file(path, tensors, json.dumps(document))
        anyprec.load(path, plain())
    except anyprec.CheckpointError:
        pass
    finally:
        path.write_bytes(original)
