"""Several threads, tasks and processes on one network: right answers, or a clear error."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import anyprec
from anyprec.errors import PrecisionError


@contextmanager
def block_of_another_thread(model: anyprec.ConvertedModel, bits: int) -> Iterator[None]:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with model.using_bits(bits):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    try:
        yield
    finally:
        leave.set()
        thread.join()


@pytest.fixture
def expected(net: anyprec.ConvertedModel, images: Tensor) -> dict[int, Tensor]:
    found = {}
    for bits in (2, 4, 8):
        with torch.no_grad(), net.using_bits(bits):
            found[bits] = net(images)
    return found


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=30)


def test_blocks_of_threads_take_turns(
    net: anyprec.ConvertedModel, images: Tensor, expected: dict[int, Tensor]
) -> None:
    net.set_bits(3)

    def work(bits: int) -> list[bool]:
        right = []
        for _ in range(25):
            with torch.no_grad(), net.using_bits(bits):
                with net.using_bits(8):  # a block inside a block waits for nobody
                    right.append(torch.equal(net(images), expected[8]))
                right.append(torch.equal(net(images), expected[bits]))
        return right

    with ThreadPoolExecutor(3) as pool:
        assert all(map(all, pool.map(work, (2, 4, 8))))
    assert net.bits == net.resolve_bits(3)


def test_while_another_thread_has_a_block_nobody_else_uses_or_sets_the_precision(
    net: anyprec.ConvertedModel, images: Tensor, expected: dict[int, Tensor]
) -> None:
    net.set_bits(8)
    with block_of_another_thread(net, 2):
        with pytest.raises(PrecisionError, match=r"a forward pass while another thread.*view"):
            net(images)
        with pytest.raises(PrecisionError, match="set_bits while another thread is inside"):
            net.set_bits(4)
        with pytest.raises(PrecisionError, match=r"view\(\) while another thread"):
            net.view()
        with torch.no_grad():
            assert torch.equal(net.view(4)(images), expected[4])
    with torch.no_grad():
        assert torch.equal(net(images), expected[8])


def test_a_thread_that_serves_a_block_may_run_the_network(
    net: anyprec.ConvertedModel, images: Tensor, expected: dict[int, Tensor]
) -> None:
    def run() -> Tensor:
        with torch.no_grad():
            return net(images)

    async def serve() -> Tensor:
        with net.using_bits(4):
            return await asyncio.to_thread(run)  # which hands the context on

    assert torch.equal(asyncio.run(serve()), expected[4])
    with net.using_bits(2), pytest.raises(PrecisionError, match="another thread"):
        in_thread(run)


def test_tasks_whose_blocks_interleave_get_an_error_and_not_a_wrong_answer(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(4)

    async def serve(bits: int, pause: float, *, run: bool) -> None:
        with net.using_bits(bits):
            await asyncio.sleep(pause)
            if run:
                net(images)

    async def both(*, run: bool) -> list[Any]:
        tasks = serve(2, 0.02, run=run), serve(8, 0.06, run=False)
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second = asyncio.run(both(run=True))
    assert isinstance(first, PrecisionError)
    assert "another task is inside" in str(first)
    assert second is None
    first, second = asyncio.run(both(run=False))
    assert "another task opened `with model.using_bits(...)` inside this block" in str(first)
    assert second is None
    # The block that was left last restores what was set before all.
    assert net.bits == net.resolve_bits(4)


def test_an_exception_on_its_way_is_not_hidden_by_that_of_interleaved_blocks(
    net: anyprec.ConvertedModel,
) -> None:
    first, second = net.using_bits(2), net.using_bits(8)
    first.__enter__()
    second.__enter__()
    error = KeyError("mine")
    assert first.__exit__(KeyError, error, None) is False
    second.__exit__(None, None, None)
    assert net.bits is None


def test_a_bad_request_leaves_no_block_open(net: anyprec.ConvertedModel) -> None:
    with pytest.raises(anyprec.errors.BitsError), net.using_bits(5):
        pass
    in_thread(lambda: net.set_bits(4))
    assert net.bits == net.resolve_bits(4)


def test_copies_and_pickles_have_no_blocks(net: anyprec.ConvertedModel, images: Tensor) -> None:
    with block_of_another_thread(net, 2):
        for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            copied.set_bits(8)
            with copied.using_bits(4):
                copied(images)


def test_a_block_that_another_thread_closes_is_closed(net: anyprec.ConvertedModel) -> None:
    def steps() -> Iterator[None]:
        with net.using_bits(2):
            yield

    generator = steps()
    next(generator)
    in_thread(generator.close)
    net.set_bits(4)
    in_thread(lambda: net.set_bits(8))
    assert net.bits == net.resolve_bits(8)


def test_a_backward_pass_and_another_threads_block(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.train()
    net.set_bits(8)
    run = net.head.forward

    def again(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)

    net.head.forward = again
    loss = net(images).sum()
    with block_of_another_thread(net, 2), pytest.raises(PrecisionError, match="a backward pass of"):
        loss.backward()
    loss = net(images).sum()
    errors: list[BaseException] = []
    inside = threading.Event()

    def interfere(_gradient: Tensor) -> None:
        try:
            in_thread(lambda: net(images))
        except PrecisionError as error:
            errors.append(error)
        inside.set()

    net.stem.weight.register_hook(interfere)
    net.set_bits(2)
    loss.backward()
    assert inside.is_set()
    assert "while a backward pass of another thread" in str(errors[0])
    in_thread(lambda: net(images))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_forked_during_another_threads_block_refuses_and_does_not_wait(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    reading, writing = os.pipe()
    with block_of_another_thread(net, 2):
        child = os.fork()
        if child == 0:
            messages = []
            for use in (lambda: net(images), lambda: net.using_bits(4).__enter__()):
                try:
                    use()
                except PrecisionError as error:
                    messages.append("forked" in str(error))
            os.write(writing, repr(messages).encode())
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"[True, True]"
    with net.using_bits(4):
        child = os.fork()
        if child == 0:
            with net.using_bits(2), torch.no_grad():
                net(images)
            os.write(writing, b"ran")
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"ran"
