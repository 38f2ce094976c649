"""Every method on the networks that people prune: exact counts, zeros where masked, the rest as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import drive
from drive import methods

LOSS = nn.functional.cross_entropy
Data = list[tuple[Any, torch.Tensor]]


def images(count: int, *shape: int) -> Data:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(count, *shape, generator=generator), torch.arange(count) % 4) for _ in range(2)]


def mlp() -> tuple[nn.Module, Data]:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), images(8, 1, 8, 8)


def cnn() -> tuple[nn.Module, Data]:
    layers = [
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 4),
    ]  # fmt: skip
    return nn.Sequential(*layers), images(8, 3, 8, 8)


def resnet18() -> tuple[nn.Module, Data]:
    models = pytest.importorskip("torchvision.models", reason="ResNet-18 is torchvision's")
    return models.resnet18(num_classes=10), images(2, 3, 32, 32)


def vit() -> tuple[nn.Module, Data]:
    models = pytest.importorskip("torchvision.models", reason="the ViT is torchvision's")
    model = models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4
    )
    nn.init.normal_(model.heads.head.weight, std=0.1)  # all zero at first, and so are all gradients
    return model, images(4, 3, 16, 16)


class Logits(nn.Module):
    """A model of transformers on a dict of inputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**inputs).logits.mT


def bert() -> tuple[nn.Module, Data]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    nn.init.normal_(model.cls.predictions.decoder.weight, std=0.02)  # the padding token's are zero at first
    tokens = torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    return Logits(model), [(inputs, tokens)] * 2


FEW = {name: 2 for name in methods.names() if methods.get(name).iterations > 1}  # iterations, to be quick


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("make", (mlp, cnn, resnet18, vit, bert))
def test_every_method_on(make: Callable[[], tuple[nn.Module, Data]], method: str):
    torch.manual_seed(0)
    model, data = make()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    weights = drive.targets.prunable(model)
    total = sum(w.numel() for w in weights.values())
    chosen = methods.Imp(fraction=0.7) if method == "imp" else method
    chosen = methods.EarlyCrop(latest=2) if method == "early_crop" else chosen
    options = {"sparsity": 0.9, "iterations": FEW.get(method), "progress": False}
    if method in ("crop", "early_crop"):
        options["accumulate"] = 1
    rng = torch.get_rng_state()
    if make is bert and method == "synflow":
        with pytest.raises(
            ValueError, match="synflow: batches must be .* one floating-point tensor.*, got dict"
        ):
            drive.prune(model, data, LOSS, method=chosen, **options)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        return
    masks = drive.prune(model, data, LOSS, method=chosen, **options)

    assert masks.keys() == weights.keys()
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.9 * total)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert weight is weights[name] and mask.shape == weight.shape
        assert (weight[~mask] == 0).all(), name
        if method != "rigl":  # what it has grown is zero at first
            assert torch.equal(weight != 0, mask), name
    assert torch.equal(torch.get_rng_state(), rng)
    if methods.get(method).stage == "training" and method != "imp":
        return
    kept = {id(weights[name]): mask for name, mask in masks.items()}  # a tied weight has two names
    for name, tensor in model.state_dict(keep_vars=True).items():
        expected = before[name].masked_fill(~kept[id(tensor)], 0) if id(tensor) in kept else before[name]
        assert torch.equal(tensor, expected), name
    assert method == "imp" or [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("method", ("drive", "imp", "crop"))
def test_tied_embeddings_are_pruned_once_and_stay_tied(method: str):
    torch.manual_seed(0)
    model, data = bert()
    inner = model.model
    options = {"method": method, "sparsity": 0.6, "iterations": 2, "progress": False}
    assert not [name for name in drive.Masks.dense(model) if "decoder" in name or "embeddings" in name]
    masks = drive.prune(model, data, LOSS, include=["*.decoder.weight", "*.layer.*"], **options)
    tied = [name for name in masks if "decoder" in name or "word_embeddings" in name]
    assert tied == ["model.cls.predictions.decoder.weight"]
    embedding = inner.bert.embeddings.word_embeddings.weight
    assert inner.cls.predictions.decoder.weight is embedding
    assert torch.equal(embedding != 0, masks[tied[0]])
