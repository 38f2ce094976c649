"""Lightning: its Trainer, its averaging of weights, Fabric."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from held import assert_held
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import drive

lightning = pytest.importorskip("lightning", reason="lightning is not installed")


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randint(4, (64,), generator=generator)), batch_size=16)


def trainer(**options) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def pruned() -> tuple[Module, drive.Masks]:
    model = Module()
    masks = drive.prune(
        model, loader(), nn.functional.cross_entropy, sparsity=0.8, iterations=2, progress=False
    )
    return model, masks


def test_trainer():
    model, masks = pruned()
    masks.attach(model)
    trainer(gradient_clip_val=0.5, accumulate_grad_batches=2).fit(model, loader())
    assert_held(model, masks)


def test_handle_in_the_module_and_checkpoints(tmp_path):
    model, masks = pruned()
    model.handle = masks.attach(model)
    ours = trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    ours.fit(model, loader())
    assert_held(model, masks)
    (path,) = tmp_path.rglob("*.ckpt")
    other = Module()
    masks.attach(other)
    trainer().fit(other, loader(), ckpt_path=str(path))
    assert_held(other, masks)
    dense = Module()
    trainer().fit(dense, loader())
    assert all(layer.weight.all() for layer in dense.net if isinstance(layer, nn.Linear))


def test_averaged_weights():
    """The average is a copy made when the fit begins: it is held, too."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("this lightning has no WeightAveraging")
    model, masks = pruned()
    masks.attach(model)
    trainer(callbacks=[callbacks.WeightAveraging()]).fit(model, loader())
    assert_held(model, masks)


def test_fabric():
    model, masks = pruned()
    dense = copy.deepcopy(model)
    fabric = lightning.Fabric(accelerator="cpu")
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    masks.attach(wrapped, optimizer)
    for inputs, targets in loader():
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(wrapped(inputs), targets))
        optimizer.step()
    assert_held(model, masks)
    assert not torch.equal(model.net[0].weight, dense.net[0].weight)
