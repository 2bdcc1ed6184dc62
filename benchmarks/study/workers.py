"""How a process begins that performs runs beside others."""

from __future__ import annotations

import multiprocessing
import os
import threading


def begin_worker(threads: int) -> None:
    """Set a worker's threads, and end it with its parent.

    A worker that went on training would slow whatever runs next.
    """
    import torch  # noqa: PLC0415 (who only asks how a worker begins need not wait for torch)

    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
