"""drive.prune, Masks and checkpoints of models under DDP, FSDP2 and tensor parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from worlds import Traffic, returned, run

import drive
from drive import Masks, PruneResult, fused_drive_prune
from drive.reference import drive_prune


def network(seed: int = 0, inner: int = 33) -> nn.Sequential:
    """Odd sizes: uneven shards, and ranks that hold nothing."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, inner), nn.Tanh(), nn.Linear(inner, 21), nn.Tanh(), nn.Linear(21, 3))


def batches(count: int = 4, rank: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + rank)
    labels = torch.arange(8) % 3
    return [(torch.randn(8, 10, generator=generator), labels) for _ in range(count)]


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """Every Linear a group of its own, and the model."""
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def tensor_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


loss_fn = nn.functional.cross_entropy


def check_step(model: nn.Module, rank: int | None = None) -> None:
    """A step on the model's own gradients, against the oracle on all of them."""
    rank = dist.get_rank() if rank is None else rank
    loss_fn(model(batches(rank=rank)[0][0]), batches()[0][1]).backward()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    named = {n: p for n, p in inner.named_parameters() if n.endswith("weight")}
    weights = {name: full(p.detach()).clone() for name, p in named.items()}
    grads = {name: full(p.grad).clone() for name, p in named.items() if p.grad is not None}
    with torch.no_grad():  # FSDP2 leaves whole copies of the outermost module's parameters
        model(batches()[0][0])
    oracle = drive_prune(weights, grads, sparsity=0.8, min_keep=2)
    found = fused_drive_prune(model, sparsity=0.8, min_keep=2)
    for name, mask in found.masks.items():
        parameter = named[name]
        assert isinstance(mask, DTensor) == isinstance(parameter, DTensor)
        if isinstance(mask, DTensor) and isinstance(parameter, DTensor):
            assert mask.placements == parameter.placements and mask.device_mesh == parameter.device_mesh
        assert torch.equal(full(mask), oracle.masks[name]), name
        assert torch.equal(full(named[name].detach()), weights[name]), name
    assert found.per_tensor == oracle.per_tensor


def steps() -> None:
    check_step(sharded(network()))
    check_step(fully_shard(network()))
    check_step(DistributedDataParallel(network()))
    if dist.get_world_size() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        check_step(sharded(network(), mesh=mesh))  # replicated over the first dimension
        both = sharded(tensor_parallel(network(inner=36), mesh["tensor"]), mesh=mesh["data"])
        check_step(both, mesh["data"].get_local_rank())
        alone = tensor_parallel(network(inner=36), init_device_mesh("cpu", (4,)))  # the last layer: copies
        check_step(alone, 0)


@pytest.mark.parametrize("size", (1, 2, 3, 4))
def test_steps_on_models(size: int):
    returned(run(size, steps))


def root_of_its_own() -> None:
    """The outermost group has weights, too: each iteration has the gradients of its batch, `.grad` stays."""
    alone = network()
    options: dict[str, Any] = {"sparsity": 0.9, "iterations": 4, "progress": False}
    expected = drive.prune(alone, batches(), loss_fn, **options)
    for model in (fully_shard(network()), sharded(network())):
        masks = drive.prune(model, batches(), loss_fn, **options)
        for name, mask in masks.items():
            assert torch.equal(full(mask), expected[name]), name
        assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_the_outermost_group():
    returned(run(2, root_of_its_own))


def loops(method: str) -> None:
    """All ranks have the same batches: averages over two of them are exact."""
    alone = network()
    options: dict[str, Any] = {"sparsity": 0.9, "iterations": 3, "min_keep": 1, "progress": False}
    options["method"] = method
    expected = drive.prune(alone, batches(), loss_fn, **options)
    models = [DistributedDataParallel(network()), sharded(network())]
    for model in models[: 1 if drive.methods.get(method).spread == "copies" else 2]:
        loss_fn(model(batches()[0][0]), batches()[0][1]).backward()
        before = [p.grad for p in model.parameters()]
        masks = drive.prune(model, batches(), loss_fn, **options)
        trains = drive.methods.get(method).stage == "training"
        assert trains or all(p.grad is grad for p, grad in zip(model.parameters(), before, strict=True))
        for name, mask in masks.items():
            assert torch.equal(full(mask), expected[name]), name
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        for name, p in inner.named_parameters():
            assert torch.equal(full(p.detach()), alone.get_parameter(name)), name
        assert masks.sparsity() == pytest.approx(expected.sparsity())
        assert masks.summary() == expected.summary()


@pytest.mark.parametrize("method", ("drive", "magnitude", "gradual", "imp", "synflow", "random", "rigl"))
def test_loops(method: str):
    returned(run(2, loops, method))


