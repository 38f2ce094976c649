"""drive.shrink: smaller models that compute what the given ones do without the units that are pruned."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from structured_cases import CASES, generic, groups_of, images, largest_difference, need, outputs, thinned
from torch import nn
from torch.nn import functional as F

import drive

pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("case", CASES)
def test_a_shrunk_model_computes_what_the_zeroed_one_does(case):
    """Of every model that is promised, a half of its units pruned."""
    need(case)
    torch.manual_seed(0)
    model, inputs = CASES[case]()
    generic(model)
    masks, units, full = thinned(model, inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    shrunk = drive.shrink(model, masks, inputs)

    assert largest_difference(shrunk.model, full, inputs) <= 1e-12
    assert shrunk.before.nodes == sum(len(stays) for stays in units.values())
    assert shrunk.after.nodes == sum(int(stays.sum()) for stays in units.values())
    assert shrunk.after.parameters < shrunk.before.parameters
    assert shrunk.after.multiply_adds < shrunk.before.multiply_adds
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_heads_are_groups():
    pytest.importorskip("transformers")
    for case, heads in (("BERT", 4), ("Llama", 2), ("GPT-2", 4)):
        model, inputs = CASES[case]()
        names = [group.name for group in groups_of(model, inputs).groups if group.units == heads]
        assert len(names) == 2, case


def test_heads_of_torchs_attention_go_in_all_its_forms():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True)
    model = Attended(attention)
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    generic(model)
    masks, _, full = thinned(model, x)
    small = drive.shrink(model, masks, x).model
    assert small.attention.num_heads < 4
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for options in (
        {"need_weights": False},
        {"need_weights": True},
        {"key_padding_mask": padding, "need_weights": False},
        {"attn_mask": causal, "need_weights": True},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": torch.randn(5, 5, dtype=torch.float64), "key_padding_mask": padding},
    ):
        ours, theirs = small.attention(x, x, x, **options), full.attention(x, x, x, **options)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    each = full.attention(x, x, x, average_attn_weights=False)[1]
    kept = [head for head in range(4) if bool(masks["attention.in_proj_weight"][8 * head].any())]
    ours = small.attention(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(ours, each[:, kept], rtol=1e-12, atol=1e-12)
    alone = small.attention(x[0], x[0], x[0])[0]
    torch.testing.assert_close(alone, full.attention(x[0], x[0], x[0])[0], rtol=1e-12, atol=1e-12)
    small.attention.batch_first = full.attention.batch_first = False
    torch.testing.assert_close(
        small.attention(x, x, x)[0], full.attention(x, x, x)[0], rtol=1e-12, atol=1e-12
    )


class Attended(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        self.attention, self.last = attention, nn.Linear(32, 3)

    def forward(self, x):
        return self.last(self.attention(x, x, x, need_weights=False)[0])


def test_torchs_encoder_layer_loses_heads_and_units():
    """Whose fast path reads the attributes of its attention."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 3))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    generic(model)
    masks, units, full = thinned(model, x)
    assert sorted(len(stays) for stays in units.values()) == [4, 4, 48, 48]
    small = drive.shrink(model, masks, x).model
    assert largest_difference(small, full, x) <= 1e-12
    with torch.no_grad():  # as the fast path wants it
        torch.testing.assert_close(small.float()(x.float()), full.float()(x.float()), rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    """One convolution twice, a concatenation, a transposed convolution, PReLU by channels, a flattening."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.beside, self.act = nn.Conv2d(3, 5, 1), nn.PReLU(13)
        self.up = nn.ConvTranspose2d(13, 6, 2, stride=2)
        self.fc = nn.Linear(6 * 8 * 8, 4)

    def forward(self, x):
        y = self.again(F.relu(self.again(F.relu(self.first(x)))))
        y = self.act(torch.cat([self.beside(x), y], 1))
        return self.fc(F.relu(self.up(y)).flatten(1))


def test_shared_modules_concatenations_and_flattenings():
    torch.manual_seed(0)
    model, x = Shared(), images(4)
    generic(model)
    masks, units, full = thinned(model, x)
    assert {group.name: group.units for group in units} == {"first": 8, "beside": 5, "up": 6}
    assert largest_difference(drive.shrink(model, masks, x).model, full, x) <= 1e-12


def test_what_unstructured_pruning_emptied_goes_and_the_masks_of_the_rest_are_given():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double(), torch.randn(5, 6).double()
    masks = drive.Masks.dense(model)
    masks["0.weight"][:] = torch.rand(8, 6) > 0.5
    masks["0.weight"][[1, 4]] = False
    masks["0.weight"][0, 0] = True
    masks["2.weight"][:] = torch.rand(4, 8) > 0.5
    masks.apply_(model)
    shrunk = drive.shrink(model, masks, x)
    stay = [0, 2, 3, 5, 6, 7]
    assert shrunk.kept["0"].tolist() == stay
    assert torch.equal(shrunk.masks["0.weight"], masks["0.weight"][stay])
    assert torch.equal(shrunk.masks["2.weight"], masks["2.weight"][:, stay])
    assert torch.equal(shrunk.model[0].weight, model[0].weight[stay])


def test_a_group_keeps_one_unit():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5, 6)
    masks = drive.Masks.dense(model)
    masks["0.weight"][:] = False
    assert drive.shrink(model, masks, x).model[0].out_features == 1


class Mixed(nn.Module):
    """Channels that are mixed where no module says so."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(self.a(x))
        y = torch.relu(self.b(y - y.mean(-1, keepdim=True)))
        return self.c(y)


def test_what_is_mixed_unseen_stays_whole_and_is_named(caplog):
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(5, 6)
    data = [(x, torch.arange(5) % 4)]
    with caplog.at_level(logging.WARNING):
        masks = drive.prune(
            model, data, F.cross_entropy, method="magnitude", structure="channels", sparsity=0.5
        )
    assert "are not pruned" in caplog.text and "set them to 0: a" in caplog.text
    assert bool(masks["a.weight"].all()) and int(masks["b.weight"].any(1).sum()) == 4
    masks["a.weight"][0] = False
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        small = drive.shrink(model, masks, x)
    assert "stay" in caplog.text
    assert small.model.a.out_features == 8 and small.model.b.out_features == 4


def test_frozen_weights_formats_and_dtypes_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = model.bfloat16().to(memory_format=torch.channels_last)
    model[3].weight.requires_grad_(False)
    masks = drive.Masks.dense(model, include=["0.weight"])
    masks["0.weight"][:3] = False
    model.train()
    handle = masks.attach(model)
    small = drive.shrink(model, masks, images(8).bfloat16()).model
    assert small[0].weight.dtype == torch.bfloat16 and small.training
    assert small[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (5, 5, 5)
    outputs(small, images(8).bfloat16())
    assert not any("_drive_holds" in module.__dict__ for module in small.modules())
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_run_in_no_other_dtype(dtype, caplog):
    """They make tensors of their own: the check runs in what they can."""

    class Own(Mixed):
        def forward(self, x):
            return super().forward(F.linear(x, torch.eye(6, dtype=dtype)))

    torch.manual_seed(0)
    model, x = Own().to(dtype), torch.randn(5, 6, dtype=dtype)
    masks = drive.Masks.dense(model)
    masks["b.weight"][:3] = False
    assert drive.shrink(model, masks, x).model.b.out_features == 5
    assert "stay" not in caplog.text
    masks["a.weight"][:3] = False
    assert drive.shrink(model, masks, x).model.a.out_features == 8
    assert "would change more than to set them to 0: a" in caplog.text


class Auxiliary(nn.Module):
    """A second classifier, in training only."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.beside, self.last = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        y = F.relu(self.norm(self.body(x))).mean((2, 3))
        return (self.last(y), self.beside(y)) if self.training else self.last(y)


@pytest.mark.parametrize("training", [False, True])
def test_what_runs_in_training_only_is_cut_too(training):
    torch.manual_seed(0)
    model, x = Auxiliary().train(training), images(6).float()
    masks = drive.prune(
        Auxiliary().eval(), [(x, torch.arange(2))], F.cross_entropy, method="magnitude", structure="channels",
        sparsity=0.5, progress=False,
    )  # fmt: skip
    small = drive.shrink(model, masks, x).model
    assert small.training == training and small.beside.in_features == small.body.out_channels == 4
    assert [y.shape for y in small.train()(x)] == [(2, 4), (2, 4)]


def test_a_model_without_channels_is_refused_with_the_reasons():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="no channels to remove .*; LayerNorm over the channels: 0"):
        drive.shrink(model, drive.Masks.dense(model), torch.randn(5, 6))


def test_wrong_input_is_one_line():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5, 6)
    masks = drive.Masks.dense(model)
    with pytest.raises(TypeError, match="shrink: model must be a module, got str"):
        drive.shrink("model", masks, x)
    with pytest.raises(ValueError, match="shrink: model must not be wrapped or compiled yet, got Data"):
        drive.shrink(nn.DataParallel(model), masks, x)
    with pytest.raises(ValueError, match="shrink: the model has no parameter"):
        drive.shrink(nn.Linear(3, 3), masks, x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|mat1"):
        drive.shrink(model, masks, torch.randn(5, 7))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
