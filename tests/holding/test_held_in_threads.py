"""attach in one thread while others run, step and collect models: nothing is lost, and nothing raised."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from drive import Masks, register_optimizer
from drive.holding import attachment, moments
from drive.holding.hold import live

SECONDS = 0.4  # of a stress test


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads change as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def network() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(6)))


def masks_of(model: nn.Module) -> Masks:
    return Masks({name: torch.rand(4, 4) < 0.5 for name, _ in model.named_parameters()})


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def at_once(*calls: Callable[[], object]) -> None:
    """All of them, over and over, for a while; what one raises is raised."""
    end = time.monotonic() + SECONDS

    def work(call: Callable[[], object]) -> None:
        while time.monotonic() < end:
            call()

    with ThreadPoolExecutor(len(calls)) as pool:
        for one in [pool.submit(work, call) for call in calls]:
            one.result(timeout=30)


def held(model: nn.Module, masks: Masks) -> bool:
    return all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())


@pytest.mark.usefixtures("impatient")
def test_attaching_while_others_step():
    model = network()
    masks, optimizer = masks_of(model), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    masks.attach(model)
    other, many = network(), nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(200))
    Masks({name: torch.ones(1, 1, dtype=torch.bool) for name, _ in many.named_parameters()}).attach(many)

    def attach_and_remove() -> None:
        masks_of(other).attach(other).remove()

    def attach_and_drop() -> None:
        fresh = network()
        masks_of(fresh).attach(fresh)

    def step() -> None:
        train(model, optimizer)
        assert held(model, masks)

    at_once(step, attach_and_remove, attach_and_drop, live)
    assert not other.__dict__.get("_drive_holds") and not other._forward_pre_hooks


@pytest.mark.usefixtures("impatient")
def test_attaching_to_a_part_that_models_share():
    """Of two models that have one backbone, each in its thread."""
    shared = network()
    models = [nn.Sequential(shared, nn.Linear(4, 4)) for _ in range(3)]
    masks = Masks({f"0.{name}": mask for name, mask in masks_of(shared).items()})

    def work(model: nn.Module) -> None:
        with masks.attach(model):
            model(torch.ones(2, 4))

    at_once(*(lambda model=model: work(model) for model in models))
    assert not any("_drive_holds" in module.__dict__ for module in shared.modules())
    assert not any(module._forward_pre_hooks for model in models for module in model.modules())
    attached = [masks.attach(model) for model in models]
    assert len(shared[0].__dict__["_drive_holds"]) == 3 and len(shared[0]._forward_pre_hooks) == 1
    for one in attached:
        one.remove()


@pytest.mark.usefixtures("impatient")
def test_one_hook_a_gradient_although_threads_run_one_model():
    """They find at once that a weight has been thawed; a second hook would stay when the first is removed."""
    for _ in range(30):
        layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
        masks = Masks({"weight": torch.zeros(4, 4, dtype=torch.bool)})
        handle = masks.attach(layer)
        layer.requires_grad_(True)
        ready = threading.Barrier(4)

        def run(layer: nn.Module = layer, ready: threading.Barrier = ready) -> None:
            ready.wait(5)
            layer(torch.ones(1, 4))

        threads = [threading.Thread(target=run) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(layer.weight._post_accumulate_grad_hooks) == 1
        handle.remove()
        layer(torch.ones(1, 4)).sum().backward()
        assert layer.weight.grad.all()


@pytest.mark.parametrize("kind", (nn.Parameter, Tensor.clone))
def test_a_step_elsewhere_leaves_alone_what_stands_in_for_a_while(kind: Callable[[Tensor], Tensor]):
    """torch.func.functional_call puts other tensors in the parameters' places while it runs."""
    model, other = network(), network()
    masks = masks_of(model)
    masks.attach(model)
    held_ones, inside, stepped = live(), threading.Event(), threading.Event()
    stand_in = {name: kind(torch.ones(4, 4)) for name, _ in model.named_parameters()}
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert stepped.wait(5)
            return x

    model.append(Waits())
    thread = threading.Thread(target=lambda: functional_call(model, stand_in, torch.ones(1, 4)))
    thread.start()
    assert inside.wait(5)
    train(other, optimizer)
    stepped.set()
    thread.join()
    assert all((tensor == 1).all() for tensor in stand_in.values())
    own = [id(parameter) for parameter in model.parameters()]
    assert sum(id(hold.param) in own for hold in held_ones) == len(own)


def test_weights_that_are_replaced_are_followed_by_a_step_in_another_thread():
    model = network()
    masks = masks_of(model)
    masks.attach(model)
    model(torch.ones(1, 4))
    for layer in model:
        layer.weight = nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    thread = threading.Thread(target=train, args=(model, optimizer))
    thread.start()
    thread.join()
    assert held(model, masks)


def test_optimizers_are_watched_once(monkeypatch: pytest.MonkeyPatch):
    registered: list[Any] = []

    def register(hook: Any) -> None:
        time.sleep(0.01)
        registered.append(hook)

    monkeypatch.setattr(attachment, "_watching", False)
    monkeypatch.setattr(attachment, "register_optimizer_step_post_hook", register)
    models = [network() for _ in range(4)]
    threads = [threading.Thread(target=masks_of(model).attach, args=(model,)) for model in models]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert registered == [attachment._after_step]


def test_what_is_registered_is_found_although_a_thread_was_just_looking(monkeypatch: pytest.MonkeyPatch):
    class Mine(torch.optim.SGD):
        pass

    looking, registered = threading.Event(), threading.Event()

    class Slow(dict):
        def get(self, kind: type, default: object = None) -> object:
            found = super().get(kind, default)
            if kind is Mine and not registered.is_set():
                looking.set()
                assert registered.wait(5)
            return found

    monkeypatch.setattr(moments, "_registered", Slow())
    weight = nn.Parameter(torch.ones(2))
    optimizer = Mine([weight], lr=0.1)
    optimizer.state[weight]["mine"] = torch.ones(2)
    thread = threading.Thread(target=lambda: list(moments.entrywise(optimizer, weight)))
    thread.start()
    assert looking.wait(5)
    register_optimizer(Mine, "mine")
    registered.set()
    thread.join()
    assert [tensor.tolist() for tensor in moments.entrywise(optimizer, weight)] == [[1.0, 1.0]]
