"""Kills a process that saves, at every step of writing in turn. Run by `test_killed.py`.

    python kill_while_saving.py FOLDER

Processes are forks of this one, so that none has to import torch; it must have one thread. For each
form of a file, a child saves a new network over an old one and kills itself at its n-th step:
before or after a call that changes the disk, or between the pieces of the file. n rises until the
child gets through. Prints, as JSON, what the file was after each kill ("old", "new", or "broken"),
by form.
"""

import functools
import json
import os
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import anyprec
from anyprec.runtime import storage

PIECES = 4
CALLS = [(os, "fsync"), (Path, "touch"), (Path, "chmod"), (Path, "replace"), (Path, "unlink")]


class KillSwitch:
    """Counts steps, and kills this process at one of them."""

    def __init__(self, steps: int) -> None:
        self.remaining = steps

    def step(self) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call):
        @functools.wraps(call)
        def watched(*args, **kwargs):
            self.step()
            result = call(*args, **kwargs)
            self.step()
            return result

        return watched

    def save_in_pieces(self, tensors, filename, metadata=None) -> None:
        content = safetensors.torch.save(tensors, metadata)
        length = len(content) // PIECES + 1
        with Path(filename).open("wb") as file:
            for start in range(0, len(content), length):
                self.step()
                file.write(content[start : start + length])
                file.flush()


def make(seed: int) -> anyprec.ConvertedModel:
    torch.manual_seed(seed)
    images = torch.randn(2, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3)).eval()
    model = anyprec.convert(network, bits=(2, 8), first_last_bits=None, example_input=images[:1])
    anyprec.calibrate(model, [images])
    return model


def save_until_killed(
    model: anyprec.ConvertedModel, file: Path, *, packed: bool, step: int
) -> bool:
    """Whether a child that saves was killed at this step; otherwise it got through."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            switch = KillSwitch(step)
            for owner, name in CALLS:
                setattr(owner, name, switch.around(getattr(owner, name)))
            storage.save_file = switch.save_in_pieces
            anyprec.save(model, file, packed=packed)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, "saving failed by itself"
    return killed


def kill_at_every_step(folder: Path, *, packed: bool) -> list[str]:
    """What the file was after each kill."""
    models, contents = [make(0), make(1)], {}
    for name, model in zip(("old", "new"), models, strict=True):
        anyprec.save(model, folder / name, packed=packed)
        contents[(folder / name).read_bytes()] = name
    file, after = folder / "net", []
    while True:
        file.write_bytes((folder / "old").read_bytes())
        killed = save_until_killed(models[1], file, packed=packed, step=len(after) + 1)
        outcome = contents.get(file.read_bytes(), "broken")
        if not killed:
            assert outcome == "new"
            return after
        after.append(outcome)


def main(folder: Path) -> None:
    outcomes = {}
    for form in ("training", "packed"):
        (folder / form).mkdir()
        outcomes[form] = kill_at_every_step(folder / form, packed=form == "packed")
    sys.stdout.write(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
