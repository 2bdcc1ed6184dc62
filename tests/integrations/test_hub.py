"""Converted models in a folder as the Hub keeps them. No network: repositories are folders here."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError

import anyprec
from anyprec.integrations import hub
from anyprec.integrations.hub import FILE_NAME, HubModel


@pytest.fixture
def model(converted):
    return converted("test_resnet")


def same(left, right):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return all(
            torch.equal(left.set_bits(b) or left(images), right.set_bits(b) or right(images))
            for b in (2, 8)
        )


@pytest.mark.parametrize("options", [{}, {"packed": True}])
def test_a_model_comes_back_from_its_folder(tmp_path, model, options):
    HubModel(model, **options).save_pretrained(tmp_path)
    assert {FILE_NAME, "README.md"} <= {path.name for path in tmp_path.iterdir()}
    assert "library_name: anyprec" in (tmp_path / "README.md").read_text()
    loaded = HubModel.from_pretrained(tmp_path).model
    assert loaded.is_packed is bool(options)
    assert same(loaded, model)


def test_a_single_configuration_comes_back(tmp_path, model):
    HubModel(model, packed=True, configs={"small": model.resolve_bits(2)}).save_pretrained(tmp_path)
    single = HubModel.from_pretrained(tmp_path, bits="small").model
    assert single.bits == model.resolve_bits(2)


def test_pushing_uploads_the_folder_that_saving_writes(tmp_path, model, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, **_kwargs):
            pass

        def create_repo(self, repo_id, **_kwargs):
            return type("Repository", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id, folder_path, **_kwargs):
            uploaded[repo_id] = anyprec.load(folder_path / FILE_NAME)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    HubModel(model, packed=True).push_to_hub("me/net")
    assert same(uploaded["me/net"], model)


def test_a_repository_is_downloaded_by_name(tmp_path, model, monkeypatch):
    anyprec.save(model, tmp_path / FILE_NAME)
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options))
        return tmp_path / name

    monkeypatch.setattr(hub, "hf_hub_download", download)
    loaded = HubModel._from_pretrained(
        model_id="me/net", revision="v1", local_files_only=True, cache_dir=None
    )
    assert same(loaded.model, model)
    assert asked == [("me/net", FILE_NAME, {"revision": "v1", "local_files_only": True})]


def test_a_repository_without_the_file_raises_our_error(monkeypatch):
    def missing(*_args, **_kwargs):
        raise EntryNotFoundError("404")

    monkeypatch.setattr(hub, "hf_hub_download", missing)
    with pytest.raises(anyprec.CheckpointError, match="cannot get 'model.safetensors' of 'me/net'"):
        HubModel._from_pretrained(model_id="me/net")


def test_only_converted_models_are_taken():
    with pytest.raises(
        anyprec.ConversionError, match="HubModel needs a converted model, got Linear"
    ):
        HubModel(torch.nn.Linear(2, 2))
