"""Weights and gradients that cannot be pruned: one clear line, everything as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import drive
from drive import Masks, fused_drive_prune


def call_fused(model: nn.Module) -> None:
    fused_drive_prune(model, sparsity=0.5, include=everything)


def call_prune(model: nn.Module, method: str = "drive") -> None:
    batch = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1])
    drive.prune(
        model, [batch], nn.functional.cross_entropy, sparsity=0.5, method=method, iterations=1,
        include=everything, progress=False,
    )  # fmt: skip


def call_apply(model: nn.Module) -> None:
    masks = {n: torch.zeros_like(w, dtype=torch.bool, device="cpu") for n, w in model.named_parameters()}
    Masks({name: mask for name, mask in masks.items() if name.endswith("weight")}).apply_(model)


def everything(name: str, module: nn.Module | None, tensor: Tensor) -> bool:
    return name.endswith("weight")


def model(sparse: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(4, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 2))


def quantised() -> nn.Module:
    """As torchao does it."""
    made = model()
    made[2].weight = nn.Parameter(TwoTensor(made[2].weight.detach(), made[2].weight.detach().clone()))
    return made


def offloaded() -> nn.Module:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    return accelerate.cpu_offload(model(), execution_device=torch.device("cpu"))


def in_part_on_meta() -> nn.Module:
    made = model()
    made[2].to("meta")
    return made


def of_dtype(dtype: torch.dtype) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        found = model()
        found[2].weight = nn.Parameter(found[2].weight.detach().to(dtype), requires_grad=False)
        return found

    return made


CASES: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "quantised": (
        quantised, TypeError,
        "2.weight must be a plain tensor or a DTensor of one, got TwoTensor: prune before weights are",
    ),
    "offloaded": (
        offloaded, ValueError,
        "0.weight has no data: it is on the meta device, accelerate has offloaded it: prune the model before",
    ),
    "meta": (in_part_on_meta, ValueError, "2.weight has no data: it is on the meta device$"),
    "complex": (of_dtype(torch.complex64), TypeError, "2.weight must be .*float.*, got torch.complex64$"),
    "integer": (of_dtype(torch.int8), TypeError, "2.weight must be .*float.*, got torch.int8$"),
}  # fmt: skip
CALLS = {"fused_drive_prune": call_fused, "prune": call_prune, "Masks.apply_": call_apply}


def state(model: nn.Module) -> dict[str, Any]:
    return {
        name: (id(p), p._version, p.requires_grad, p.grad is None) for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("case", CASES)
def test_weights_that_cannot_be_pruned(case: str, op: str):
    build, error, message = CASES[case]
    made = build()
    before = state(made)
    with pytest.raises(error, match=f"^{op}: {message}"):
        CALLS[op](made)
    assert state(made) == before


def test_sparse_gradients_of_a_backward_pass():
    made = model(sparse=True)
    made(torch.tensor([[0, 1]])).sum().backward()
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    with pytest.raises(
        TypeError, match="fused_drive_prune: gradient of 0.weight must be dense, .*sparse=False"
    ):
        call_fused(made)
    assert all(torch.equal(p, before[name]) for name, p in made.named_parameters())


@pytest.mark.parametrize("method", ("drive", "snip", "grasp", "crop"))
def test_sparse_gradients_of_a_loop(method: str):
    made = model(sparse=True)
    before, random = {name: p.detach().clone() for name, p in made.named_parameters()}, torch.get_rng_state()
    with pytest.raises(TypeError, match="prune: gradient of 0.weight must be dense, .*sparse=False"):
        call_prune(made, method)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in made.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
