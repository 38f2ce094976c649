"""Prune a decoder that is sharded by FSDP2, and train what is left: a start for models larger than a device.

    pip install transformers
    torchrun --nproc-per-node 2 examples/fsdp2_transformer.py --out run              # gloo; NCCL on GPUs
    torchrun --nproc-per-node 4 examples/fsdp2_transformer.py --out run --steps 600  # goes on, on more ranks

A Llama is built from a config (nothing is downloaded) and reads the sources of Python's standard library,
byte by byte. It trains densely for --warm-up steps, is pruned by DRIVE, and trains on with the pruned weights
at zero. Every --every steps a checkpoint is written; the next run in the same folder goes on from it, on any
number of ranks that divides --batch: the batches depend on the step alone. A rank that dies ends the run:
start it again. On several machines --out must be a folder that all of them see.

    run/step-000300/         the last checkpoint: weights, AdamW's state and masks, each rank's shards
    run/model.pt             at the end: {"config", "model", "loss"} for torch.load, whole, dense with zeros
    run/masks.safetensors    at the end: drive.Masks.load, one bit an entry
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import drive

Batch = tuple[Tensor, Tensor]  # inputs and targets, [sequences, length] int64


class Text:
    """Sequences of bytes from the sources of the standard library; the last sixteenth of it is held out."""

    def __init__(self, length: int, batch: int, device: torch.device):
        """
        Args:
            length: bytes in a sequence.
            batch: sequences in a batch, over all ranks.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if batch % ranks:
            raise SystemExit(f"--batch must be a multiple of the number of ranks, {ranks}, got {batch}")
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = torch.frombuffer(bytearray(b"".join(s.read_bytes() for s in sources)), dtype=torch.uint8)
        held_out = len(text) // 16
        self._training, self._held_out = text[:-held_out], text[-held_out:]
        self._length, self._batch, self._device = length, batch, device
        self._mine = slice(rank * batch // ranks, (rank + 1) * batch // ranks)

    def batch(self, number: int, held_out: bool = False) -> Batch:
        """This rank's part of a batch."""
        text = self._held_out if held_out else self._training
        generator = torch.Generator().manual_seed(number)
        starts = torch.randint(len(text) - self._length, (self._batch,), generator=generator)[self._mine]
        rows = torch.stack([text[start : start + self._length + 1] for start in starts])
        rows = rows.to(self._device, torch.int64)
        return rows[:, :-1], rows[:, 1:]

    def batches(self, first: int) -> Iterator[Batch]:
        """All from this one on."""
        while True:
            yield self.batch(first)
            first += 1


def loss_fn(output: Any, targets: Tensor) -> Tensor:
    """Nats a byte."""
    return nn.functional.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten())


def prunable(name: str, module: nn.Module | None, tensor: Tensor) -> bool:
    """Every Linear but the head, as is usual for language models."""
    return isinstance(module, nn.Linear) and name != "lm_head.weight"


