"""New processes for tests.

A new interpreter takes seconds to import torch and timm. `run` forks one that has imported them
already: a server process, which starts with the first call and computes nothing itself, so that
what it forks is as fresh as a new interpreter.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "timm", "anyprec", "tests.processes"])


def run(target: Callable[..., Any], *args: Any, timeout: float = 120) -> int:
    """Call a function of a module in a fresh process.

    Returns:
        The exit code; minus the number of the signal that killed it.
    """
    process = _CONTEXT.Process(target=target, args=args)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{target.__name__} did not end within {timeout} seconds")
    return process.exitcode


def run_script(script: Path, *arguments: str | Path, output: Path) -> str:
    """Run a Python file in a fresh process, and return what it printed, by way of a file."""
    code = run(_run_script, script, arguments, output)
    printed = output.read_text()
    assert code == 0, printed[-3000:]
    return printed


def _run_script(script: Path, arguments: tuple[str | Path, ...], output: Path) -> None:
    sys.argv = [str(script), *map(str, arguments)]
    with (
        output.open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        runpy.run_path(str(script), run_name="__main__")


def launch(*arguments: str | Path, timeout: float = 300) -> str:
    """Start a new interpreter with these arguments, as a user does, and return what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def torchrun(module: str, *arguments: str | Path) -> str:
    """Run a module in two processes under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return launch(*launcher, "-m", module, *arguments)
