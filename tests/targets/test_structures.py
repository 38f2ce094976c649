"""Scopes and structures on layers of random shapes, against simulations that sort."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn

import drive
from drive import Masks, methods
from drive.targets import matrices, scopes, structures

LOSS = nn.functional.cross_entropy
KINDS = ("linear", "conv", "grouped", "transposed", "grouped transposed")


def layer(kind: str, outputs: int, inputs: int, kernel: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(inputs, outputs)
    groups = 2 if kind.startswith("grouped") else 1
    if kind.endswith("transposed"):
        return nn.ConvTranspose2d(groups * inputs, groups * outputs, kernel, groups=groups)
    return nn.Conv2d(groups * inputs, groups * outputs, (kernel, 1), groups=groups)


@st.composite
def models(draw: st.DrawFn, multiple: int = 1) -> nn.ModuleList:
    """One to four layers; outputs and inputs (of a group) are multiples of `multiple`."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    sizes = st.integers(1, 3 if multiple > 1 else 9).map(lambda n: n * multiple)
    layers = [
        layer(draw(st.sampled_from(KINDS)), draw(sizes), draw(sizes), draw(st.integers(1, 3)))
        for _ in range(draw(st.integers(1, 4)))
    ]
    for module in layers:
        if draw(st.booleans()):  # ties and zeros
            with torch.no_grad():
                module.weight.copy_((module.weight * 8).round() / 4)
    return nn.ModuleList(layers)


class Given(methods.Method):
    """Ranks by given scores, or of each iteration by others."""

    name = "given"

    def __init__(self, *scores: dict[str, Tensor], signed: bool = False, power: int = 1):
        self.scores, self.signed, self.power = scores, signed, power
        self.seen: list[Masks] = []

    def rank(self, problem):
        scores = self.scores[(problem.iteration - 1) % len(self.scores)]
        copies = {name: score.clone() for name, score in scores.items()}
        return methods.Ranking(scores=copies, signed=self.signed, power=self.power)

    def after(self, problem):
        self.seen.append(Masks({name: mask.clone() for name, mask in problem.masks.items()}))


def noise(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(w.shape, generator=generator) for n, w in drive.targets.prunable(model).items()}


def prune(model: nn.Module, method, **options) -> Masks:
    return drive.prune(model, [], LOSS, method=method, **{"progress": False, "on_ties": "index", **options})


def axis(model: nn.Module, name: str) -> int:
    """The dimension of a layer's inputs."""
    return 0 if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ConvTranspose2d) else 1


def lines(model: nn.Module, name: str, tensor: Tensor, m: int) -> list[list]:
    """Every m neighbours along the inputs, one by one, as numbers."""
    rows = tensor.movedim(axis(model, name), -1).flatten(0, -2)
    return [row[i : i + m].tolist() for row in rows for i in range(0, len(row), m)]


def blocks(tensor: Tensor, rows: int, columns: int) -> list[Tensor]:
    """The blocks one by one, at every position of a kernel."""
    planes = tensor.flatten(2).unbind(2) if tensor.dim() > 2 else [tensor]
    return [
        plane[i : i + rows, j : j + columns]
        for plane in planes
        for i in range(0, plane.shape[0], rows)
        for j in range(0, plane.shape[1], columns)
    ]


# Counts


