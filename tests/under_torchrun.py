"""Everything that tests run under torchrun, in one launch, since a launch takes seconds.

torchrun --nproc-per-node 2 -m tests.under_torchrun FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from tests.calibration import distributed_reconstruction
from tests.searching import distributed_search
from tests.training import distributed_training


def main(folder: Path) -> None:
    # All networks are calibrated before there is a process group: alike in all processes.
    trained, searched = distributed_training.prepare(), distributed_search.prepare()
    reconstructed = distributed_reconstruction.prepare()
    dist.init_process_group("gloo")
    distributed_training.train(*trained, result=folder / "training.pt")
    distributed_search.search(*searched, folder=folder)
    distributed_reconstruction.reconstruct(*reconstructed, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
