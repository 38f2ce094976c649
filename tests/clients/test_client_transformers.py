"""transformers: batches with labels, its Trainer, checkpoints, the best one loaded at the end."""

from __future__ import annotations

import pytest
import torch
from held import assert_held
from torch import nn

import drive

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def texts(count: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(32, (8,), generator=generator),
            "attention_mask": torch.ones(8, dtype=torch.long),
            "labels": torch.randint(3, (), generator=generator),
        }
        for _ in range(count)
    ]


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(texts(), batch_size=8, collate_fn=transformers.default_data_collator)


def trainer(model: nn.Module, folder, **options) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, **{"save_strategy": "no", "logging_strategy": "no", **options},
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=texts(), eval_dataset=texts(8))


def options() -> dict[str, object]:
    return {"sparsity": 0.8, "iterations": 3, "progress": False}


def test_batches_with_labels_and_the_trainers_loss(tmp_path):
    """The same masks from (inputs, targets), from the model's own loss, and from Trainer.compute_loss."""
    pairs = [({k: v for k, v in b.items() if k != "labels"}, b["labels"]) for b in loader()]

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = bert()

        def forward(self, inputs):
            return self.net(**inputs).logits

    expected = drive.prune(Pair().eval(), pairs, nn.functional.cross_entropy, **options())
    own = drive.prune(bert().eval(), loader(), **options())
    encodings = [transformers.BatchEncoding(dict(batch)) for batch in loader()]
    encoded = drive.prune(bert().eval(), encodings, **options())
    model = bert()
    compute_loss = trainer(model, tmp_path).compute_loss
    theirs = drive.prune(model.eval(), loader(), compute_loss=compute_loss, **options())
    for masks in (own, encoded, theirs):
        assert [f"net.{name}" for name in masks] == list(expected)
        assert all(map(torch.equal, masks.values(), expected.values()))


def test_trainer(tmp_path):
    model = bert()
    masks = drive.prune(model, loader(), **options())
    masks.attach(model)
    trainer(model, tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.5).train()
    assert_held(model, masks)


def test_resumed_and_best_checkpoints(tmp_path):
    model = bert()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = drive.prune(model, loader(), **options())
    masks.attach(model)
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 5}
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer(model, tmp_path, **saving, **best).train()
    assert_held(model, masks)
    again = bert(seed=1)
    masks.attach(again)
    trainer(again, tmp_path, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_held(again, masks)
    again.load_state_dict(dense)
    for name, mask in masks.items():
        assert torch.equal(again.get_parameter(name).detach(), dense[name] * mask), "a dense checkpoint"


def test_tied_embeddings_of_gpt2(tmp_path):
    """`include` names the embedding, which is the head, too: held in both places, through save_pretrained."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    batch = {"input_ids": torch.randint(32, (4, 8))}
    batch["labels"] = batch["input_ids"]
    masks = drive.prune(
        model,
        [batch],
        include=lambda name, module, tensor: tensor.dim() == 2 and "wpe" not in name,
        **options(),
    )
    masks.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert_held(model, masks)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    masks.apply_(again)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
