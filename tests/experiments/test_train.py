"""The training loop and the networks: exact resumption, exact zeros, what is rejected."""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import drive
from drive.experiments.data.batches import Batches
from drive.experiments.data.dataset import Dataset
from drive.experiments.runs.inputs import InputError
from drive.experiments.training.compute import Compute
from drive.experiments.training.history import Epoch, Log
from drive.experiments.training.loop import Checkpoint, Paused, evaluate, train
from drive.experiments.training.networks import Network, names
from drive.experiments.training.recipe import Recipe

pytest.importorskip("lightning", reason="networks are trained on lightning's Fabric")

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 4
RECIPE = Recipe(EPOCHS, lr=0.05)
NETWORK = Network("small_cnn", classes=2, channels=1, side=8)


class Killed(Exception):
    pass


@pytest.fixture
def batches() -> Batches:
    """Two classes that can be told apart: bright above or bright below."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (64, 1, 8, 8), generator=rng, dtype=torch.uint8)
    labels = torch.arange(64) % 2
    images[labels == 0, :, :4] += 60
    images[labels == 1, :, 4:] += 60
    return Batches(Dataset(images, labels, images, labels, classes=2, augment=True), 16, seed=3)


def fresh(dropout: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORK.build()
    return nn.Sequential(nn.Dropout(0.1), model) if dropout else model


def pruned(model: nn.Module, batches: Batches) -> drive.Masks:
    stream = batches.endless("prune", lambda: None)
    return drive.prune(model, stream, F.cross_entropy, sparsity=0.9, iterations=3, progress=False)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def kill_after(steps: int) -> Callable[[], None]:
    left = iter(range(steps))

    def step() -> None:
        if next(left, None) is None:
            raise Killed

    return step


def test_learns(batches: Batches) -> None:
    model = fresh()
    plain = Batches(replace(batches.data, augment=False), 16, seed=3)
    losses = [epoch.loss for epoch in train(model, plain, Recipe(12, lr=0.05), epochs=range(12))]
    assert len(losses) == 12 and losses[-1] < losses[0] / 2
    assert evaluate(model, plain) > 60  # of 64


def test_same_seed_same_bits(batches: Batches) -> None:
    models = []
    for noise in range(2):
        models.append(fresh(dropout=True))
        torch.manual_seed(noise)  # what ran before must not matter
        train(models[-1], batches, RECIPE, epochs=range(EPOCHS))
    assert same(*models)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("step", [1, 6, 11, 15])
def test_resumes_to_the_bit(batches: Batches, tmp_path: Path, step: int, sparse: bool) -> None:
    def run(on_step: Callable[[], None] = lambda: None, path: Path | None = None) -> nn.Module:
        model = fresh(dropout=True)  # dropout draws from the global RNG
        masks = pruned(model, batches) if sparse else None
        checkpoint = Checkpoint(path, {}) if path else None
        train(
            model, batches, RECIPE, epochs=range(EPOCHS), masks=masks, checkpoint=checkpoint, on_step=on_step
        )
        return model

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        run(kill_after(step), path)
    assert path.exists() == (step >= 4)  # 4 steps an epoch
    resumed = run(path=path)
    assert same(run(), resumed)
    assert list(tmp_path.iterdir()) == [path]  # no partial file is left


def test_a_finished_training_is_not_trained_again(batches: Batches, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", {})
    first, second = fresh(), fresh()
    history = train(first, batches, RECIPE, epochs=range(EPOCHS), checkpoint=checkpoint)
    assert train(second, batches, RECIPE, epochs=range(EPOCHS), checkpoint=checkpoint) == history
    assert same(first, second)


def test_checkpoints_are_spaced(batches: Batches, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        train(
            fresh(), batches, RECIPE, epochs=range(EPOCHS), checkpoint=Checkpoint(path, {}, every=1e6),
            on_step=kill_after(13),
        )  # fmt: skip
    assert not path.exists()


def test_pruned_weights_stay_exactly_zero(batches: Batches) -> None:
    model = fresh()
    masks = pruned(model, batches)

    def check() -> None:
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            assert not weight[~mask].any()

    train(model, batches, RECIPE, epochs=range(EPOCHS), masks=masks, on_step=check)
    assert any(model.get_parameter(name)[mask].any() for name, mask in masks.items())


def test_late_epochs_see_the_batches_and_rates_of_these_epochs(batches: Batches) -> None:
    model = fresh()
    seen: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append(optimizer.param_groups[0]["lr"])

    with register_optimizer_step_pre_hook(note):
        train(model, batches, RECIPE, epochs=range(2, EPOCHS))
    assert seen == pytest.approx([RECIPE.lr_at(step / 4) for step in range(8, 16)])


def test_learning_rate_rises_then_falls() -> None:
    rates = [RECIPE.lr_at(EPOCHS * i / 100) for i in range(100)]
    assert max(rates) == RECIPE.lr == rates[20]
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)


def test_divergence_is_one_clear_error(batches: Batches) -> None:
    with pytest.raises(InputError, match=r"--lr must be small enough to train, got 1e\+30"):
        train(fresh(), batches, Recipe(EPOCHS, lr=1e30), epochs=range(EPOCHS))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04broken"])
def test_corrupt_checkpoint(batches: Batches, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="must be a checkpoint file"):
        train(fresh(), batches, RECIPE, epochs=range(EPOCHS), checkpoint=Checkpoint(path, {}))


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("name", names())
def test_every_network_prunes_and_answers(name: str, side: int) -> None:
    if name not in ("small_cnn", "mlp", "cnn4", "alexnet"):
        pytest.importorskip("torchvision", reason=f"{name} is torchvision's")
    if side == 8 and name not in ("small_cnn", "mlp", "resnet8", "resnet18"):
        with pytest.raises(
            InputError, match="--model must be one of small_cnn, mlp, resnet8, resnet18 for images of side 8"
        ):
            Network(name, 10, 3, side).build()
        return
    channels = 1 if side == 8 else 3
    model = Network(name, 10, channels, side).build()
    images, labels = torch.randn(4, channels, side, side), torch.arange(4)
    assert model(images).shape == (4, 10)
    masks = drive.prune(
        model, [(images, labels)], F.cross_entropy, method="snip", sparsity=0.9, progress=False
    )
    assert masks.sparsity() == pytest.approx(0.9, abs=1e-4)


def test_two_processes_train_as_one_does(batches: Batches, tmp_path: Path) -> None:
    """Without BatchNorm, whose statistics are of a process; it is paused and resumed."""
    found = []
    for devices in (1, 2):
        torch.manual_seed(0)
        model = Network("mlp", classes=2, channels=1, side=8).build()
        masks = drive.prune(model, [], None, method="magnitude", sparsity=0.5, progress=False)
        checkpoint = Checkpoint(tmp_path / f"{devices}.pt", {})
        options = {"compute": Compute(devices=devices), "masks": masks, "log": Log(tmp_path)}
        if devices == 2:
            late = replace(checkpoint, deadline=0.0)
            with pytest.raises(Paused):
                train(model, batches, RECIPE, epochs=range(EPOCHS), checkpoint=late, **options)
        steps = []
        history = train(
            model, batches, RECIPE, epochs=range(EPOCHS), checkpoint=checkpoint,
            on_step=partial(steps.append, 1), **options,
        )  # fmt: skip
        assert len(steps) == EPOCHS * len(batches) and not any(
            model.get_parameter(name)[~mask].any() for name, mask in masks.items()
        )
        found.append(([epoch.loss for epoch in history], model.state_dict()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, weight in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], weight, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="--devices must share batches of 16 .* evenly, got 3"):
        train(fresh(), batches, RECIPE, epochs=range(1), compute=Compute(devices=3))


def test_without_tensorboard(batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match=r"tensorboard must be installed \(pip install 'drive-prune"):
        train(fresh(), batches, RECIPE, epochs=range(1), log=Log(tmp_path, tensorboard=True))


def test_a_resumed_training_stands_in_tensorboard_once(batches: Batches, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    warmup = (Epoch(1, 9.0, 0.1, None, 1.0),)
    options = {
        "epochs": range(1, EPOCHS), "log": Log(tmp_path, warmup, test_every=2, tensorboard=True),
        "checkpoint": Checkpoint(tmp_path / "checkpoint.pt", {}, every=1e6),
    }  # fmt: skip
    with pytest.raises(Killed):  # after two epochs, neither of them saved
        train(fresh(), batches, RECIPE, on_step=kill_after(9), **options)
    history = train(fresh(), batches, RECIPE, **options)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [
        (e.epoch, pytest.approx(e.loss, rel=1e-6)) for e in (*warmup, *history)
    ]
    assert [e.step for e in found.Scalars("accuracy")] == [2, 4]


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def test_sparse_ops_follow_the_dense_losses() -> None:
    images = torch.randint(0, 255, (96, 3, 16, 16), dtype=torch.uint8)
    labels = images.float().mean((1, 2, 3)).argsort().argsort() // 48
    batches = Batches(Dataset(images, labels, images, labels, classes=2, augment=False), 32, seed=3)
    model = nn.Sequential(
        Double(), nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2),
    ).double()  # fmt: skip
    masks = drive.prune(model, [], None, method="magnitude", sparsity=0.98, progress=False)
    converted = drive.sparse.convert(model.train(), masks, torch.zeros(32, 3, 16, 16), deterministic=True)
    assert drive.sparse.report(converted).chosen == "sparse chains"  # else nothing is tested here
    losses, weights = [], []
    for sparse_ops in (False, True):
        trained = copy.deepcopy(model)
        compute = Compute(sparse_ops=sparse_ops)
        done = train(trained, batches, Recipe(3, 0.05), epochs=range(3), masks=masks, compute=compute)
        losses.append([epoch.loss for epoch in done])
        weights.append(trained.state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=1e-10, abs=0)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-8, atol=1e-10)
    assert not any(weights[1][name][~mask].any() for name, mask in masks.items())