class Client(nn.Module):
    """Computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_fn(self.net(pixels), labels)}


def own_losses(method: str) -> None:
    """The forms of batches that are no pairs, and what is called at each iteration."""
    options: dict[str, Any] = {"sparsity": 0.9, "iterations": 3, "progress": False, "method": method}
    expected = drive.prune(network(), batches(), loss_fn, **options)
    mappings = [{"pixels": x, "labels": y} for x, y in batches()]
    forms: list[dict[str, Any]] = [
        {"batches": mappings},
        {"batches": batches(), "compute_loss": lambda model, batch: model(*batch)["loss"]},
    ]
    for form in forms:
        seen: list[PruneResult] = []
        model = DistributedDataParallel(Client())
        found = drive.prune(model, **form, on_step=seen.append, **options)
        assert all(torch.equal(mask, expected[name.removeprefix("net.")]) for name, mask in found.items())
        assert len(found) == len(expected) and len(seen) == 3
    rank, last = dist.get_rank(), sum(int(mask.sum()) for mask in expected.values())

    def on_step(result: PruneResult) -> None:
        if rank == 1 and result.kept == last:
            raise ArithmeticError("enough")

    error, words = (ArithmeticError, "enough") if rank else (RuntimeError, "rank 1 raised ArithmeticError")
    model = DistributedDataParallel(Client())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(error, match=words):
        drive.prune(model, mappings, on_step=on_step, **options)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "undone on all ranks"
    with pytest.raises(
        ValueError, match="on_step must be the same on all ranks, got None on rank 0 and a fun"
    ):
        drive.prune(model, mappings, on_step=print if rank else None, **options)


@pytest.mark.parametrize("method", ("drive", "gradual"))
def test_batches_of_other_forms(method: str):
    returned(run(2, own_losses, method))


def rows_of_a_model(scope: str) -> None:
    """Rows of a layer need no others for their outputs, nor for the gradients of a sum of these."""
    rank, batch = dist.get_rank(), batches()[0][0]
    torch.manual_seed(0)
    whole = nn.Linear(10, 12)
    mine = slice(0, 7) if rank == 0 else slice(7, 12)
    part = nn.Linear(10, 12)
    part.weight = nn.Parameter(whole.weight.detach()[mine].clone())
    part.bias = nn.Parameter(whole.bias.detach()[mine].clone())

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().sum()

    options: dict[str, Any] = {"sparsity": 0.8, "iterations": 3, "scope": scope, "progress": False}
    expected = drive.prune(whole, [(batch, batch)], loss_fn, **options)
    found = drive.prune(part, [(batch, batch)], loss_fn, process_group=dist.group.WORLD, **options)
    assert torch.equal(found["weight"], expected["weight"][mine])
    assert torch.equal(part.weight, whole.weight[mine])


@pytest.mark.parametrize("scope", ("global", "erk"))
def test_rows_of_a_model(scope: str):
    returned(run(2, rows_of_a_model, scope))


def loops_with_faults() -> None:
    rank = dist.get_rank()
    models = {"copies": DistributedDataParallel(network()), "shards": sharded(network())}

    def refused(kind: str, message: str, error: type[Exception] = ValueError, **options: Any) -> None:
        model = models[kind]
        before = [full(p.detach()).clone() for p in model.parameters()]
        given = options.pop("batches", batches())
        with pytest.raises(error, match=message):
            drive.prune(model, given, loss_fn, progress=False, **{"sparsity": 0.5, **options})
        now = [full(p.detach()) for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))

    for kind in models:
        refused(kind, f"^prune: method must be one for {kind} of a model, got 'grasp'$", method="grasp")
        refused(kind, "iterations must be the same on all ranks, got 1 on rank 0 and 2", iterations=1 + rank)
        here = "sparsity must be in"
        there = f"rank {1 - rank} raised ValueError: prune: sparsity must be in"
        for bad in (0, 1):
            error = ValueError if rank == bad else RuntimeError
            refused(kind, here if rank == bad else there, error, sparsity=1.3 if rank == bad else 0.5)
        few = iter(batches(3) if rank else batches())  # the fourth is missing on one rank
        error, message = (
            (ValueError, "ran out after 3") if rank else (RuntimeError, "rank 1 raised .* after 3")
        )
        refused(kind, message, error, batches=few, iterations=4)
        nan = batches()
        nan[1][0][0, 0] = torch.nan if rank else 0
        loss = "iteration 2: the loss must be finite, got nan"
        message = loss if rank else "iteration 2: non-finite score in .*, the first on rank"
        refused(kind, message, batches=nan, iterations=3)
        ignored = batches()
        if rank:  # the loss is NaN, gradients are 0
            ignored[1] = ignored[1][0], torch.full_like(ignored[1][1], -100)
        error, message = (ValueError, loss) if rank else (RuntimeError, f"rank 1 raised .*{loss}")
        refused(kind, message, error, batches=ignored, iterations=3)
    refused("shards", "method must be one for shards of a model, got 'rigl'", method="rigl")
    refused("shards", "structure must be 'unstructured' for shards, got '2:4'", structure="2:4")


def test_loops_with_faults():
    returned(run(2, loops_with_faults))


def diverged() -> None:
    """One rank's weights, or its gradients, are not those of the others."""
    rank = dist.get_rank()
    model = DistributedDataParallel(network())
    compiled = torch.compile(model, backend="eager")
    loss_fn(model(batches()[0][0]), batches()[0][1]).backward()
    for tensor, what in (
        (model.module[2].weight.data, "2.weight"),
        (model.module[0].weight.grad, "0.weight.grad"),
    ):
        was_there = tensor[3, 4].clone()
        tensor[3, 4] += rank
        before = [p.detach().clone() for p in model.parameters()]
        for target in (model, compiled):
            message = (
                f"{what} must be the same on all ranks that hold a copy, got different ones on ranks 0 and 1"
            )
            with pytest.raises(ValueError, match=message):
                fused_drive_prune(target, sparsity=0.5)
        assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
        tensor[3, 4] = was_there
    # the compiled wrapper averages gradients, too: each rank has its own batches
    masks = drive.prune(compiled, batches(rank=rank), loss_fn, sparsity=0.5, iterations=2, progress=False)
    kept = torch.tensor([int(mask.sum()) for mask in masks.values()])
    dist.all_reduce(kept, dist.ReduceOp.MAX)
    assert kept.tolist() == [int(mask.sum()) for mask in masks.values()]


