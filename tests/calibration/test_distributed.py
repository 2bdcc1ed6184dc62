"""A reconstruction under torchrun: each process its own images, one model."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.calibration import distributed_reconstruction


def test_all_processes_end_with_one_model_that_learned_from_the_images_of_all(
    under_torchrun: Path, tmp_path: Path
) -> None:
    first, second = (
        torch.load(under_torchrun / f"reconstructed-{rank}.pt", weights_only=True)
        for rank in range(2)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    distributed_reconstruction.reconstruct(*distributed_reconstruction.prepare(), tmp_path)
    alone = torch.load(tmp_path / "reconstructed-0.pt", weights_only=True)
    assert not torch.equal(first["5.weight"], alone["5.weight"])
    assert torch.allclose(first["5.weight"], alone["5.weight"], atol=0.2)
