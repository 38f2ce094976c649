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


@pytest.mark.parametrize("name", MODELS)
def test_two_of_four_inputs(name: str):
    """All weights that have inputs in fours: the first convolution has 3, depthwise ones have one."""
    model = MODELS[name]()
    weights = prunable(model)
    axes = drive.targets.structures.axes_of(model, weights)

    def groups(key: str) -> int:
        axis = axes[key].inputs
        return axes[key].parts if axes[key].stacked == axis else 1

    uneven = [key for key, w in weights.items() if w.shape[axes[key].inputs] // groups(key) % 4]
    options = {"method": "magnitude", "sparsity": 0.5, "structure": "2:4", "progress": False}
    masks = drive.prune(model, [], exclude=uneven or None, on_ties="index", **options)  # ViT's head is 0
    assert sum(mask.numel() for mask in masks.values()) > 0.9 * sum(w.numel() for w in weights.values())
    for key, mask in masks.items():
        fours = mask.movedim(axes[key].inputs, -1).unflatten(-1, (-1, 4))
        assert (fours.sum(-1) == 2).all(), key
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
        nn.EmbeddingBag(8, 8),
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
    assert "pruned: 64 of 816 parameters, 11.11% of the trainable matrices" in str(coverage)
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
    for include in (row.name, lambda name, module, tensor: tensor.dim() > 1):
        with pytest.raises(
            ValueError, match="_Orthogonal: pruning it leaves no zeros in what is used, exclude"
        ):
            prunable(model, include=include)


def test_standardised_weights_are_left_out():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip("torchvision", reason="timm's models need torchvision")
    model = timm.create_model("nf_resnet26")
    assert list(prunable(model)) == ["head.fc.weight"]
    (row,) = [row for row in drive.coverage(model).rows if "standardised before it is used" in row.reason]
    convolutions = [m.weight.numel() for m in model.modules() if type(m).__name__ == "ScaledStdConv2d"]
    assert (row.tensors, row.entries) == (len(convolutions), sum(convolutions)), "not their biases and gains"
    for include in ("stem.conv.weight", lambda name, module, tensor: tensor.dim() == 4):
        with pytest.raises(
            ValueError, match="stem.conv.weight is standardised before it is used: pruning it"
        ):
            prunable(model, include=include)


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


def test_the_share_of_all_parameters(tmp_path):
    """Of what is pruned, in every way that masks are made, and read back."""
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    for weight in prunable(model).values():
        weight.grad = torch.randn_like(weight)
    words = "sparsity 0.500000 of 64 entries, 30.77% of all 208 parameters: 15.38% of these are pruned"
    result = drive.fused_drive_prune(model, sparsity=0.5, exclude="2.*")
    assert words in result.summary() and words in result.masks.summary()
    result = drive.fused_drive_prune(model, sparsity=0.5, masks=result.masks, exclude="2.*")
    assert words in result.summary()
    options = {"method": "magnitude", "sparsity": 0.5, "exclude": "2.*", "progress": False}
    masks = drive.prune(model, [], masks=result.masks, scope="uniform", on_step=print, **options)
    for same in (masks, drive.prune(model, [], structure="2:4", **options), masks.to("cpu")):
        assert words in same.summary()
    masks.save(tmp_path / "m.safetensors")
    assert words in drive.Masks.load(tmp_path / "m.safetensors").summary()
    assert ": 0.00% of these" in drive.Masks.dense(model).summary()
    alone = drive.Masks(dict(masks))
    assert alone.parameters is None and alone.summary().endswith("sparsity 0.500000 of 64 entries")
    alone.save(tmp_path / "m.safetensors")
    assert drive.Masks.load(tmp_path / "m.safetensors").parameters is None
    assert drive.Masks.dense({"w": torch.ones(3)}).parameters is None


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
