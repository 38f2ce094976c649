"""What is pruned by default of models that nobody here wrote, what is left out, and why."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import drive
from drive.targets import prunable

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def hf(name: str, **config) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    family = name.partition("For")[0].removesuffix("LMHeadModel")
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**config))


def tokens(name: str, **config) -> Callable[[], nn.Module]:
    return lambda: hf(name, vocab_size=96, bos_token_id=0, eos_token_id=1, **config)


def vision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
        return getattr(models, name)(weights=None)

    return build


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(96, 32), nn.LSTM(32, 32, 2), nn.Linear(32, 96)


def gcn() -> nn.Module:
    geometric = pytest.importorskip("torch_geometric.nn", reason="PyTorch Geometric is not installed")
    return nn.ModuleList(
        [geometric.GCNConv(32, 64), geometric.GATConv(64, 64), geometric.RGCNConv(64, 32, 3)]
    )


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(
        MODELS["GPT-2"](), peft.LoraConfig(target_modules=["c_attn"], r=4, fan_in_fan_out=True)
    )
    return model.requires_grad_()  # PEFT freezes what it adapts


GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": tokens("GPT2LMHeadModel", **GPT2),
    "Llama": tokens("LlamaForCausalLM", **SMALL, num_key_value_heads=2),
    "Mixtral": tokens("MixtralForCausalLM", **SMALL, num_key_value_heads=2, num_local_experts=4),
    "BERT": tokens("BertForMaskedLM", **SMALL),
    "T5": tokens("T5ForConditionalGeneration", d_model=64, d_ff=128, num_layers=2, num_heads=2, d_kv=32),
    "ViT": vision("vit_b_16"),
    "Swin": vision("swin_t"),
    "ConvNeXt": vision("convnext_tiny"),
    "EfficientNet": vision("efficientnet_b0"),
    "LSTM": Lstm,
    "GCN": gcn,
    "PEFT": adapted,
}


@pytest.mark.parametrize("name", MODELS)
def test_almost_all_matrices_are_pruned_and_counted_exactly(name: str):
    model = MODELS[name]()
    coverage = drive.coverage(model)
    factors = sum(row.entries for row in coverage.rows if row.reason == "a factor of an adapter")
    assert coverage.pruned / (coverage.matrices - factors) > 0.95, str(coverage)
    assert coverage.total == sum(parameter.numel() for parameter in model.parameters())
    weights = prunable(model)
    assert [row.name for row in coverage.rows if not row.reason] == list(weights)
    masks = drive.prune(model, [], method="magnitude", sparsity=0.7, progress=False)
    total = sum(mask.numel() for mask in masks.values())
    assert list(masks) == list(weights) and total == coverage.pruned
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.7 * total)
    assert all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize("name", ("GPT-2", "Mixtral", "BERT", "T5", "LSTM", "PEFT"))
def test_two_of_four_inputs(name: str):
    model = MODELS[name]()
    options = {"method": "magnitude", "sparsity": 0.5, "structure": "2:4", "progress": False}
    masks = drive.prune(model, [], **options)
    axes = drive.targets.structures.axes_of(model, masks)
    for key, mask in masks.items():
        groups = mask.movedim(axes[key].inputs, -1).unflatten(-1, (-1, 4))
        assert (groups.sum(-1) == 2).all(), key
    conv1d = [key for key in masks if ".c_fc." in key]
    assert all(axes[key].inputs == 0 for key in conv1d) and (bool(conv1d) == (name in ("GPT-2", "PEFT")))


def test_blocks_do_not_go_over_the_end_of_a_matrix():
    model = nn.Sequential(nn.Conv1d(8, 12, 1, groups=2))  # two groups of 6 outputs
    options = {"method": "magnitude", "sparsity": 0.5, "progress": False}
    with pytest.raises(ValueError, match="0.weight must have a shape of whole blocks for structure 4x4"):
        drive.prune(model, [], structure="4x4", **options)
    drive.prune(model, [], structure="3x4", **options)


def test_what_is_left_out_says_why():
    model = nn.Sequential(
        nn.Embedding(8, 8),
        nn.Linear(8, 8),
        nn.Linear(8, 8),
        nn.LayerNorm(8),
        nn.Bilinear(8, 8, 8),
        nn.Linear(8, 8),
    )
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    coverage = drive.coverage(model)
    assert {row.name: row.reason for row in coverage.rows} == {
        "5.weight": "",
        "4.weight": "layer type Bilinear is not known",
        "0.weight": "an embedding",
        "2.weight": "frozen",
        "1.bias": "a bias, a norm or another vector",
    }
    assert "pruned: 64 of 752 parameters, 11.11% of the trainable matrices" in str(coverage)
    assert list(prunable(model, include=["1.weight", "2.*"])) == ["1.weight", "2.weight"]


def test_normalised_weights_have_zeros_in_what_is_used():
    norms = nn.utils.parametrizations
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Linear(8, 8)), norms.weight_norm(nn.Linear(8, 8)),
        norms.spectral_norm(nn.Linear(8, 8)), nn.utils.spectral_norm(nn.Linear(8, 8)),
        norms.orthogonal(nn.Linear(8, 8)),
    )  # fmt: skip
    masks = drive.prune(model, [], method="magnitude", sparsity=0.5, progress=False)
    model(torch.randn(2, 8))
    raw = (
        "0.weight_v",
        "1.parametrizations.weight.original1",
        "2.parametrizations.weight.original",
        "3.weight_orig",
    )
    assert tuple(masks) == raw
    for layer, mask in zip(model, masks.values(), strict=False):
        assert torch.equal(layer.weight != 0, mask)
    (row,) = [row for row in drive.coverage(model).rows if "Orthogonal" in row.reason]
    assert row.reason == "one part of a weight parametrised by _Orthogonal"


def test_standardised_weights_are_left_out():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip("torchvision", reason="timm's models need torchvision")
    model = timm.create_model("nf_resnet26")
    assert list(prunable(model)) == ["head.fc.weight"]
    assert any("standardised before it is used" in row.reason for row in drive.coverage(model).rows)


def test_adapters_and_what_they_adapt():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"])
    )
    with pytest.raises(
        ValueError, match=r"nothing to prune by default.*frozen \(2\); a factor of an adapter \(2\)"
    ):
        prunable(model)
    assert list(prunable(model, include="*.weight")) == ["0.weight", "1.weight"], "wildcards take no factors"
    assert list(prunable(model, include="0.lora_A.default.weight")) == ["0.lora_A.default.weight"]


def test_names_and_wildcards():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert list(prunable(model, exclude="2.*")) == ["0.weight", "3.weight"]
    assert list(prunable(model, exclude=lambda name, module, tensor: name.startswith("0"))) == [
        "2.weight",
        "3.weight",
    ]
    assert list(prunable(model, include="*", exclude=["0.weight"])) == ["2.weight", "3.weight"], (
        "weights only"
    )
    assert list(prunable(model, include=["1.weight", "3.*"])) == ["1.weight", "3.weight"], (
        "or what is named in full"
    )
    assert list(prunable(model, include=drive.default_include)) == ["0.weight", "2.weight", "3.weight"]
    tensors = {"a": torch.ones(3), "b": torch.ones(3)}
    assert list(prunable(tensors, exclude="a")) == ["b"]
    for options, error, words in (
        ({"include": "4.*"}, ValueError, r"include must name parameters, got '4.\*', which fits none"),
        (
            {"exclude": ["2.*", "head"]},
            ValueError,
            "exclude must name parameters, got 'head', which fits none",
        ),
        ({"include": "1.*"}, ValueError, r"include must name weights, got '1.\*': others are named in full"),
        ({"include": [3]}, TypeError, "include must be a predicate or names, got 3"),
    ):
        with pytest.raises(error, match=words):
            prunable(model, **options)


def test_little_coverage_is_said_once(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(8, 8, 8))
    with caplog.at_level(logging.WARNING):
        prunable(model, op="prune")
        prunable(model)
    (record,) = caplog.records
    assert "prune: by default only 3.0 % of the entries of trainable matrices are pruned" in record.message


def test_a_billion_parameters_on_the_meta_device():
    with torch.device("meta"):
        model = hf(
            "LlamaForCausalLM", hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
            num_attention_heads=32, num_key_value_heads=4,
        )  # fmt: skip
    start = time.perf_counter()
    coverage = drive.coverage(model)
    assert time.perf_counter() - start < 1
    assert coverage.total > 1.0e9 and coverage.share == 1.0
