"""accelerate: its optimizer around yours, accumulation, clipping, saved states."""

from __future__ import annotations

import pytest
import torch
from held import assert_held
from torch import nn

import drive

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


def test_a_training_that_is_saved_and_resumed(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    data = torch.utils.data.TensorDataset(torch.randn(64, 16), torch.randint(4, (64,)))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), torch.utils.data.DataLoader(data, batch_size=8)
    )

    def epoch() -> None:
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(inputs), targets))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    epoch()
    accelerator.save_state(str(tmp_path / "dense"))
    masks = drive.prune(
        model, loader, nn.functional.cross_entropy, sparsity=0.8, iterations=3, progress=False
    )
    masks.attach(model, optimizer)
    epoch()
    assert_held(model, masks)
    accelerator.load_state(str(tmp_path / "dense"))  # weights and moments of the dense model
    inner = accelerator.unwrap_model(model)
    for name, mask in masks.items():
        assert not inner.get_parameter(name)[~mask].any()
    epoch()
    assert_held(inner, masks)
    for name, weight in inner.named_parameters():
        if name in masks:
            assert not optimizer.state[weight]["exp_avg"][~masks[name]].any()
