"""drive.prune: the one loop that every pruning method runs in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import methods, schedules, scopes
from .capture import Capture, captured, check_capture
from .feed import endless
from .finite import LateChecks
from .fused import check_sparsity
from .gradients import Batch, LossFn, LossGradients
from .masks import Masks
from .methods.base import Method, Problem
from .selection import select
from .targets import Include, prunable


def prune(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    *,
    sparsity: float,
    method: str | Method = "drive",
    iterations: int | None = None,
    schedule: str | schedules.Schedule | None = None,
    scope: str = "global",
    min_keep: int = 0,
    masks: Masks | None = None,
    include: Include | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    capture: Capture = "auto",
    progress: bool = True,
) -> Masks:
    """Prune a model to `sparsity` in place, by a named method, and return the masks.

    At iteration n the method scores the surviving weights (most methods on one fresh batch) and an
    exact global selection prunes to the sparsity that the schedule gives for n. The model is scored
    in the mode (train or eval) it is in. BatchNorm statistics and other buffers, the RNG state, the
    mode, `.grad` and `requires_grad` are afterwards as before; weights differ only where a mask is
    False. If anything raises, Ctrl-C included, the weights are restored too (which costs one copy
    of the prunable weights while it runs).

    Args:
        model: the model; for DRIVE after its dense warm-up, for SNIP at initialisation.
        batches: any iterable of (inputs, targets), a DataLoader say; started again when short. Both may
            be tensors or tuples, lists and dicts of them; they are copied to the weights' device, on
            CUDA while it computes (at its best from pinned memory).
        loss_fn: (model(inputs), targets) -> scalar loss.
        sparsity: final fraction of zeros over all prunable entries, 0 <= sparsity < 1.
        method: a name in `drive.methods.names()` or an instance.
        iterations: how often to score and prune. Default: the method's own (DRIVE 100, SNIP 1).
        schedule: "one_shot", "exponential", "linear", "cubic", "halving", or a callable
            step in 1..iterations -> sparsity. Default: the method's own, or exponential when
            a one-shot method is asked for several iterations.
        scope: "global": one ranking over all tensors. "uniform", "erk": one per tensor, of the same
            sparsity or of densities by Erdos-Renyi-Kernel (`drive.scopes`); the count over all is exact.
        min_keep: survivors that every tensor keeps at least.
        masks: masks to start from, of a model pruned before; they are not changed.
        include: which parameters to prune, as in `fused_drive_prune`.
        seed: of the RNG while scoring (dropout, shuffling by the global RNG).
        autocast: torch.bfloat16 to run model and loss under `torch.autocast`; gradients keep the
            weights' dtype. Default: as around the call.
        capture: whether forward and backward become a CUDA graph after the first iterations, with the
            same results in less time. "auto": where the model allows it and there are enough
            iterations; otherwise they stay eager, and the logger `drive.capture` says why. True: it
            must be possible. What the model decides in Python, once captured, is decided for good.
        progress: show a progress bar.

    Returns:
        The masks, on the weights' device.

    Raises:
        ValueError, TypeError: bad arguments, batches that run out, a non-finite score.
        RuntimeError: capture is True and it is not possible, with the reason.
    """
    check_sparsity("prune", sparsity)
    chosen = methods.get(method)
    count = chosen.iterations if iterations is None else iterations
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"prune: iterations must be an integer >= 1, got {iterations!r}")
    if schedule is None:
        schedule = chosen.schedule if chosen.schedule != "one_shot" or count == 1 else "exponential"
    steps = schedules.plan(schedule, sparsity, count)
    weights = prunable(model, include, op="prune")
    total = sum(w.numel() for w in weights.values())
    plan = [scopes.groups(scope, weights, round(step * total)) for step in steps]
    if masks is not None:
        masks.check_match("prune", weights)
        masks = Masks({name: masks[name].clone() for name in weights})

    device = next(iter(weights.values())).device
    check_capture("prune", capture, device)
    if autocast not in (None, torch.bfloat16):
        # float16 would need its loss scaled
        raise ValueError(f"prune: autocast must be None or torch.bfloat16, got {autocast!r}")

    eager = LossGradients(model, weights, loss_fn, autocast)
    checks = LateChecks(steps_late=1 if device.type == "cuda" else 0)
    with _restored(model, weights), _seeded(seed, device), captured(eager, capture, count) as gradients:
        problem = Problem(model, weights, endless(batches, device), loss_fn, gradients)
        for number, groups in enumerate(_tracked(plan, f"{chosen.name} to {sparsity:.2%}", progress), start=1):
            ranking = chosen.rank(replace(problem, masks=masks))
            result = select("prune", weights, ranking, groups, masks=masks, min_keep=min_keep)
            masks = result.masks
            checks.add(result.check_finite(f"prune: iteration {number}"))
        checks.finish()
    assert masks is not None  # count >= 1
    if device.type == "cuda":
        for mask in masks.values():  # they may be of the graph's stream
            mask.record_stream(torch.cuda.current_stream(device))
    return masks


@contextmanager
def _restored(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Buffers, modes and requires_grad come back afterwards; the weights too, if anything raises."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    frozen = [w for w in weights.values() if not w.requires_grad]
    before = [w.detach().clone() for w in weights.values()]
    try:
        for w in frozen:
            w.requires_grad_(True)
        yield
    except BaseException:
        with torch.no_grad():
            for w, old in zip(weights.values(), before, strict=True):
                w.copy_(old)
        raise
    finally:
        for w in frozen:
            w.requires_grad_(False)
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, old in buffers:
                module._buffers[name] = buffer.copy_(old)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A seeded RNG inside, the caller's state afterwards."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type):
        torch.manual_seed(seed)
        yield


def _tracked(plan: list[scopes.Groups], what: str, progress: bool) -> Iterable[scopes.Groups]:
    if not progress:
        return plan
    from rich.progress import track

    return track(plan, description=what)
