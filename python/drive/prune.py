"""drive.prune: the one loop that every pruning method runs in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import schedules
from ._scoring.capture import Capture, captured
from ._scoring.feed import Passes, endless
from ._scoring.finite import LateChecks
from ._scoring.gradients import loss_gradients
from ._scoring.loss import Batch, ComputeLoss, Loss, LossFn
from ._scoring.sgd import Train, check_round, sgd_round
from ._scoring.ties import TieCheck
from .distributed.placement import is_dtensor
from .distributed.team import Team, team_of, together, together_from
from .layers import Layers
from .masks import Masks
from .methods.base import Method, Problem
from .plan import OnTies, Plan
from .progress import tracked
from .result import PruneResult
from .rounds import Selection
from .structured.removable import check_bare, removable
from .structured.selection import ChannelSelection
from .targets.choice import Include
from .targets.costs import Goals
from .targets.multiply_adds import multiply_adds, samples_of
from .targets.outputs import Rows, rows_of
from .targets.restore import scoring, seeded, undone_on_error
from .targets.structures import CHANNELS
from .targets.targets import Prunable, check_made_outside, prunable

_log = logging.getLogger(__name__)


def prune(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn | None = None,
    *,
    sparsity: float | None = None,
    macs: float | None = None,
    alpha: float | None = None,
    compute_loss: ComputeLoss | None = None,
    method: str | Method = "drive",
    iterations: int | None = None,
    schedule: str | schedules.Schedule | None = None,
    scope: str | None = None,
    structure: str = "unstructured",
    min_keep: int | None = None,
    masks: Mapping[str, Tensor] | None = None,
    include: Include | None = None,
    exclude: Include | None = None,
    layers: Layers | None = None,
    process_group: dist.ProcessGroup | None = None,
    train: Train | None = None,
    round_steps: int | None = None,
    accumulate: int | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    capture: Capture = "auto",
    on_ties: OnTies = "error",
    on_step: Callable[[PruneResult], object] | None = None,
    progress: bool = True,
) -> Masks:
    """Prune a model to `sparsity` or `macs` in place, by a named method, and return the masks.

    At iteration n the method scores the surviving weights (most methods on one fresh batch) and an
    exact global selection prunes to the sparsity that the schedule gives for n. The model is scored
    in the mode (train or eval) it is in. BatchNorm statistics and other buffers, the RNG state, the
    mode, `.grad` and `requires_grad` are afterwards as before; weights differ only where a mask is
    False. If anything raises, Ctrl-C included, the weights are restored too (which costs one copy
    of the prunable weights while it runs; of the whole model for a method that trains it).

    A model wrapped in DistributedDataParallel, or of DTensors (FSDP2, tensor parallelism), is pruned by all
    its ranks together, each with its own batches, by the gradients that the ranks' backward passes average:
    all call this, with the same arguments, and get the same masks, as DTensors where the weights are. Not all
    methods can (`Method.spread`).

    Threads may prune a model each, to the masks that each gets alone. They take turns, for dropout draws from
    the one RNG of the process, and so do `Masks.summary` with a model, `drive.shrink`, `drive.collapse`,
    `drive.sparse.convert` and `drive.pipeline`. What is called inside (a loss, `train`, `on_step`) may call
    them again, but must not wait for another thread that does. Other threads that draw from that RNG
    meanwhile change what is drawn. Where torch.distributed is initialised nobody takes turns.

    Args:
        model: the model; for DRIVE after its dense warm-up, for SNIP at initialisation.
        batches: any iterable of batches, a DataLoader say; started again when short. A batch is (inputs,
            targets), of which both may be tensors or tuples, lists and dicts of them; or a mapping of the
            model's arguments, with labels, so that `model(**batch)` gives the loss (as `.loss`, `["loss"]` or
            a dict of losses to be added up); or, with `compute_loss`, anything. They are copied to the
            weights' device, on CUDA while it computes (at its best from pinned memory).
        loss_fn: (model(inputs), targets) -> scalar loss. None: the model's own, of batches that are mappings.
        compute_loss: (model, batch) -> scalar loss, in place of `loss_fn`: for every other form of batches.
            As in transformers' Trainer, whose bound method can be given.
        sparsity: final fraction of zeros over all prunable entries, 0 <= sparsity < 1; or instead
        macs: the share of the prunable layers' multiply-adds that is left at most, 0 < macs <= 1. An entry
            costs the positions or tokens that it is applied to, counted in one forward pass of the first
            batch (`drive.targets.multiply_adds`); less than one entry's cost is left over. The schedule is
            then that of the share that goes. With scope "global", structures but N:M. On several ranks each
            counts in its own first batch, and the mean is what an entry costs.
        alpha: with `macs`, entries are ranked by their score / cost ** alpha (`fused_drive_prune`): 0 by the
            score alone, 1 by score per multiply-add. Default: 1.
        method: a name in `drive.methods.names()` or an instance.
        iterations: how often to score and prune. Default: the method's own (DRIVE 100, SNIP 1).
        schedule: "one_shot", "exponential", "linear", "cubic", "halving", or a callable
            step in 1..iterations -> sparsity. Default: the method's own, or exponential when
            a one-shot method is asked for several iterations.
        scope: "global": one ranking over all tensors. "uniform", "erk": one per tensor, of the same
            sparsity or of densities by Erdos-Renyi-Kernel (`drive.targets.scopes`); the count over all is
            exact. Default: the method's own, global but for RigL.
        structure: "unstructured"; "N:M" ("2:4", say): N survivors in every M neighbours along the
            inputs, whose sparsity is 1 - N / M; "RxC" ("4x4"): blocks of so many outputs and inputs,
            by the sum of their scores, `round(sparsity * blocks)` of them (`drive.targets.structures`);
            "channels": outputs of layers, and heads of attentions, for `drive.shrink`: one candidate is what
            coupled layers can lose only together, by the sum of the scores of its rows,
            `round(sparsity * candidates)` of them; never the network's outputs, and no units that a norm
            over channels or a tensor that is not pruned has a part in (docs/structured.md). Needs
            torch-pruning, and the model as it is before anything wraps it.
        min_keep: survivors that every matrix of every tensor keeps at least, as in `fused_drive_prune`; of
            structure "channels", units that every group of coupled layers keeps, 1 by default.
        masks: masks to start from, of a model pruned before, as `Masks` or a mapping of bool tensors; they
            are not changed.
        include, exclude, layers: which parameters to prune, as in `fused_drive_prune`.
        process_group: as in `fused_drive_prune`: of a model whose weights are plain tensors, each this rank's
            rows of a larger one; the gradients that `loss_fn` gives are then those of the whole model.
        train: (model, masks or None, number) -> anything: a round of training with these masks held
            (`Masks.attach`), for methods that prune in the course of it (see their docstrings for
            what a round is). `number` counts the rounds since the weights were fresh, from 0. Default:
            one pass over `batches` by SGD (learning rate 0.01, momentum 0.9).
        round_steps: optimizer steps of a round of that default, in place of one pass: for a stream of batches
            that never ends, which a pass would wait for (with itertools.cycle and repeat that is an error; a
            generator does not tell). The next round goes on where the last one stopped.
        accumulate: batches whose mean gradient is one score, so that a large batch comes in pieces (equal
            to it if they are of one size and BatchNorm is in eval mode). Default: the method's own, 1
            but for CroP.
        seed: of the RNG while scoring (dropout, shuffling by the global RNG); from -2^63 to 2^64 - 1.
        autocast: torch.bfloat16 to run model and loss under `torch.autocast`; gradients keep the
            weights' dtype. Default: as around the call.
        capture: whether forward and backward become a CUDA graph after the first iterations, with the
            same results in less time. "auto": where the model allows it and there are enough
            iterations; otherwise they stay eager, and the logger `drive.capture` says why. True: it
            must be possible. What the model decides in Python, once captured, is decided for good.
        on_ties: what to do where scores of 0 decide: where the weakest survivors score 0 and so do all
            entries of a tensor (zero-initialised heads, what is scored through them) or, in the first
            iteration, more entries than all iterations prune. "error", or "index": of equal entries those of
            lower index survive, and the logger `drive._scoring.ties` says so. Looked for in the first
            iteration and in the last one that prunes further.
        on_step: called with each iteration's `PruneResult` once its masks are applied: for curves and logs.
            If it raises, all is undone, on all ranks. On several ranks either all have one, or none.
        progress: tell how far it is, on stderr if that is a terminal: by a bar if rich is installed, else by
            a line every few seconds.

    Returns:
        The masks, on the weights' device, each in memory of its own (a byte an entry): those that `on_step`
        was given.

    Raises:
        ValueError, TypeError: bad arguments, a sparsity that rounds to everything, batches that run out or
            give no loss, a loss or a score that is not finite, scores of 0 that decide, no survivors.
        RuntimeError: capture is True and it is not possible, with the reason.
    """
    team = team_of("prune", model, process_group)
    with together(team, "check their arguments") as said:
        weights = prunable(model, include, exclude, layers, op="prune")
        check_made_outside("prune", model)
        shards = team is not None and (team.rows or any(map(is_dtensor, weights.values())))
        if structure == CHANNELS:
            check_bare("prune", model)
        plan = Plan.of(
            weights, "one" if team is None else "shards" if shards else "copies",
            sparsity=sparsity, macs=macs, alpha=alpha, method=method, iterations=iterations,
            schedule=schedule, scope=scope, structure=structure, min_keep=min_keep,
            round_steps=round_steps, accumulate=accumulate, seed=seed, autocast=autocast, capture=capture,
            on_ties=on_ties,
        )  # fmt: skip
        entries: Selection | None = None
        begun: Masks | None = None
        if not plan.by_outputs:
            entries = Selection(
                model, weights, plan.structure, plan.scope, plan.sparsity, plan.min_keep, team, layers
            )
            said += entries.said
            begun = None if masks is None else entries.begun(masks)
        loss = Loss(loss_fn, compute_loss)
        check_round(batches, plan.trains, train, plan.round_steps)
        if on_step is not None and not callable(on_step):
            raise TypeError(f"prune: on_step must be callable, got {type(on_step).__name__}")
        said += [*plan.said, ("on_step", None if on_step is None else "a function")]
    if entries is not None:
        entries.meet()
        if plan.macs is None:
            entries.check_left(plan.sparsity)
    _log.info("%s", plan)

    chosen, device = plan.method, plan.device
    eager = loss_gradients(model, weights, loss, plan.autocast)
    checks = LateChecks(steps_late=1 if device.type == "cuda" else 0)
    passes = Passes(batches)
    feed = together_from(team, endless(passes, device))
    meaning, raises = chosen.zero_means, plan.on_ties == "error"
    zeros = None if plan.zeros_decide else meaning
    with (
        seeded(plan.seed),
        undone_on_error(model, None if plan.trains else weights),
        nullcontext() if plan.trains else scoring(model, weights),  # once for all iterations
        captured(eager, plan.capture, plan.iterations) as gradients_of,
    ):
        if plan.macs is not None or plan.by_outputs:
            first = next(feed)
            feed = chain([first], feed)
        selection: Selection | ChannelSelection
        outputs: dict[str, Rows] | None = None
        if entries is not None:
            selection = entries
        else:
            found = removable(model, weights, loss, first, layers, op="prune")
            outputs = rows_of(model, weights, layers)
            selection = ChannelSelection(weights, outputs, found, plan.scope, plan.min_keep)
            begun = None if masks is None else selection.begun(masks)
        groups: list[Goals]
        if plan.macs is None:
            groups = [selection.groups(step) for step in plan.steps]
        else:
            with scoring(model, weights), seeded(plan.seed):
                costs = _costs(model, weights, loss, first, layers, team)
            groups = selection.budgets(costs, plan.steps, plan.macs, plan.alpha)
        goals = [[goal for _, goal in some] for some in groups]
        deciding = 1, 1 + goals.index(goals[-1])  # the first iteration, and the last that prunes further
        problem = Problem(
            model, weights, feed, loss, gradients_of,
            train=train or sgd_round(passes, loss, plan.round_steps), accumulate=plan.accumulate,
            sparsity=plan.sparsity, iteration=0, iterations=plan.iterations, outputs=outputs, masks=begun,
        )  # fmt: skip
        result: PruneResult | None = None
        shown = tracked(groups, f"{chosen.name} to {plan.sparsity:.2%}") if progress else groups
        for number, some in enumerate(shown, start=1):
            problem, at = replace(problem, iteration=number), f"prune: iteration {number}"
            chosen.before(problem)
            with scoring(model, weights) if plan.trains else nullcontext():
                ranking = chosen.rank(problem)
            ties = None
            if number in deciding:
                with together(team, "check their losses"):  # or all scores may be 0 for that reason
                    loss.check_finite(at)
                ties = TieCheck(at, groups[-1], meaning, number == 1, raises)
            before, result = result, selection.step(ranking, some, problem.masks, ties)
            problem = replace(problem, masks=result.masks)
            with together(team, "check their losses"):
                checks.add(result.check_step(at, before, loss.total, zeros))
            chosen.after(problem)
            if on_step is not None:
                with together(team, "call on_step"):
                    on_step(result)
        with together(team, "check their losses"):
            checks.finish()
    assert result is not None  # there is one iteration at least
    if device.type == "cuda":
        for mask in result.masks.values():  # they may be of the graph's stream
            mask.record_stream(torch.cuda.current_stream(device))
    return result.masks.apart_()


def _costs(
    model: nn.Module,
    weights: Prunable,
    loss: Loss,
    batch: Batch,
    layers: Layers | None,
    team: Team | None,
) -> dict[str, int]:
    """Multiply-adds of an entry of each weight, on several ranks the mean over their batches."""
    with together(team, "count multiply-adds"):
        costs = multiply_adds(
            model, weights, lambda: loss.value(model, batch), samples_of(batch), layers, op="prune"
        )
    if team is None:
        return costs
    sums = team.sum(torch.tensor(list(costs.values())), "add up multiply-adds").tolist()
    return {name: round(s / team.size) for name, s in zip(costs, sums, strict=True)}
