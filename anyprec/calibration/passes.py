"""What every calibration pass needs: held batches, and undoing on error."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from anyprec.errors import CalibrationError
from anyprec.model.accepted_images import explaining_images, require_batch_axis
from anyprec.model.checks import require_values
from anyprec.model.converted import ConvertedModel
from anyprec.model.intact import output_quantizers, switchable_norms
from anyprec.runtime.batches import Batch, device_of, images_of, take


def held_images(
    model: ConvertedModel, loader: Iterable[Batch], limit: int | None, *, purpose: str
) -> list[Tensor]:
    """The images of the first `limit` batches, or of all of them, on the device of `model`.

    Raises:
        NoValuesError: `model` is on the meta device.
        BatchError: A batch has no images, or they have no batch axis.
        CalibrationError: The loader is empty.
    """
    require_values(model, purpose=purpose)
    device = device_of(model)
    held = []
    for batch in take(loader, limit):
        images = images_of(batch).to(device)
        require_batch_axis(model, images)
        held.append(images)
    if not held:
        msg = "the loader yields no batch: calibration needs at least one"
        if isinstance(loader, Iterator):
            msg += ", and an iterator that was used before has none left"
        raise CalibrationError(msg)
    return held


def run_on_images(model: ConvertedModel, images: Tensor) -> None:
    """Run `model` on a batch, and say why if it does not run.

    Raises:
        BatchError: It does not.
    """
    with explaining_images(model, images):
        model(images)


def require_count(count: int | None, *, name: str) -> None:
    """Refuse a number of batches that leaves none.

    Raises:
        CalibrationError: It is no positive integer.
    """
    if isinstance(count, int) and not isinstance(count, bool) and count > 0:
        return
    msg = f"{name}={count!r} leaves no batch: use a positive integer"
    raise CalibrationError(msg)


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
    modules += output_quantizers(model).values()
    states = [copy.deepcopy(module.state_dict()) for module in modules]
    try:
        yield
    except BaseException:  # Ctrl-C too must not leave a model that is calibrated in part
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
        raise
