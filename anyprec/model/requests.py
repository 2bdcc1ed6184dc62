"""From what `set_bits` is asked for to a configuration of every layer."""

from __future__ import annotations

from collections.abc import Mapping

from anyprec.bits import BitConfig, BitsLike, LayerCandidates, resolve, shorten, uniform
from anyprec.errors import BitsError


def resolve_request(
    request: BitsLike | Mapping[str, BitsLike],
    candidates: Mapping[str, LayerCandidates],
    configs: Mapping[str, BitConfig],
) -> BitConfig:
    """The configuration that a request stands for, which may be the name of one of `configs`.

    Raises:
        BitsError: A bit-width, path, pattern or name does not fit.
    """
    if isinstance(request, Mapping):
        return resolve(request, candidates, partial=not isinstance(request, BitConfig))
    if not isinstance(request, str):
        return uniform(request, candidates)
    if request in configs:
        return resolve(configs[request], candidates, partial=False)
    try:
        return uniform(request, candidates)
    except BitsError as error:
        if not configs:
            raise
        msg = f"{error}; or name one of the stored configurations: {shorten(configs)}"
        raise BitsError(msg) from error
