"""Images from files: arrays as they are, pictures through the network's own transform."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

import anyprec
from anyprec.errors import BatchError
from anyprec.integrations.image_files import read_images


@pytest.fixture(scope="module")
def model() -> anyprec.ConvertedModel:
    return anyprec.convert(
        timm.create_model("test_byobnet").eval(),
        bits=(4, 8),
        example_input=torch.randn(1, 3, 48, 48),
    )


def test_arrays_are_taken_as_they_are(model: anyprec.ConvertedModel, tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(5, 3, 48, 48))
    np.save(tmp_path / "images.npy", images)
    np.savez(tmp_path / "both.npz", images=images, labels=np.arange(5, dtype=np.uint8))
    np.savez(tmp_path / "images.npz", images=images)
    expected = torch.from_numpy(images).float()
    for name in ("images.npy", "images.npz"):
        found, labels = read_images(tmp_path / name, model)
        assert torch.equal(found, expected)
        assert labels is None
    found, labels = read_images(tmp_path / "both.npz", model, limit=3)
    assert torch.equal(found, expected[:3])
    assert torch.equal(labels, torch.arange(3))


def test_pictures_get_the_evaluation_transform_of_the_network(
    model: anyprec.ConvertedModel, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    pictures = []
    for name in ("b/2.PNG", "a/1.png", "a/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture = Image.fromarray(generator.integers(0, 255, (80, 100, 3), dtype=np.uint8))
        picture.save(tmp_path / name)
        pictures.append(picture)
    (tmp_path / "a" / "notes.txt").touch()
    settings = model.pretrained_cfg
    transform = create_transform(
        (3, 48, 48),
        mean=settings["mean"],
        std=settings["std"],
        interpolation=settings["interpolation"],
        crop_pct=settings["crop_pct"],
    )
    images, labels = read_images(tmp_path, model)
    assert labels is None
    # In the order of their names.
    expected = torch.stack([transform(picture) for picture in reversed(pictures)])
    assert torch.equal(images, expected)
    assert len(read_images(tmp_path, model, limit=2)[0]) == 2


def test_refusals(model: anyprec.ConvertedModel, tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="no images at .*name a folder of pictures"):
        read_images(tmp_path / "none.npy", model)
    with pytest.raises(BatchError, match="no pictures in"):
        read_images(tmp_path, model)
    np.savez(tmp_path / "other.npz", pixels=np.zeros(3))
    with pytest.raises(BatchError, match=r"holds the arrays \['pixels'\]"):
        read_images(tmp_path / "other.npz", model)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(BatchError, match="without pickle"):
        read_images(tmp_path / "objects.npy", model)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(BatchError, match="without pickle"):
        read_images(tmp_path / "broken.npz", model)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(BatchError, match="is no picture that can be read"):
        read_images(tmp_path, model)