def build(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """The same decoder on all ranks, then sharded: a group for each layer, and the rest.

    It must fit into each rank's host memory once. Larger: build it under `torch.device("meta")`, `to_empty`
    after sharding, and load a checkpoint.
    """
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=options.width, intermediate_size=3 * options.width,
        num_hidden_layers=options.layers, num_attention_heads=options.heads,
        max_position_embeddings=options.length, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


@dataclass
class Run:
    """What a checkpoint holds: all that changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    masks: drive.Masks | None = None

    def save(self, out: Path) -> None:
        """Write out/step-N, then remove older ones: there is a whole one at any moment."""
        partial, whole = out / "partial", out / f"step-{self.step:06}"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / "run.json").write_text(
                json.dumps({"step": self.step, "pruned": self.masks is not None})
            )
        dist.barrier()
        dcp.save(self._state(), checkpoint_id=partial)
        if dist.get_rank() == 0:
            older = list(out.glob("step-*"))
            partial.rename(whole)
            for folder in older:
                shutil.rmtree(folder)
        dist.barrier()

    def load(self, out: Path) -> None:
        """Go on from the last checkpoint, if there is one."""
        found = sorted(out.glob("step-*"))
        if not found:
            return
        facts = json.loads((found[-1] / "run.json").read_text())
        self.step = facts["step"]
        self.masks = drive.Masks.dense(self.model, prunable) if facts["pruned"] else None
        state = self._state()
        dcp.load(state, checkpoint_id=found[-1])
        set_state_dict(
            self.model, self.optimizer,
            model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        )  # fmt: skip

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        masks = {} if self.masks is None else {"masks": self.masks.state_dict()}
        return {"model": model, "optimizer": optimizer, **masks}


def train(run: Run, text: Text, until: int, options: argparse.Namespace) -> None:
    """Steps up to number `until`, with a checkpoint at the end and every so often."""
    begin = run.step
    while run.step < until:
        inputs, targets = text.batch(run.step)
        run.optimizer.zero_grad()
        loss = loss_fn(run.model(inputs), targets)
        loss.backward()
        run.optimizer.step()
        run.step += 1
        if run.step % options.print_every == 0 or run.step == begin + 1:
            say(f"step {run.step:6}  loss {mean(loss):.4f}")
        if run.step % options.every == 0 or run.step == until:
            run.save(options.out)


def prune(run: Run, text: Text, options: argparse.Namespace) -> None:
    """DRIVE, on batches that training does not use."""
    run.masks = drive.prune(
        run.model, text.batches(first=1 << 30), loss_fn, sparsity=options.sparsity, include=prunable,
        iterations=options.iterations, progress=dist.get_rank() == 0,
    )  # fmt: skip
    say(f"pruned {run.masks.sparsity():.2%} of {sum(mask.numel() for mask in run.masks.values()):,} weights")


def export(run: Run, text: Text, out: Path) -> None:
    """What others can load: the model as one file, and the masks.

    The model is gathered in rank 0's host memory. Where it does not fit, convert the checkpoint elsewhere:
    torch.distributed.checkpoint.format_utils.dcp_to_torch_save.
    """
    assert run.masks is not None
    with torch.no_grad():
        inputs, targets = text.batch(0, held_out=True)
        loss = mean(loss_fn(run.model(inputs), targets))
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(run.model, options=whole)
    run.masks.save(out / "masks.safetensors")
    if dist.get_rank() == 0:
        found = {"config": run.model.config.to_dict(), "model": weights, "loss": loss}
        torch.save(found, out / "model.pt.partial")
        os.replace(out / "model.pt.partial", out / "model.pt")
    say(f"loss {loss:.4f} on held-out text; wrote {out / 'model.pt'} and {out / 'masks.safetensors'}")


def mean(loss: Tensor) -> float:
    """Over the ranks."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prune and train a decoder sharded by FSDP2.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=300, help="of training, the warm-up included")
    parser.add_argument("--warm-up", type=int, default=100, help="dense steps before pruning")
    parser.add_argument("--every", type=int, default=50, help="steps from one checkpoint to the next")
    parser.add_argument("--print-every", type=int, default=10, help="steps from one line to the next")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--iterations", type=int, default=20, help="of DRIVE")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="bytes in a sequence")
    parser.add_argument("--batch", type=int, default=24, help="sequences a step, over all ranks")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()  # gloo for tensors on CPUs, NCCL for those on GPUs
    options.out.mkdir(parents=True, exist_ok=True)
    text = Text(options.length, options.batch, device)
    model = build(options, device)
    run = Run(model, torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.1))
    run.load(options.out)
    say(f"{dist.get_world_size()} ranks on {device.type}, from step {run.step}")
    train(run, text, min(options.warm_up, options.steps), options)
    if run.masks is None:
        prune(run, text, options)
    with run.masks.attach(run.model, run.optimizer):
        train(run, text, options.steps, options)
    export(run, text, options.out)
    # All files are there; and a thread of Gloo's that still frees a tensor while Python ends would abort it
    # (pytorch/pytorch#179291)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
