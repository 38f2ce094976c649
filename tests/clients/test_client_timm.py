"""timm: its models, averages of weights, optimizers and schedulers in one loop."""

from __future__ import annotations

import pytest
import torch
from held import assert_held
from torch import nn

import drive

timm = pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("torchvision", reason="timm's models need torchvision")


def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 32, 32), torch.randint(4, (4,))


@pytest.mark.parametrize("first", ("pruned first", "averaged first"))
def test_a_training_with_an_average(first: str):
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    model = network()
    average = ModelEmaV3(model, decay=0.5) if first == "averaged first" else None
    masks = drive.prune(
        model, [batch()], nn.functional.cross_entropy, sparsity=0.8, iterations=2, progress=False
    )
    masks.attach(model)
    average = average or ModelEmaV3(model, decay=0.5)
    optimizer = create_optimizer_v2(model, opt="lookahead_adamw", lr=1e-3, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=8)
    for number in range(8):
        optimizer.zero_grad()
        inputs, targets = batch()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        schedule.step_update(number)
        average.update(model)
        assert_held(model, masks)
    if first == "averaged first":
        with pytest.raises(AssertionError, match="pruned weights are back"):
            assert_held(average.module, masks)
        masks.apply_(average)
    assert_held(average.module, masks)
