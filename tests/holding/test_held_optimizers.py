"""Attached masks under all kinds of optimizers: what of their states is cleared, and which are not seen."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import drive
from drive import Masks
from drive.holding import moments

Parameters = Iterable[nn.Parameter]


def pruned(sparsity: float = 0.75) -> tuple[nn.Sequential, Masks]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    return model, drive.prune(model, [], None, method="magnitude", sparsity=sparsity, progress=False)


def backward(model: nn.Module) -> Tensor:
    loss = (model(torch.randn(8, 16)) - 1).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def assert_held(model: nn.Module, masks: Masks) -> None:
    for name, weight in model.named_parameters():
        assert not weight[~masks[name]].any(), name
        assert weight[masks[name]].all(), f"{name}: the others train"


TORCH: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "ASGD": torch.optim.ASGD,
    "Muon": torch.optim.Muon,
}


@pytest.mark.parametrize("make", TORCH.values(), ids=TORCH)
def test_moments_from_before_are_cleared(make):
    model, masks = pruned()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    optimizer = make(model.parameters())
    train(model, optimizer)
    masks.attach(model)
    train(model, optimizer)
    assert_held(model, masks)
    for name, weight in model.named_parameters():
        entries = {k: s for k, s in optimizer.state[weight].items() if s.shape == weight.shape}
        assert entries
        for state, tensor in entries.items():
            assert not tensor[~masks[name]].any(), state
            assert tensor.any()


@pytest.mark.parametrize(
    ("make", "state"), ((torch.optim.Rprop, "step_size"), (torch.optim.Adafactor, "row_var"))
)
def test_what_must_not_become_zero_stays(make, state: str):
    model, masks = pruned()
    optimizer = make(model.parameters())
    train(model, optimizer)
    before = [optimizer.state[weight][state].clone() for weight in model.parameters()]
    masks.attach(model, optimizer)
    after = [optimizer.state[weight][state] for weight in model.parameters()]
    assert all(map(torch.equal, before, after))


class Rotated(torch.optim.Optimizer):
    """As SOAP and Shampoo: a preconditioner of the shape of a square weight, of full rank."""

    def __init__(self, params: Parameters):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self) -> None:
        for weight in (w for group in self.param_groups for w in group["params"]):
            state = self.state[weight]
            state.setdefault("exp_avg", torch.zeros_like(weight)).lerp_(weight.grad, 0.1)
            square = state.setdefault("preconditioner", torch.eye(16))
            square.lerp_(weight.grad @ weight.grad.T + 0.1, 0.1)
            weight -= 0.01 * torch.linalg.solve(square + torch.eye(16), state["exp_avg"])


@pytest.fixture
def forgetful(monkeypatch):
    """What is registered in a test is forgotten, and every optimizer is new."""
    monkeypatch.setattr(moments, "_registered", {})
    moments._names.cache_clear()
    yield
    moments._names.cache_clear()


def test_the_state_of_unknown_optimizers_is_left_alone(forgetful, caplog):
    model, masks = pruned()
    optimizer = Rotated(model.parameters())
    train(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with caplog.at_level(logging.WARNING):
        masks.attach(model, optimizer)
        for old, new in zip(before["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
            assert all(torch.equal(old[name], new[name]) for name in old)
        train(model, optimizer, 3)
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("attach: the state of optimizer Rotated is not known and stays as it is"), "once"
    assert_held(model, masks)


def test_optimizers_can_be_registered(forgetful, caplog):
    drive.register_optimizer(Rotated, "exp_avg")
    model, masks = pruned()
    optimizer = type("Derived", (Rotated,), {})(model.parameters())
    train(model, optimizer)
    masks.attach(model)
    train(model, optimizer)
    for name, weight in model.named_parameters():
        assert not optimizer.state[weight]["exp_avg"][~masks[name]].any()
        assert optimizer.state[weight]["preconditioner"].all()
    assert not caplog.records
    for wrong, words in (
        (("exp_avg",), "kind must be a subclass"),
        ((Rotated, 3), "states must be names, got 3"),
    ):
        with pytest.raises(TypeError, match=words):
            drive.register_optimizer(*wrong)


def test_codes_are_no_numbers():
    model, masks = pruned()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    codes = torch.full((16, 16), 127, dtype=torch.uint8)
    optimizer.state[model[0].weight]["momentum_buffer"] = codes
    packed = torch.ones(16, 16).as_subclass(type("Packed", (Tensor,), {}))
    optimizer.state[model[1].weight]["momentum_buffer"] = packed
    masks.attach(model, optimizer)
    assert (codes == 127).all() and packed.all()


def test_timm(forgetful, caplog):
    """All that timm has, by its own factory: none is unknown, and weights stay zero."""
    optim = pytest.importorskip("timm.optim", reason="timm is not installed")
    names = optim.list_optimizers(exclude_filters=["bnb*", "fused*", "*hessian", "lookahead*", "lbfgs"])
    for name in names:
        model, masks = pruned()
        optimizer = optim.create_optimizer_v2(model, opt=name, lr=1e-3)
        backward(model)
        optimizer.step()
        masks.attach(model, optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        for key, weight in model.named_parameters():
            assert not weight[~masks[key]].any(), name
    assert len(names) > 30 and not [r.message for r in caplog.records if r.name.startswith("drive")]


def test_timm_lookahead():
    """Its slow weights are from before: they bring pruned ones back at every sixth step, unless cleared."""
    optim = pytest.importorskip("timm.optim", reason="timm is not installed")
    model, masks = pruned()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    optimizer = optim.Lookahead(torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), k=2)
    for _ in range(4):
        backward(model)
        optimizer.step()
    masks.attach(model, optimizer)
    for _ in range(6):
        backward(model)
        optimizer.step()
        assert_held(model, masks)


class Masters(torch.optim.Optimizer):
    """float32 copies of the weights, trained in their place, as mixed-precision optimizers have them."""

    def __init__(self, params: Parameters):
        self.weights = list(params)
        self.inner = torch.optim.SGD([w.detach().clone() for w in self.weights], 0.01)
        super().__init__(self.inner.param_groups, {})

    def step(self) -> None:
        for weight, master in zip(self.weights, self.inner.param_groups[0]["params"], strict=True):
            master.grad = weight.grad
        self.inner.step()
        for weight, master in zip(self.weights, self.inner.param_groups[0]["params"], strict=True):
            weight.data.copy_(master)  # which moves no version


def test_master_weights_from_before(forgetful, caplog):
    model, masks = pruned()
    dense = copy.deepcopy(model)
    for weight in dense.parameters():
        weight.data.normal_()
    optimizer = Masters(dense.parameters())
    masks.attach(dense, optimizer)
    assert "optimizer Masters holds none of these parameters" in caplog.text
    caplog.clear()
    seen: list[bool] = []
    dense[1].register_forward_pre_hook(lambda *_: seen.append(not dense[0].weight[~masks["0.weight"]].any()))
    train(dense, optimizer, 3)
    assert seen == [True] * 3, "every forward pass is the sparse model's"
    assert "pruned weights had come back, in 0.weight and 1 others" in caplog.text
    dense.eval()(torch.randn(1, 16))
    assert_held(dense, masks)


def test_revived_weights_can_be_an_error():
    model, masks = pruned()
    masks.attach(model, on_revived="error")
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    with torch.no_grad():
        model[1].weight[~masks["1.weight"]] = torch.nan
    count = int((~masks["1.weight"]).sum())
    with pytest.raises(RuntimeError, match=f"{count} pruned entries of 1.weight are not zero any more"):
        model(torch.randn(1, 16))
    masks.apply_(model)
    model(torch.randn(1, 16))


def test_forward_passes_of_parts_are_checked():
    """Lightning calls training_step, not the module that was attached to."""
    model, masks = pruned()
    masks.attach(model)
    with torch.no_grad():
        model[1].weight.fill_(1)
    out = model[1](torch.ones(1, 16))
    assert torch.equal(out, masks["1.weight"].sum(1, keepdim=True).T.float())


class Sharp(torch.optim.Optimizer):
    """SAM (arXiv 2010.01412): up the gradient, a second gradient there, a step down from where it was."""

    def __init__(self, params: Parameters, base: torch.optim.Optimizer):
        super().__init__(params, {})
        self.base_optimizer, self.param_groups = base, base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["old"] = weight.data.clone()
            weight.add_(weight.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.data = self.state[weight]["old"]
        self.base_optimizer.step()


def test_sam(caplog):
    model, masks = pruned()
    optimizer = Sharp(model.parameters(), torch.optim.SGD(model.parameters(), 0.01, momentum=0.9))
    masks.attach(model)
    for _ in range(3):
        backward(model)
        optimizer.first_step()
        assert_held(model, masks)
        optimizer.zero_grad()
        backward(model)
        optimizer.second_step()
        assert_held(model, masks)
    assert not caplog.records


def test_optimizers_in_the_backward_pass():
    model, masks = pruned()
    masks.attach(model)
    optimizers = {w: torch.optim.SGD([w], 0.01, momentum=0.9, weight_decay=0.1) for w in model.parameters()}

    def step(weight: Tensor) -> None:
        optimizers[weight].step()
        optimizers[weight].zero_grad()

    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        backward(model)
        assert all(weight.grad is None for weight in model.parameters())
        assert_held(model, masks)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, masks = pruned()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 0.01))
    masks.attach(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward((model(torch.randn(8, 16)) - 1).square().mean())
        optimizer.step()
    assert_held(model, masks)


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True))
    Masks({"0.weight": torch.rand(8, 4) < 0.5}).attach(model)
    with pytest.raises(RuntimeError, match="the gradient of 0.weight must be dense, got.*sparse=False"):
        model(torch.arange(8)).sum().backward()


@pytest.mark.gpu
def test_masks_follow_a_model_to_its_device():
    """Copied there once; what updates the masks afterwards is followed."""
    model, masks = pruned()
    masks.attach(model)
    model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step() -> None:
        model(torch.randn(8, 16, device="cuda")).square().mean().backward()
        optimizer.step()

    step()
    masks["0.weight"][:3] = False
    step()
    assert_held(model, masks.to("cuda"))
