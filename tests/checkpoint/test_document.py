"""The document in the metadata is not trusted: whatever it says, loading succeeds or raises `CheckpointError`."""

from __future__ import annotations

import json

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
    (lambda raw: raw.update(format=3), "has format 3, this anyprec reads formats 1 to 2: update anyprec"),
    (lambda raw: raw.update(format=0), "has format 0, this anyprec reads formats 1 to 2$"),
    (lambda raw: raw.update(format="1"), "metadata.format is '1', expected int"),
    (lambda raw: raw.update(format=True), "metadata.format is True, expected int"),
    (lambda raw: raw.update(version=1), "metadata.version is 1, expected str"),
    (lambda raw: raw.update(architecture=[]), r"metadata.architecture is \[\], expected dict or NoneType"),
    (lambda raw: raw.update(architecture={"arguments": {}}), "metadata.architecture has no field 'name'"),
    (lambda raw: raw.update(architecture={"name": 1, "arguments": {}}), "metadata.architecture.name is 1, expected str"),
    (lambda raw: raw.update(architecture={"name": "x", "arguments": []}), r"architecture.arguments is \[\], expected dict"),
    (lambda raw: raw.update(settings=None), "metadata.settings is None, expected dict"),
    (_settings(bits=[]), r"metadata.settings.bits is \(\), expected ascending bit-widths from 2 to 8"),
    (_settings(bits=[1, 2]), r"metadata.settings.bits is \(1, 2\), expected ascending"),
    (_settings(bits=[4, 2]), r"metadata.settings.bits is \(4, 2\), expected ascending"),
    (_settings(bits=[4, 4]), r"metadata.settings.bits is \(4, 4\), expected ascending"),
    (_settings(bits=[True, 4]), r"metadata.settings.bits is \(?\[?True, 4\]?, expected a list of int"),
    (_settings(bits=[2.0]), "metadata.settings.bits is .2.0.?., expected a list of int"),
    (_settings(activation_bits=[2, 99]), r"metadata.settings.activation_bits is \(2, 99\), expected ascending"),
    (_settings(first_last_bits=64), "metadata.settings.first_last_bits is 64, expected 2 to 8"),
    (_settings(depthwise_min_bits=-1), "metadata.settings.depthwise_min_bits is -1, expected 2 to 8"),
    (_settings(per_channel=1), "metadata.settings.per_channel is 1, expected bool"),
    (_settings(include="*"), r"metadata.settings.include is '\*', expected list or NoneType"),
    (_settings(exclude=[1]), "metadata.settings.exclude is .1.?., expected a list of str"),
    (lambda raw: raw.update(layers={}), "metadata.layers is {}, expected list"),
    (lambda raw: raw.update(layers=[3]), r"metadata.layers\[\] is not a JSON object"),
    (lambda raw: raw["layers"].append(raw["layers"][0]), "metadata.layers lists '0' twice"),
    (_layer(path=None), r"metadata.layers\[\].path is None, expected str"),
    (_layer(macs=-1), r"metadata.layers\[\].macs is -1, expected 0 or more"),
    (_layer(calls=-1), r"metadata.layers\[\].calls is -1, expected 0 or more"),
    (_layer(weights=-1), r"metadata.layers\[\].weights is -1, expected 0 or more"),
    (_layer(macs=1.5), r"metadata.layers\[\].macs is 1.5, expected int"),
    (_layer(owner=[]), r"metadata.layers\[\].owner is \[\], expected str or NoneType"),
    (_layer(first=0), r"metadata.layers\[\].first is 0, expected bool"),
    (_layer(problem=1), r"metadata.layers\[\].problem is 1, expected str or NoneType"),
    (lambda raw: raw.update(norms=[]), r"metadata.norms is \[\], expected dict"),
    (lambda raw: raw["norms"].update({"1": "nothing"}), "metadata.norms names a layer that metadata.layers does not list"),
    (lambda raw: raw["norms"].update({"1": ["0"]}), "metadata.norms names a layer that metadata.layers does not list"),
    (lambda raw: raw.update(uncounted={"a": 1}), r"metadata.uncounted\['a'\] is 1, expected \[calls, MACs\]"),
    (lambda raw: raw.update(uncounted={"a": [1]}), r"metadata.uncounted\['a'\] is \[1\], expected"),
    (lambda raw: raw.update(uncounted={"a": [1, -1]}), r"metadata.uncounted\['a'\] is \[1, -1\], expected"),
    (lambda raw: raw.update(uncounted={"a": [1, True]}), r"metadata.uncounted\['a'\] is \[1, True\], expected"),
    (lambda raw: raw.update(example_shape=[]), r"metadata.example_shape is \(\), expected lengths of at least 1"),
    (lambda raw: raw.update(example_shape=[1, 0, 8]), r"metadata.example_shape is \(1, 0, 8\), expected lengths"),
    (lambda raw: raw.update(example_shape=["1"]), "metadata.example_shape is .'1'.?., expected a list of int"),
    (lambda raw: raw.update(example_shape="1x3"), "metadata.example_shape is '1x3', expected list"),
    (lambda raw: raw.update(untraceable=False), "metadata.untraceable is False, expected str or NoneType"),
    (lambda raw: raw.update(configs=[]), r"metadata.configs is \[\], expected dict"),
    (lambda raw: raw.update(configs={"x": ["W4A4"]}), r"metadata.configs\['x'\] is not an object of strings"),
    (lambda raw: raw.update(configs={"x": {"0": "4"}}), r"configs\['x'\] holds a precision that cannot be read: cannot read"),
    (lambda raw: raw.update(configs={"x": {"0": "W1A9"}}), r"configs\['x'\] holds a precision .*bit-width 1 is not"),
    (lambda raw: raw.update(configs={"x": {"0": f"W{'9' * 5000}A4"}}), r"precision that cannot be read: cannot read .W99"),
    (lambda raw: raw.update(configs={"x": {"nothing": "W4A4"}}), "configuration 'x' does not fit .* 'nothing' matches no"),
    (lambda raw: raw.update(aliases={"a": 1}), "metadata.aliases is not an object of strings"),
    (lambda raw: raw.update(pretrained_cfg=1), "metadata.pretrained_cfg is 1, expected dict"),
    (lambda raw: raw.update(latents="float1"), "names 'float1' as latents, expected one of float64, float32,"),
    (lambda raw: raw.update(notes={"x": 1}), r"metadata.notes\['x'\] is not a JSON object"),
    (lambda raw: raw["notes"]["small"].update(size=-1), r"metadata.notes\['small'\].size is -1, expected 0 or more"),
    (lambda raw: raw["notes"]["small"].update(score="x"), "score is 'x', expected int or float or NoneType"),
    (lambda raw: raw["notes"]["small"].update(found={"a": []}), r"found is {'a': \[\]}, expected texts and numbers"),
    (_settings(only={"0": "x"}), "metadata.settings.only holds a precision that cannot be read"),
    (lambda raw: raw.update(packing=3), "metadata.packing is 3, expected dict"),
    (_packing(coding="zip"), "metadata.packing.coding is 'zip', expected one of .'fixed', 'zstd'"),
    (_packing(layers={"0": {"dtype": "float32", "shape": [-1]}}), r"layers\['0'\].shape is \(-1,\), expected no negative"),
    (_packing(layers={"x": {"dtype": "float32", "shape": [1]}}), "metadata.packing speaks of 'x', which is not there"),
    (_packing(layers={"0": {"dtype": "int8", "shape": [4, 3, 3, 3]}}), "holds codes of layer '0' for a weight"),
    (_packing(layers={"0": {"dtype": "float32", "shape": [4, 3, 3]}}), r"a weight \(4, 3, 3\) torch.float32, the network's"),
    (_packing(layers={"0": {"dtype": "float32", "shape": [4, 3, 3, 3]}}), "1 are unknown to the network: '0.weight'"),
    (_packing(compressed={"0.weight": {"dtype": "float32", "shape": [1]}}), "'0.weight' is compressed, but not stored as"),
    (_packing(compressed={"y": {"dtype": "float32", "shape": [1]}}), "metadata.packing speaks of 'y', which is not there"),
    (_packing(latent={"0": 1}), "metadata.packing.latent is not an object of strings"),
    (_layer(macs=10**30), "holds a number that is not finite, or of more than 63 bits"),
    (lambda raw: raw.update(pretrained_cfg={"mean": [float("nan")]}), "a number that is not finite"),
    (lambda raw: raw.update(pretrained_cfg={"mean": [float("-inf")]}), "a number that is not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_document_is_refused_and_the_network_left(
    tamper, plain, photograph, change, message
):
    path = tamper(change)
    network = plain()
    check = photograph(network)
    with pytest.raises(anyprec.CheckpointError, match=message):
        anyprec.load(path, network)
    check()


