"""Images from files, for the command line: numpy arrays, or a folder of pictures by way of timm."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyprec.errors import BatchError
from anyprec.model.converted import ConvertedModel

_PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def read_images(
    path: Path, model: ConvertedModel, *, limit: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """The images at a path, and their labels if they are there.

    Args:
        path: A `.npy` file with images as the network takes them; a `.npz` file with arrays
            `images` and, if known, `labels`; or a folder of pictures, which get the network's
            evaluation transform of timm. Those of a folder are taken in the order of their names,
            subfolders included, and have no labels.
        model: The network that they are for.
        limit: Most images to take.

    Raises:
        BatchError: There are none, or they cannot be read.
    """
    if path.is_dir():
        return _pictures(path, model, limit), None
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        msg = f"no images at {str(path)!r}: name a folder of pictures, a .npy file of images as "
        msg += "the network takes them, or a .npz file with 'images' and 'labels'"
        raise BatchError(msg)
    images, labels = _arrays(path)
    tensor = torch.from_numpy(np.ascontiguousarray(images[:limit]))
    if labels is None:
        return tensor.float(), None
    return tensor.float(), torch.from_numpy(np.asarray(labels[:limit]).astype(np.int64))


def _arrays(path: Path) -> tuple[Any, Any]:
    """Images and labels in a numpy file; the labels are None if it has none."""
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            arrays = {"images": content} if path.suffix == ".npy" else dict(content)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        msg = f"{str(path)!r} holds no arrays that numpy reads without pickle ({error}): write it "
        msg += "with numpy.save or numpy.savez"
        raise BatchError(msg) from error
    if "images" not in arrays:
        msg = f"{str(path)!r} holds the arrays {list(arrays)}: name the one with images 'images'"
        raise BatchError(msg)
    return arrays["images"], arrays.get("labels")


def _pictures(folder: Path, model: ConvertedModel, limit: int | None) -> Tensor:
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415 (only here)
    from timm.data.config import resolve_model_data_config  # noqa: PLC0415 (slow to import)
    from timm.data.transforms_factory import create_transform  # noqa: PLC0415

    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _PICTURES)
    if not files:
        msg = f"no pictures in {str(folder)!r} ({', '.join(_PICTURES)}): name a folder that has "
        msg += "some"
        raise BatchError(msg)
    settings = resolve_model_data_config(model)
    settings["input_size"] = tuple(model.anyprec_record.facts.example_shape[1:])
    transform = create_transform(**settings, is_training=False)
    images: list[Tensor] = []
    for file in files[:limit]:
        try:
            with Image.open(file) as picture:
                images.append(transform(picture.convert("RGB")))
        except (OSError, UnidentifiedImageError) as error:
            msg = f"{str(file)!r} is no picture that can be read ({error}): remove or replace it"
            raise BatchError(msg) from error
    return torch.stack(images)
