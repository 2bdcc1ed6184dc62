"""What every calibration pass needs: held batches, and undoing on error."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anyprec.errors import CalibrationError
from anyprec.model.converted import ConvertedModel
from anyprec.model.intact import switchable_norms
from anyprec.runtime.batches import Batch, images_of, take


def held_images(loader: Iterable[Batch], limit: int | None, device: torch.device) -> list[Tensor]:
    """The images of the first `limit` batches, or of all of them, on `device`.

    Raises:
        CalibrationError: The loader is empty.
    """
    images = [images_of(batch).to(device) for batch in take(loader, limit)]
    if not images:
        msg = "the loader yields no batch: calibration needs at least one"
        raise CalibrationError(msg)
    return images


@contextmanager
def undo_on_error(model: ConvertedModel) -> Iterator[None]:
    """Restore step sizes, zero points and all norm statistics if the block fails."""
    modules: list[nn.Module] = []
    for _, norm in switchable_norms(model):
        if norm.bank is not None:
            modules.append(norm.bank)
        modules.append(norm)
    for layer in model.quantized_layers.values():
        modules += [layer.weight_quantizer, layer.input_quantizer]
    states = [copy.deepcopy(module.state_dict()) for module in modules]
    try:
        yield
    except BaseException:  # Ctrl-C too must not leave a model that is calibrated in part
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
        raise
