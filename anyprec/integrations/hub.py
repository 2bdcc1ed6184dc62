"""Converted models on the Hugging Face Hub: one checkpoint file in a repository.

    HubModel(model, packed=True).push_to_hub("me/resnet18-anyprec")
    model = HubModel.from_pretrained("me/resnet18-anyprec").model

Folders, repositories and model cards are the matter of huggingface_hub's own mixin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from torch import nn

from anyprec.checkpoint.loading import load
from anyprec.checkpoint.saving import save
from anyprec.errors import CheckpointError
from anyprec.model.converted import ConvertedModel, require_converted

FILE_NAME = "model.safetensors"
"""Name of the checkpoint in a repository or folder."""


_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
"""Those of `from_pretrained` that are for the download."""


class HubModel(
    ModelHubMixin,
    library_name="anyprec",
    tags=["quantization", "mixed-precision", "image-classification"],
):
    """A converted model with `save_pretrained`, `push_to_hub` and `from_pretrained`.

    Args:
        model: The converted model.
        **save_options: What `anyprec.save` takes besides the file: `packed`, `coding`, `configs`,
            `model_args`, ...

    Attributes:
        model: The converted model.

    Raises:
        ConversionError: `model` is not converted.

    Example:
        >>> import tempfile, timm, anyprec
        >>> from anyprec.integrations.hub import HubModel
        >>> model = anyprec.convert(timm.create_model("test_resnet"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = HubModel(model).save_pretrained(folder)
        ...     again = HubModel.from_pretrained(folder).model
    """

    model: ConvertedModel

    def __init__(self, model: ConvertedModel, **save_options: Any) -> None:
        self.model = require_converted(model, purpose="HubModel")
        self._save_options = save_options

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the checkpoint into a folder; called by the mixin."""
        save(self.model, Path(save_directory) / FILE_NAME, **self._save_options)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> HubModel:
        """Load the checkpoint of a folder or repository; called by the mixin.

        `model`, `bits` and `device` are those of `anyprec.load`.
        """
        load_options = {name: options.pop(name) for name in ("bits", "device") if name in options}
        folder = Path(model_id)
        if folder.is_dir():
            return cls(load(folder / FILE_NAME, model, **load_options))
        # The mixin passes all of its own options, most of them None.
        download_options = {}
        for name in _DOWNLOAD_OPTIONS:
            if options.get(name) is not None:
                download_options[name] = options[name]
        try:
            file = hf_hub_download(model_id, FILE_NAME, revision=revision, **download_options)
        except (HfHubHTTPError, EntryNotFoundError, OSError, ValueError) as error:
            msg = f"cannot get {FILE_NAME!r} of {model_id!r}, "
            msg += f"which is no folder on this machine either: {error}"
            raise CheckpointError(msg) from error
        return cls(load(file, model, **load_options))
