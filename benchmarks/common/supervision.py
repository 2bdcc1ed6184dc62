"""One measurement in a process of its own, which is ended when its time or memory is over."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

GIB = 2**30

Trial = Callable[[str, argparse.Namespace], dict[str, Any]]
"""Measures the thing of a name, and returns the record."""


def preload(*modules: str) -> None:
    """Let every such process start with these modules imported."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))


def supervised(trial: Trial, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The record of a trial in a process of its own.

    Args:
        trial: A function of a module.
        name: What it is to try.
        options: Passed to it; `seconds` limits its time, `memory` its memory in GiB, if not 0.

    Returns:
        What it returns; or `name`, and under `died` why there is nothing.
    """
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_record, args=(trial, name, options, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        if not receiver.poll(options.seconds):
            return {"name": name, "died": f"not done after {options.seconds} s"}
        record: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        reason = (
            f"ended with exit code {process.exitcode} after {time.perf_counter() - start:.0f} s"
        )
        return {"name": name, "died": reason}
    else:
        return record
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send_record(trial: Trial, name: str, options: argparse.Namespace, sender: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.memory:
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.memory * GIB),) * 2)
    sender.send(trial(name, options))
