"""Threads of one process: each gets what it gets alone, nobody waits for ever, the RNG is as before."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import drive
from drive import Masks, register_layer
from drive.layers import Weight, registry
from drive.targets.restore import kept_rng, seeded

BATCHES = [
    (torch.randn(8, 6, generator=torch.Generator().manual_seed(s)), torch.arange(8) % 4) for s in range(3)
]


TEMPLATE = nn.Sequential(
    nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.Dropout(0.2), nn.Linear(16, 4)
)


def network(seed: int = 0) -> nn.Module:
    """Made without drawing from the RNG of all threads."""
    model, generator = copy.deepcopy(TEMPLATE), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model


def prune(model: nn.Module, **options: Any) -> Masks:
    options = {"sparsity": 0.8, "iterations": 30, "progress": False, **options}
    return drive.prune(model, BATCHES, F.cross_entropy, **options)


def same(one: Masks, two: Masks) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """What they return, called at once."""
    ready = threading.Barrier(len(calls))
    with ThreadPoolExecutor(len(calls)) as pool:
        found = [pool.submit(lambda call=call: (ready.wait(5), call())[1]) for call in calls]
        return [one.result(timeout=30) for one in found]


@pytest.mark.parametrize("method", ("drive", "random", "crop", "gradual"))
def test_each_gets_what_it_gets_alone(method: str):
    options = {"method": method, "iterations": 30 if method == "drive" else 4}
    alone = [prune(network(s), seed=s, **options) for s in range(4)]
    before = torch.get_rng_state()
    found = in_threads(*(lambda s=s: prune(network(s), seed=s, **options) for s in range(4)))
    assert all(map(same, alone, found))
    assert torch.equal(before, torch.get_rng_state())


def test_what_else_draws_takes_turns():
    model = network()
    masks = prune(network(), iterations=1)
    x, expected = BATCHES[0][0], prune(network(1))
    before, shown = torch.get_rng_state(), masks.summary(model, x)
    lost = drive.collapse(model, masks, x)
    found = in_threads(
        lambda: prune(network(1)),
        lambda: [masks.summary(network(), x) for _ in range(5)],
        lambda: [drive.collapse(network(), masks, x) for _ in range(5)],
        lambda: [drive.sparse.convert(network(), masks, x, deterministic=True) for _ in range(2)],
    )
    assert same(found[0], expected) and found[1] == [shown] * 5 and found[2] == [lost] * 5
    assert torch.equal(before, torch.get_rng_state())


def test_a_thread_may_come_again():
    """on_step and losses that prune another model."""
    inner: list[Masks] = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        inner.append(prune(network(2), iterations=1))
        return F.cross_entropy(outputs, targets)

    alone = [prune(network(1), iterations=3), prune(network(2), iterations=1)]
    nested = drive.prune(
        network(1), BATCHES, loss_fn, sparsity=0.8, iterations=3, progress=False,
        on_step=lambda result: inner.append(prune(network(2), iterations=1)),
    )  # fmt: skip
    assert same(nested, alone[0]) and len(inner) == 6 and all(same(one, alone[1]) for one in inner)


@pytest.mark.parametrize("error", (KeyboardInterrupt, RuntimeError, SystemExit))
def test_who_fails_lets_the_next_one_in(error: type[BaseException]):
    def fail(result: object) -> None:
        raise error

    with pytest.raises(error):
        prune(network(), on_step=fail)
    assert len(in_threads(lambda: prune(network(), iterations=1))) == 1


@contextmanager
def another_thread_inside() -> Iterator[None]:
    """It holds the RNG until the end."""
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with kept_rng():
            inside.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(5)
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_an_interrupt_while_it_waits_changes_nothing():
    model = network()
    before, rng = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    with another_thread_inside():
        timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            prune(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    prune(model, iterations=1)


def test_a_forked_process_waits_for_nobody():
    """A DataLoader's worker has one thread; who held the RNG is none of its."""
    with another_thread_inside():
        child = os.fork()
        if child == 0:
            with seeded(0):
                os._exit(7)
        for _ in range(100):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            time.sleep(0.05)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("it waits")
    assert os.waitstatus_to_exitcode(status) == 7


def test_a_fork_inside_goes_on_in_both():
    with seeded(0):
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
    if not child:
        os._exit(5)  # after it has let go of what its parent took
    assert os.waitstatus_to_exitcode(status) == 5
    prune(network(), iterations=1)


def test_ranks_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch):
    """They may be threads of one process, and wait for each other inside."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    ready = threading.Barrier(2)

    def collective() -> int:
        with seeded(0):
            return ready.wait(5)

    assert sorted(in_threads(collective, collective)) == [0, 1]


def test_seeds_leave_nothing_behind_for_cuda():
    """torch.manual_seed says what CUDA's generators are to be seeded with once they exist."""
    waiting = list(torch.cuda._queued_calls)
    state = torch.get_rng_state()
    for seed in (0, -1, 2**64 - 1):
        with seeded(seed):
            drawn = torch.rand(3)
        assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.cuda._queued_calls == waiting


def test_what_is_registered_is_found_although_a_thread_was_just_looking(monkeypatch: pytest.MonkeyPatch):
    """It looked before, and remembers afterwards."""

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(4, 4))

    looking, registered = threading.Event(), threading.Event()
    known = registry._known

    def slowly(kind: type) -> Any:
        if kind is Mine:
            looking.set()
            assert registered.wait(5)
        return known(kind)

    monkeypatch.setattr(registry, "_known", slowly)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    thread = threading.Thread(target=lambda: registry.weights_of(Mine()))
    thread.start()
    assert looking.wait(5)
    register_layer(Mine, {"kernel": Weight()})
    registered.set()
    thread.join()
    assert list(registry.weights_of(Mine())) == ["kernel"]
