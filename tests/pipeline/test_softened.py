"""Softened: its way to the bare network, what it must leave alone, and what copies and ranks do with it."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from held import assert_held
from soft_networks import LABELS, NAN, convolutional, inputs, looks, mlp, networks, same, step
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from worlds import returned, run

import drive
from drive import Masks
from drive.pipeline import Softened
from drive.pipeline.activations import SoftReLU
from drive.targets.targets import prunable


def test_label_smoothing_has_two_values():
    logits, classes = torch.randn(8, 4, dtype=torch.float64), 4
    softened = Softened(nn.Linear(5, 4), smoothing=0.2, until=0.5)
    for progress, t in ((0, 0), (0.125, 0.25), (0.5, 1), (1, 1)):
        softened.at(progress)
        a = 0.2 * (1 - t)
        targets = torch.full((8, classes), a / (classes - 1), dtype=torch.float64)
        targets[torch.arange(8), LABELS] = 1 - a
        found = F.cross_entropy(logits, LABELS, label_smoothing=softened.label_smoothing(classes))
        torch.testing.assert_close(found, F.cross_entropy(logits, targets))
    assert softened.label_smoothing(4) == 0


def test_label_smoothing_ends_at_uniform_targets():
    softened = Softened(nn.Linear(5, 4), smoothing=0.9)
    assert softened.label_smoothing(2) == 1  # a is 1/2, not 0.9
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        softened.label_smoothing(1)


@networks
def test_at_the_end_it_is_the_bare_network(network: Callable[[], nn.Sequential]):
    """Even if the skips hold NaN; gradients too, and zeros for the skips, for which DDP waits."""
    bare, softened = network(), Softened(network())
    with torch.no_grad():
        for parameter in softened.added():
            parameter.fill_(NAN)
    softened.at(0.5)
    x = inputs(bare)
    for train in (True, False):
        bare.train(train)
        softened.train(train)
        found, expected = softened(x), bare(x)
        assert same(found, expected)
    F.cross_entropy(found, LABELS).backward()
    F.cross_entropy(expected, LABELS).backward()
    for name, parameter in bare.named_parameters():
        assert same(softened.module.get_parameter(name).grad, parameter.grad), name
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in softened.added())
    assert same(softened.finish()(x), expected)


@networks
def test_finish_takes_everything_off(network: Callable[[], nn.Sequential], caplog: pytest.LogCaptureFixture):
    fresh = network()
    softened = Softened(network())
    softened.at(0.5)
    x = inputs(fresh)
    before = softened.eval()(x)
    model = softened.finish()
    fresh.eval()(x)
    assert looks(model) == looks(fresh)
    assert list(model.state_dict()) == list(fresh.state_dict()) and not caplog.records
    assert same(model(x), before) and same(softened(x), before)
    for again, error in ((softened.finish, "finish: has been"), (lambda: softened.at(1), "at: finish has")):
        with pytest.raises(RuntimeError, match=error):
            again()
    Softened(model)  # once more


def test_an_early_stop_is_said(caplog: pytest.LogCaptureFixture):
    softened = Softened(mlp())
    softened.at(0.2)
    x = inputs(softened.module)
    before = softened(x)
    assert not torch.equal(softened.finish()(x), before)
    assert "outputs change, for t is 0.4, not 1" in caplog.text


def test_names_and_parameters():
    bare, softened = convolutional(), Softened(convolutional())
    assert list(prunable(softened)) == list(prunable(bare)) == list(prunable(softened.module))
    masks = drive.prune(softened, [], None, method="magnitude", sparsity=0.8, progress=False)
    alone = drive.prune(bare, [], None, method="magnitude", sparsity=0.8, progress=False)
    assert all(torch.equal(masks[name], alone[name]) for name in alone) and len(masks) == len(alone)
    added = {id(parameter) for parameter in softened.added()}
    assert len(added) == 4 * 3 and added < {id(parameter) for parameter in softened.parameters()}
    kept = {"module." + name for name in bare.state_dict()} | {"t"}
    others = set(softened.state_dict()) - kept
    assert kept < set(softened.state_dict()) and all(name.startswith("soft_skips.") for name in others)
    assert not others & set(Masks.dense(softened))


@pytest.mark.parametrize("wrapped", (False, True))
def test_masks_hold(wrapped: bool):
    softened = Softened(convolutional())
    masks = drive.prune(softened.module, [], None, method="magnitude", sparsity=0.8, progress=False)
    optimizer = torch.optim.SGD(softened.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    masks.attach(softened if wrapped else softened.module, optimizer)
    for epoch in range(6):
        softened.at(epoch / 6)
        step(softened, optimizer, inputs(softened.module, epoch), softened.label_smoothing(4))
        assert_held(softened.module, masks)
    assert_held(softened.finish(), masks)


@networks
def test_resumed_training_has_the_same_bits(network: Callable[[], nn.Sequential], tmp_path: Path):
    def begun() -> tuple[Softened, torch.optim.Optimizer]:
        softened = Softened(network())
        return softened, torch.optim.SGD(softened.parameters(), lr=0.05, momentum=0.9)

    def train(softened: Softened, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for number in steps:
            if number % 2 == 0:  # not in the first step after the stop
                softened.at(number / 10)
            step(softened, optimizer, inputs(softened.module, number), softened.label_smoothing(4))

    softened, optimizer = begun()
    train(softened, optimizer, range(3))
    torch.save([softened.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint")
    train(softened, optimizer, range(3, 8))
    resumed, others = begun()
    state, of_optimizer = torch.load(tmp_path / "checkpoint")
    resumed.load_state_dict(state)
    others.load_state_dict(of_optimizer)
    assert resumed.t.item() == state["t"].item() > 0
    train(resumed, others, range(3, 8))
    expected = softened.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


def test_a_checkpoint_of_the_end_ends_it():
    done, softened = Softened(mlp()), Softened(mlp())
    done.at(1)
    softened.load_state_dict(done.state_dict())
    x = inputs(softened.module)
    assert same(softened(x), mlp()(x)) and softened.label_smoothing(4) == 0


def unpickled(softened: Softened) -> Softened:
    return pickle.loads(pickle.dumps(softened))


def reloaded(softened: Softened) -> Softened:
    file = io.BytesIO()
    torch.save(softened, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@networks
@pytest.mark.parametrize("copied", (copy.deepcopy, unpickled, reloaded))
def test_copies(network: Callable[[], nn.Sequential], copied: Callable[[Softened], Softened]):
    softened = Softened(network(), until=1.0)
    softened.at(0.25)
    twin, x = copied(softened), inputs(softened.module)
    assert same(twin.eval()(x), softened.eval()(x))
    before = softened(x)
    twin.at(0.75)
    assert not torch.equal(twin(x), before) and same(softened(x), before)
    with torch.no_grad():
        for parameter in twin.added():
            parameter.fill_(NAN)
    assert not twin(x).isfinite().any() and same(softened(x), before)
    twin.finish()
    assert twin(x).isfinite().all() and same(softened(x), before)
    assert not any(module._forward_hooks for module in twin.modules())


def test_other_types():
    softened = Softened(convolutional()).double()
    softened.at(0.25)
    assert all(module.t == 0.5 for module in softened.modules() if hasattr(module, "t"))
    assert softened(inputs(softened.module).double()).dtype == torch.float64


def test_autocast():
    softened = Softened(convolutional())
    optimizer = torch.optim.SGD(softened.parameters(), lr=0.1)
    for progress in (0, 0.25, 0.5):
        softened.at(progress)
        with torch.autocast("cpu", torch.bfloat16):
            output = step(softened, optimizer, inputs(softened.module))
        assert output.dtype == torch.bfloat16 and output.isfinite().all()


@networks
def test_compiled(network: Callable[[], nn.Sequential]):
    """Compiled once for all t below 1, and once for the bare network."""
    torch._dynamo.reset()
    softened, eager = Softened(network(), until=1.0), Softened(network(), until=1.0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(softened, backend=counter, fullgraph=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (softened, eager)]
    for progress, count in ((0, 1), (0.125, 1), (0.5, 1), (0.9, 1), (1, 2), (1, 2), (0.5, 2)):
        softened.at(progress)
        eager.at(progress)
        x = inputs(softened.module, int(10 * progress))
        outputs = [step(m, o, x) for m, o in zip((compiled, eager), optimizers, strict=True)]
        torch.testing.assert_close(*outputs)
        assert counter.frame_count == count
    torch._dynamo.reset()


def spread() -> None:
    for network in (convolutional, mlp):
        softened = Softened(network())
        model = DistributedDataParallel(softened)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for epoch in range(8):
            softened.at(epoch / 8)
            step(model, optimizer, inputs(softened.module, 10 * epoch + dist.get_rank()))
        assert all(not parameter.grad.any() for parameter in softened.added())
        for name, parameter in softened.named_parameters():
            others = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
            dist.all_gather(others, parameter.detach())
            assert torch.equal(others[0], others[1]), name
        assert list(prunable(model)) == list(prunable(network()))


def test_on_two_ranks():
    """Through t = 1, after which no gradient of the skips may be missing."""
    returned(run(2, spread))


@pytest.mark.parametrize("inside", (False, True))
def test_resnet(inside: bool):
    """torchvision's has one ReLU at two places of each block, which writes into its input."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.resnet18(num_classes=4)
    fresh = copy.deepcopy(model)
    softened = Softened(model, activations=inside)
    assert sum(isinstance(module, SoftReLU) for module in model.modules()) == (9 if inside else 0)
    assert len(softened.soft_skips) == 17  # all but the 1 x 1 of the three shortcuts
    optimizer = torch.optim.SGD(softened.parameters(), lr=0.01)
    x = torch.randn(8, 3, 32, 32)
    for progress in (0, 0.25, 0.5):
        softened.at(progress)
        assert step(softened, optimizer, x, softened.label_smoothing(4)).isfinite().all()
    y = softened.eval()(x)
    fresh.load_state_dict(softened.finish().state_dict())
    assert same(fresh.eval()(x), y) and looks(model) == looks(fresh)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"smoothing": 1.0}, "smoothing must be at least 0 and below 1, got 1.0"),
        ({"smoothing": -0.1}, "smoothing must be"),
        ({"beta": 0.0}, "beta must be above 0 and finite, got 0.0"),
        ({"beta": NAN}, "beta must be"),
        ({"until": 0.0}, "until must be above 0 and at most 1, got 0.0"),
        ({"until": 1.1}, "until must be"),
        ({"skip_start": "ones"}, "skip_start must be 'constant' or 'zero', got 'ones'"),
    ),
)
def test_bad_arguments(options: dict[str, Any], message: str):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        Softened(model, **options)
    assert looks(model) == looks(mlp())


@pytest.mark.parametrize("progress", (-0.1, 1.1, NAN))
def test_bad_progress(progress: float):
    with pytest.raises(ValueError, match="progress must be 0 to 1, got"):
        Softened(mlp()).at(progress)


def test_bad_models():
    with pytest.raises(TypeError, match="model must be a module, got list"):
        Softened([])
    with pytest.raises(ValueError, match="0 must have a size"):
        Softened(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)))
    for options in ({}, {"activations": False}, {"skips": False}):
        softened = Softened(mlp(), **options)
        for model in (softened, softened.module, nn.Sequential(softened)):
            with pytest.raises(ValueError, match="softened already"):
                Softened(model)


def test_a_network_without_relus(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    softened = Softened(nn.Linear(5, 4))
    assert "0 ReLUs are soft, 0 layers have a skip" in caplog.text
    assert softened(torch.randn(2, 5)).shape == (2, 4) and not softened.added()