def guards(model, name: str, weight, min_keep: int, unit: int = 1) -> int:
    """Units of so many entries that min_keep makes survive, in all matrices of a weight."""
    boxes = matrices.boxes(weight.shape, structures.axes_of(model, {name: weight})[name])
    return sum(min(-(-min_keep // unit), matrices.entries(box) // unit) for box in boxes)


@given(
    model=models(), method=st.sampled_from(("random", "magnitude")), scope=st.sampled_from(scopes.names()),
    sparsity=st.one_of(st.sampled_from((0.0, 0.5, 0.9)), st.floats(0, 0.999)),
    iterations=st.integers(1, 3), min_keep=st.sampled_from((0, 0, 1, 3)),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_unstructured_counts_are_exact(model, method, scope, sparsity, iterations, min_keep):
    before = {name: w.detach().clone() for name, w in drive.targets.prunable(model).items()}
    total = sum(w.numel() for w in before.values())
    assume(round(sparsity * total) < total)
    try:
        masks = prune(model, method, sparsity=sparsity, scope=scope, iterations=iterations, min_keep=min_keep)
    except ValueError as error:  # more survivors asked for than there are, in all or in a layer
        assert min_keep and "min_keep" in str(error)
        groups = scopes.groups(scope, {n: w.shape for n, w in before.items()}, round(sparsity * total))
        guarded = [sum(guards(model, n, before[n], min_keep) for n in names) for names, _ in groups]
        sizes = [sum(before[n].numel() for n in names) for names, _ in groups]
        assert any(guard > size - lost for guard, size, (_, lost) in zip(guarded, sizes, groups, strict=True))
        return
    pruned = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert sum(pruned.values()) == round(sparsity * total)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name), before[name] * mask), name
        assert int(mask.sum()) >= min(min_keep, mask.numel())
        if scope == "uniform":
            assert abs(pruned[name] - round(sparsity * total) * mask.numel() / total) < 1


@given(
    model=models(4), method=st.sampled_from(("random", "magnitude")), scope=st.sampled_from(scopes.names()),
    size=st.sampled_from(((4, 4), (2, 4), (1, 4), (4, 1), (2, 1))), sparsity=st.floats(0, 0.99),
    iterations=st.integers(1, 3), min_keep=st.sampled_from((0, 0, 1, 5)),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_whole_blocks_and_their_exact_count(model, method, scope, size, sparsity, iterations, min_keep):
    entries = size[0] * size[1]
    before = {name: w.detach().clone() for name, w in drive.targets.prunable(model).items()}
    units = sum(w.numel() for w in before.values()) // entries
    assume(scope == "global" or not min_keep)
    asked = sum(guards(model, name, w, min_keep, entries) for name, w in before.items())
    assume(units - round(sparsity * units) >= max(asked, 1))
    masks = prune(
        model, method, sparsity=sparsity, structure=f"{size[0]}x{size[1]}", scope=scope,
        iterations=iterations, min_keep=min_keep,
    )  # fmt: skip
    assert sum(int((~mask).sum()) for mask in masks.values()) == entries * round(sparsity * units)
    for name, mask in masks.items():
        transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ConvTranspose2d)
        matrix = mask.transpose(0, 1) if transposed else mask  # [outputs, inputs, ...]
        assert all(int(block.sum()) in (0, entries) for block in blocks(matrix, *size))
        assert torch.equal(model.get_parameter(name), before[name] * mask), name
        assert int(mask.sum()) >= min(min_keep, mask.numel())


# N:M


@given(
    model=models(4), pattern=st.sampled_from(((2, 4), (1, 4), (3, 4), (1, 2))), signed=st.booleans(),
    scope=st.sampled_from(("global", "uniform")), ties=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_n_of_m_keeps_the_largest_of_every_group(model, pattern, signed, scope, ties, seed):
    """In one shot; of equal ones the first."""
    n, m = pattern
    scores = noise(model, seed)
    if ties:
        scores = {name: score.round() for name, score in scores.items()}
    method = Given(scores, signed=signed)
    masks = prune(model, method, sparsity=1 - n / m, structure=f"{n}:{m}", scope=scope)
    for name, mask in masks.items():
        score = scores[name] if signed else scores[name].abs()
        pairs = zip(lines(model, name, score, m), lines(model, name, mask, m), strict=True)
        for values, kept in pairs:
            best = sorted(range(m), key=lambda i: (-values[i], i))[:n]
            assert kept == [i in best for i in range(m)]


@given(model=models(4), iterations=st.integers(2, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_two_of_four_on_the_way_follows_the_schedule(model, iterations, seed):
    """Scores that change at every iteration: each keeps its count, no group falls below two, none revive."""
    total = sum(w.numel() for w in drive.targets.prunable(model).values())
    method = Given(*[noise(model, seed + i) for i in range(iterations)])
    options = {"sparsity": 0.5, "structure": "2:4", "iterations": iterations, "schedule": "linear"}
    final = prune(model, method, **options)
    old = None
    for step, masks in enumerate(method.seen, 1):
        pruned = round(0.5 * step / iterations * total) if step < iterations else total // 2
        assert sum(int((~mask).sum()) for mask in masks.values()) == pruned
        scores = method.scores[step - 1]
        spared, gone = [], []
        for name, mask in masks.items():
            alive = torch.ones_like(mask) if old is None else old[name]
            assert not (mask & ~alive).any()
            each = (lines(model, name, t, 4) for t in (scores[name].abs(), mask, alive))
            for values, kept, before in zip(*each, strict=True):
                assert sum(kept) >= 2
                living = sorted((i for i in range(4) if before[i]), key=lambda i: -values[i])
                assert all(kept[i] for i in living[:2]), "the best two of a group are safe"
                spared += [values[i] for i in living[2:] if kept[i]]
                gone += [values[i] for i in living[2:] if not kept[i]]
        assert not spared or not gone or min(spared) >= max(gone), "of the others the weakest go"
        old = masks
    for name, mask in final.items():
        assert all(sum(group) == 2 for group in lines(model, name, mask, 4))


def test_two_of_four_goes_on_from_masks():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(16, 8), nn.ConvTranspose2d(8, 4, 2)])
    scores = noise(model)
    start = {}
    for name, score in scores.items():  # of some groups the best one is gone already
        best = score.abs().movedim(axis(model, name), -1).unflatten(-1, (-1, 4)).argmax(-1, keepdim=True)
        gone = (torch.rand(best.shape) < 0.5).expand(*best.shape[:-1], 4) & (torch.arange(4) == best)
        start[name] = ~gone.flatten(-2).movedim(-1, axis(model, name))
    kept = {name: mask.clone() for name, mask in start.items()}
    options = {"sparsity": 0.5, "structure": "2:4", "masks": Masks(start)}
    masks = prune(model, Given(scores), **options)
    for name, mask in masks.items():
        assert not (mask & ~kept[name]).any() and torch.equal(start[name], kept[name])
        each = (lines(model, name, t, 4) for t in (scores[name].abs(), mask, kept[name]))
        for values, now, before in zip(*each, strict=True):
            best = sorted((i for i in range(4) if before[i]), key=lambda i: -values[i])[:2]
            assert now == [i in best for i in range(4)]


# Blocks


def _given(power: int, signed: bool = False):
    def make(model: nn.Module) -> tuple[methods.Method, dict[str, Tensor]]:
        scores = noise(model)
        expected = {n: s.double() if signed else s.double().abs() ** power for n, s in scores.items()}
        return Given(scores, power=power, signed=signed), expected

    return make


class WithGradients(methods.Method):
    """A ranking of theta, given gradients and powers, as DRIVE's."""

    name = "given gradients"

    def __init__(self, grads, powers):
        self.grads, self.method = grads, methods.Drive(powers=powers)

    def rank(self, problem):
        class Problem:
            weights = problem.weights

            @staticmethod
            def loss_gradients(reuse):
                return {name: grad.clone() for name, grad in self.grads.items()}

        return self.method.rank(Problem)


def _drive(p: int, q: int):
    def make(model: nn.Module) -> tuple[methods.Method, dict[str, Tensor]]:
        grads, weights = noise(model), drive.targets.prunable(model)
        scores = {
            n: w.detach().double().abs() ** p * grads[n].double().abs() ** q for n, w in weights.items()
        }
        return WithGradients(grads, (p, q)), scores

    return make


@pytest.mark.parametrize("scope", ("global", "uniform"))
@pytest.mark.parametrize("size", ((4, 4), (2, 4), (4, 1)))
@pytest.mark.parametrize(
    "make",
    [_given(1), _given(2), _given(1, signed=True)]
    + [_drive(p, q) for p, q in ((1, 1), (2, 2), (3, 3), (2, 1), (1, 2), (2, 0), (0, 3), (3, 1), (1, 3))],
)
def test_blocks_go_by_the_sum_of_their_scores(make, size: tuple[int, int], scope: str):
    """In float64; within 1e-6 of the cut either may go (signed sums are ranked in float32)."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 16), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(4, 8, (1, 2))])
    method, scores = make(model)
    options = {"sparsity": 0.7, "structure": f"{size[0]}x{size[1]}", "scope": scope}
    masks = prune(model, method, **options)
    ranked = {
        name: [
            (float(s.sum()), bool(m.all()))
            for s, m in zip(blocks(scores[name], *size), blocks(mask, *size), strict=True)
        ]
        for name, mask in masks.items()
    }
    together = [[unit for units in ranked.values() for unit in units]]
    for units in together if scope == "global" else ranked.values():
        kept, gone = [s for s, alive in units if alive], [s for s, alive in units if not alive]
        assert kept and gone
        assert min(kept) >= max(gone) - 1e-6 * abs(max(gone))
        largest = sorted((s for s, _ in units), reverse=True)[: len(kept)]
        assert sum(kept) == pytest.approx(sum(largest), rel=1e-9)


def test_blocks_of_squares_are_not_those_of_plain_scores():
    """One large entry or four middling ones."""
    model = nn.ModuleList([nn.Linear(4, 2, bias=False)])
    scores = {"0.weight": torch.tensor([[3.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])}
    options = {"sparsity": 0.5, "structure": "2x2"}
    left, right = [[True, True, False, False]] * 2, [[False, False, True, True]] * 2
    assert prune(model, Given(scores), **options)["0.weight"].tolist() == right
    assert prune(model, Given(scores, power=2), **options)["0.weight"].tolist() == left
    minus = {"0.weight": torch.tensor([[9.0, -9.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])}
    assert prune(model, Given(minus, signed=True), **options)["0.weight"].tolist() == right
    assert prune(model, Given(minus), **options)["0.weight"].tolist() == left


def test_dead_blocks_stay_dead_whatever_their_score():
    model = nn.ModuleList([nn.Linear(4, 2, bias=False)])
    scores = {"0.weight": torch.tensor([[9.0, 9.0, 1.0, 1.0], [9.0, 9.0, 2.0, 2.0]])}
    start = Masks({"0.weight": torch.tensor([[False, False, True, True]] * 2)})
    expected = [[False] * 4, [False, False, True, True]]
    masks = prune(model, Given(scores), sparsity=0.75, structure="1x2", masks=start)
    assert masks["0.weight"].tolist() == expected
    scores["0.weight"] = torch.tensor([[9.0, 9.0, -2.0, -2.0], [9.0, 9.0, -1.0, -1.0]])  # below dead ones' 0
    masks = prune(model, Given(scores, signed=True), sparsity=0.75, structure="1x2", masks=start)
    assert masks["0.weight"].tolist() == expected


# Scopes


@given(model=models(), sparsity=st.floats(0.01, 0.99))
@settings(max_examples=80, deadline=None)
def test_erk_densities_are_those_of_the_formula(model, sparsity):
    """min(1, eps (sum of sizes) / (product of sizes)), eps found by bisection, to one entry."""
    weights = drive.targets.prunable(model)
    total = sum(w.numel() for w in weights.values())
    prune = round(sparsity * total)
    raw = {name: sum(w.shape) for name, w in weights.items()}
    low, high = 0.0, float(total)
    for _ in range(200):
        eps = (low + high) / 2
        kept = sum(min(w.numel(), eps * raw[name]) for name, w in weights.items())
        low, high = (eps, high) if kept < total - prune else (low, eps)
    plan = {
        names[0]: lost
        for names, lost in scopes.groups("erk", {n: w.shape for n, w in weights.items()}, prune)
    }
    assert sum(plan.values()) == prune
    for name, w in weights.items():
        assert abs(w.numel() - plan[name] - min(w.numel(), eps * raw[name])) < 1 + 1e-6, name


# Errors


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("signed", (False, True))
@pytest.mark.parametrize(
    ("structure", "sparsity"), (("unstructured", 0.5), ("2:4", 0.5), ("4x4", 0.5), ("2x1", 0.5))
)
def test_non_finite_scores_name_the_tensor_and_change_nothing(structure, sparsity, signed, bad):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 8), nn.Conv2d(4, 8, 2)])
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    start = Masks({n: torch.ones_like(w, dtype=torch.bool) for n, w in drive.targets.prunable(model).items()})
    good, scores = noise(model), noise(model, 1)
    scores["1.weight"][3, 2, 1, 0] = bad
    message = r"prune: iteration 2: non-finite score in 1.weight \(1 of 128 entries\)"
    options = {"sparsity": sparsity, "structure": structure, "iterations": 2, "masks": start}
    with pytest.raises(ValueError, match=message):
        prune(model, Given(good, scores, signed=signed), schedule=lambda n: sparsity * (n - 1), **options)
    assert all(torch.equal(w, before[name]) for name, w in model.named_parameters())
    assert all(mask.all() for mask in start.values())
    entry = (3, 2, 1, 0) if structure == "2:4" else (slice(None), slice(None), 1, 0)
    start["1.weight"][entry] = False  # of an entry that is pruned, the score does not matter
    assert prune(model, Given(scores, signed=signed), **options).sparsity() == 0.5


@pytest.mark.parametrize(
    ("make", "structure", "message"),
    (
        (lambda: nn.Conv2d(6, 8, 1), "2:4", r"0.weight must have inputs in groups of 4 .* \(8, 6, 1, 1\)"),
        (lambda: nn.Conv2d(8, 8, 1, groups=4), "2:4", r"0.weight must have inputs in groups of 4 .* \(8, 2"),
        (lambda: nn.ConvTranspose2d(6, 8, 1), "2:4", r"0.weight must have inputs in groups of 4 .* \(6, 8"),
        (lambda: nn.Linear(8, 6), "4x4", r"0.weight must have a shape of whole blocks .* got \(6, 8\)"),
        (lambda: nn.Linear(6, 8), "4x4", r"0.weight must have a shape of whole blocks .* got \(8, 6\)"),
        (lambda: nn.Linear(8, 8), "0:4", "structure must be 'unstructured', .* got '0:4'"),
        (lambda: nn.Linear(8, 8), "4:4", "structure must be 'unstructured', .* got '4:4'"),
        (lambda: nn.Linear(8, 8), "0x4", "structure must be 'unstructured', .* got '0x4'"),
        (lambda: nn.Linear(8, 8), " 2:4", "structure must be 'unstructured', .* got ' 2:4'"),
    ),
)
def test_shapes_and_names_that_cannot_be(make, structure: str, message: str):
    with pytest.raises(ValueError, match=message):
        prune(nn.ModuleList([make()]), "magnitude", sparsity=0.5, structure=structure)


def test_a_layer_of_the_wrong_shape_can_be_excluded():
    model = nn.ModuleList([nn.Linear(6, 4), nn.ConvTranspose2d(8, 6, 1)])
    masks = prune(model, "magnitude", sparsity=0.5, structure="2:4", exclude="0.weight")
    assert list(masks) == ["1.weight"] and (masks["1.weight"].unflatten(0, (2, 4)).sum(1) == 2).all()
