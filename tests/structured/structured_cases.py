"""Models whose channels are pruned, and masks that empty some of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import drive
from drive.structured.check import zero
from drive.structured.couplings import couplings
from drive.structured.groups import Couplings, Group
from drive.targets.targets import prunable

Case = tuple[nn.Module, Any]  # a model, and one batch of inputs


def generic(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, with parameters and statistics as after a training: none is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (tensor.is_floating_point() and tensor.dim() < 2) or "scale" in name:
            tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return model.double().eval()


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    found = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def groups_of(model: nn.Module, inputs: Any, **options: Any) -> Couplings:
    weights = prunable(model, **options)
    return couplings(model, weights.keys(), lambda: outputs(model, inputs), op="test")


def thinned(model: nn.Module, inputs: Any) -> tuple[drive.Masks, dict[Group, Tensor], nn.Module]:
    """Masks that empty about half of the units of each group, these units, and a copy with them set to 0."""
    generator = torch.Generator().manual_seed(1)
    masks, full = drive.Masks.dense(model), copy.deepcopy(model)
    units = {}
    for group in groups_of(model, inputs).groups:
        stays = torch.rand(group.units, generator=generator) > 0.5
        stays[0] = True
        units[group] = stays
        for place in group.rows:
            masks[place.tensor].index_fill_(place.axis, place.indices[~stays].flatten(), False)
    zero(full, units)
    return masks, units, full


def largest_difference(model: nn.Module, other: nn.Module, inputs: Any) -> float:
    """Of all outputs, relative to the largest of each."""
    with torch.no_grad():
        pairs = zip(outputs(model, inputs), outputs(other, inputs), strict=True)
        return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def need(case: str) -> None:
    """Skip the test where the package is not here that the model is of."""
    package = "transformers" if case in ("BERT", "Llama", "GPT-2") else "torchvision"
    if case != "cnn4":
        pytest.importorskip(package, exc_type=ImportError)


def _torchvision(name: str, size: int) -> Callable[[], Case]:
    def build() -> Case:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=10), images(size)

    return build


def _vision_transformer() -> Case:
    """As vit_b_16 is, but small."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10), images(32)


def _own(name: str) -> Callable[[], Case]:
    def build() -> Case:
        from drive.experiments.training.networks import Network

        return Network(name, 10, 3, 32).build(), images(32)

    return build


def _transformers(kind: str, config_of: str, **config: Any) -> Callable[[], Case]:
    def build() -> Case:
        import transformers

        made = getattr(transformers, config_of)(**config)
        inputs = {"input_ids": torch.arange(12)[None]}
        return getattr(transformers, kind)(made), inputs

    return build


_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 96}

CASES: dict[str, Callable[[], Case]] = {
    **{name: _own(name) for name in ("cnn4", "resnet8", "alexnet", "vgg16_bn", "resnet18")},
    **{
        f"torchvision {name}": _torchvision(name, 64)
        for name in (
            "resnet18",
            "resnet50",
            "mobilenet_v2",
            "densenet121",
            "efficientnet_b0",
            "convnext_tiny",
        )
    },
    "torchvision ViT": _vision_transformer,
    "BERT": _transformers("BertModel", "BertConfig", vocab_size=100, **_SMALL),
    "Llama": _transformers(
        "LlamaForCausalLM", "LlamaConfig", vocab_size=100, num_key_value_heads=2, use_cache=False, **_SMALL
    ),
    "GPT-2": _transformers(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=100,
        n_layer=2,
        n_head=4,
        n_embd=64,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    ),
}