@pytest.mark.parametrize("field", [
    "format", "version", "architecture", "settings", "layers", "norms", "uncounted", "example_shape", "untraceable",
    "configs", "aliases", "pretrained_cfg",
])  # fmt: skip
def test_a_missing_field_is_named(tamper, plain, field):
    path = tamper(lambda raw: raw.pop(field))
    with pytest.raises(
        anyprec.CheckpointError, match=rf"the checkpoint's metadata has no field '{field}'"
    ):
        anyprec.load(path, plain())


TEXTS = [
    ("", "is not valid JSON"),
    ("{", "is not valid JSON"),
    ("[]", "metadata is not a JSON object"),
    ("null", "metadata is not a JSON object"),
    ('{"format": 1', "is not valid JSON"),
    ('{"format": ' + "9" * 5000 + "}", "is not valid JSON"),
    ("[" * 100_000, "is not valid JSON"),
    ("[" * 100_000 + "]" * 100_000, "is not valid JSON"),
    ('{"format": ' + "[" * 500 + "]" * 500 + "}", "is nested deeper than 16 levels"),
    ('{"format": 1e999}', "a number that is not finite"),
    ('{"format": NaN}', "a number that is not finite"),
    ('{"format": "\\ud800"}', r"metadata.format is '\\ud800', expected int"),
]


@pytest.mark.parametrize(("text", "message"), TEXTS, ids=range(len(TEXTS)))
def test_a_document_that_is_no_object_of_the_right_kind_is_refused(text, message):
    with pytest.raises(anyprec.CheckpointError, match=message):
        Document.from_json(text)


def test_messages_stay_short(tamper, plain):
    path = tamper(lambda raw: raw["settings"].update(bits="x" * 10**6))
    with pytest.raises(anyprec.CheckpointError) as caught:
        anyprec.load(path, plain())
    assert len(str(caught.value)) < 500


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list("01358x")), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


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
