"""The input size that MACs are counted at: that of the images that a network is used on.

`convert` counts at the size of its example, which is often a guess. Calibration and search see real
images: if these have another size, everything is counted anew on one of them.
"""

from __future__ import annotations

import dataclasses
import warnings

from torch import Tensor

from anyprec.errors import ConversionError, InputSizeWarning
from anyprec.model.converted import ConvertedModel
from anyprec.network.analysis import counted_anew
from anyprec.network.facts import NetworkFacts
from anyprec.runtime.processes import of_first_process


def facts_at_size_of(model: ConvertedModel, images: Tensor | None) -> NetworkFacts:
    """The facts of `model`, with MACs at the size of these images.

    They are the present ones if the size is that already. Under `torch.distributed` all processes
    must call it, and take the facts of the first one: what they decide by costs must be the same.

    Args:
        model: A converted network that runs on the images.
        images: A batch; None leaves the size as it is.

    Warns:
        InputSizeWarning: The size differs, and nothing can be counted: a packed network has no
            float weights whose operators could be watched.
    """
    facts = model.anyprec_record.facts
    if images is not None and tuple(images.shape[1:]) != facts.example_shape[1:]:
        facts = _counted(model, facts, images)
    return of_first_process(facts)


def take_over_facts(model: ConvertedModel, facts: NetworkFacts) -> None:
    """Make `facts`, which are of the same network, those that its costs are counted by."""
    if facts != model.anyprec_record.facts:
        record = dataclasses.replace(model.anyprec_record, facts=facts)
        vars(model)["anyprec_record"] = record


def _counted(model: ConvertedModel, facts: NetworkFacts, images: Tensor) -> NetworkFacts:
    reason = "it is packed and has no float weights"
    if not model.is_packed:
        # As many samples as in the example, since a network may be made for so many.
        sample = images[: facts.example_shape[0]]
        try:
            with model.using_bits(None):
                return counted_anew(model, facts, sample)
        except ConversionError as error:
            reason = str(error)
    msg = f"costs stay those of an input of shape {facts.example_shape[1:]}, but the images in use "
    msg += f"have {tuple(images.shape[1:])}; MACs cannot be counted anew ({reason}): convert the "
    msg += "network with example_input= of that shape, or state budgets by size or average bits"
    warnings.warn(msg, InputSizeWarning, stacklevel=2)
    return facts