def test_diverged_copies():
    returned(run(2, diverged))


def training(kind: str) -> None:
    """Pruned weights, their gradients and moments stay zero; the others train."""
    rank = dist.get_rank()
    options: dict[str, Any] = {
        "mixed": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "resharded": {"reshard_after_forward": True},
    }.get(kind, {})
    model = DistributedDataParallel(network()) if kind == "ddp" else sharded(network(), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)

    def step() -> None:
        for last in (False, True):  # gradients of two batches
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = last
            else:
                model.set_requires_gradient_sync(last)  # type: ignore[operator]
            inputs, labels = batches(rank=rank)[int(last)]
            loss_fn(model(inputs).float(), labels).backward()
        optimizer.step()

    step()  # moments of the dense model
    masks = fused_drive_prune(model, sparsity=0.7).masks
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    with masks.attach(model):
        optimizer.zero_grad()
        for _ in range(2):
            step()
            for name, mask in masks.items():
                gradient = inner.get_parameter(name).grad
                assert gradient is not None and not full(gradient)[~full(mask)].any()
            optimizer.zero_grad()
    for name, mask in masks.items():
        weight = inner.get_parameter(name)
        pruned = ~full(mask)
        moments = [s for s in optimizer.state[weight].values() if s.shape == weight.shape]
        for tensor in (weight.detach(), *moments):
            assert not full(tensor)[pruned].any() and full(tensor)[~pruned].all()


@pytest.mark.parametrize("kind", ("ddp", "plain", "mixed", "offload", "resharded"))
def test_training(kind: str):
    returned(run(2, training, kind))


def saved(folder: str) -> None:
    model = sharded(network())
    loss_fn(model(batches()[0][0]), batches()[0][1]).backward()
    masks = fused_drive_prune(model, sparsity=0.8).masks
    dcp.save({"model": model.state_dict(), "masks": masks.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
    with Traffic() as traffic:
        masks.save(f"{folder}/masks.safetensors")
    assert {name for name, _ in traffic.sent} == {"allreduce_"}, "nothing is gathered"
    whole = Masks.load(f"{folder}/masks.safetensors")
    for name, mask in masks.items():
        assert torch.equal(full(mask), whole[name])
    if dist.get_rank() == 0:
        whole.save(f"{folder}/again.safetensors")
        again = Masks.load(f"{folder}/again.safetensors")
        assert list(again) == list(whole) and all(torch.equal(again[name], whole[name]) for name in whole)
    assert "sharded" in repr(masks)
    with pytest.raises(RuntimeError if dist.get_rank() else FileNotFoundError):
        masks.save(f"{folder}/nowhere/masks.safetensors")


def loaded(folder: str) -> None:
    """On another number of ranks; one more step goes on from the old masks."""
    model = sharded(network(seed=1))
    masks = Masks.dense(model)
    state = {"model": model.state_dict(), "masks": masks.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    model.load_state_dict(state["model"])
    whole = Masks.load(f"{folder}/masks.safetensors")
    for name, mask in masks.items():
        assert torch.equal(full(mask), whole[name])
        assert not full(model.get_parameter(name).detach())[~whole[name]].any()
    other = Masks.dense(model)
    other.load_state_dict(whole)
    assert all(torch.equal(other[name].to_local(), masks[name].to_local()) for name in masks)  # type: ignore[attr-defined]
    loss_fn(model(batches()[0][0]), batches()[0][1]).backward()
    result = fused_drive_prune(model, sparsity=0.9, masks=masks)
    assert result.pruned == round(0.9 * result.total)
    assert not any((full(result.masks[name]) & ~whole[name]).any() for name in whole)


def test_checkpoints(tmp_path: Path):
    returned(run(3, saved, str(tmp_path)))
    for size in (1, 2, 4):
        returned(run(size, loaded, str(tmp_path)))
