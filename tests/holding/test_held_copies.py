"""Attached masks belong to a model's modules: they end with them, and travel with them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import drive
from drive import Masks
from drive.holding.hold import live


def network(layers: int = 3, width: int = 16) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def pruned(sparsity: float = 0.75) -> tuple[nn.Sequential, Masks]:
    torch.manual_seed(0)
    model = network()
    return model, drive.prune(model, [], None, method="magnitude", sparsity=sparsity, progress=False)


def train(model: nn.Module, steps: int = 2, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()


def held(model: nn.Module, masks: Masks) -> bool:
    """Are the pruned weights zero and the others not?"""
    weights = dict(model.named_parameters())
    return all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())


def test_a_dropped_handle_leaves_other_models_alone():
    for _ in range(3):  # ids are used again at once
        model, masks = pruned()
        masks.attach(model)
        train(model)
        assert held(model, masks)
        del model
        dense = network()
        train(dense)
        assert all(weight.all() for weight in dense.parameters())


def test_it_ends_with_its_model():
    gc.collect()
    before = len(live())
    model, masks = pruned()
    weight, module = weakref.ref(model[0].weight), weakref.ref(model)
    handle = masks.attach(model)
    train(model, 1)
    model.zero_grad()
    assert len(live()) == before + len(masks)
    del model
    gc.collect()
    assert module() is None and weight() is None and len(live()) == before
    handle.remove()


def test_a_sweep_is_as_separate_processes():
    def run() -> list[Tensor]:
        model, masks = pruned()
        torch.manual_seed(1)
        masks.attach(model)
        train(model)
        return list(model.parameters())

    first, second = run(), run()
    assert all(map(torch.equal, first, second))


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle": pickled,
    "torch.save": saved,
    "average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "cast": lambda model: copy.deepcopy(model).double().float(),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_are_held_apart(make):
    model, masks = pruned()
    masks.attach(model)
    twin = make(model)
    train(twin)
    assert held(twin, masks)
    before = copy.deepcopy(masks)
    masks["0.weight"][:4] = False
    train(twin)
    assert held(twin, before), "the copy has masks of its own"
    train(model)
    assert held(model, masks), "the model follows those that it shares"


def test_a_copy_with_its_masks_follows_them():
    model, masks = pruned()
    masks.attach(model)
    twin, its = copy.deepcopy((model, masks))
    its["0.weight"].fill_(False)
    train(twin)
    assert held(twin, its) and not twin[0].weight.any()
    assert model[0].weight.any()


def test_copies_of_parts_and_of_models_that_keep_their_handle():
    model, masks = pruned()
    model.handle = masks.attach(model)
    part = copy.deepcopy(model[1])
    train(part)
    assert torch.equal(part.weight != 0, masks["1.weight"])
    for make in (copy.deepcopy, pickled):
        twin = make(model)
        train(twin)
        assert held(twin, masks)
        twin.handle.remove()
        train(twin)
        assert all(weight.all() for weight in twin.parameters())
    train(model)
    assert held(model, masks)


def test_removed_leaves_no_trace():
    model, masks = pruned()
    plain = copy.deepcopy(model)
    keys = list(model.state_dict())
    handle = masks.attach(model)
    assert list(model.state_dict()) == keys and not dict(model.named_buffers())
    handle.remove()
    handle.remove()
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        assert module.__dict__.keys() == other.__dict__.keys()
        assert not module._forward_pre_hooks and not module._load_state_dict_post_hooks
    assert not any(weight._post_accumulate_grad_hooks for weight in model.parameters())
    train(model)
    assert all(weight.all() for weight in model.parameters())


def test_attached_twice():
    model, masks = pruned(0.5)
    further = drive.prune(
        copy.deepcopy(model), [], None, method="magnitude", sparsity=0.8, masks=masks, progress=False
    )
    masks.attach(model)
    with further.attach(model):
        train(model)
        assert held(model, further)
    train(model)
    assert held(model, masks), "what was attached before is held on"


@pytest.mark.parametrize("assign", (False, True))
def test_what_is_loaded_is_held(assign: bool):
    model, masks = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.attach(model)
    dense = {name: torch.randn(16, 16) for name in model.state_dict()}
    copies = {name: tensor.clone() for name, tensor in dense.items()}
    model.load_state_dict(copies, assign=assign)
    for name, weight in model.named_parameters():
        assert torch.equal(weight.detach(), dense[name] * masks[name]), "without a step"
    train(model, optimizer=None if assign else optimizer)
    assert held(model, masks)
    assert not model[0].weight.grad[~masks["0.weight"]].any()


def test_replaced_parameters():
    model, masks = pruned()
    masks.attach(model)
    model[0].weight = nn.Parameter(torch.randn(16, 16))
    train(model)
    assert held(model, masks)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    train(model)
    assert held(model, masks)
    model[1].weight = nn.Parameter(torch.randn(4, 16))
    words = r"1.weight has been replaced.* must have shape \(16, 16\), got one of shape \(4, 16\)"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            train(nn.Sequential(model[0], model[1]))


def test_replaced_layers_are_dense_and_the_old_ones_go():
    model, masks = pruned()
    handle = masks.attach(model)
    old = weakref.ref(model[2].weight)
    model[2] = nn.Linear(16, 16, bias=False)
    gc.collect()
    twin = copy.deepcopy(model)
    for one in (model, twin):
        train(one)
        assert held(nn.Sequential(one[0], one[1]), Masks({n: masks[n] for n in ("0.weight", "1.weight")}))
        assert one[2].weight.all()
    gc.collect()
    assert old() is None
    handle.remove()


def test_parametrised_afterwards():
    model, masks = pruned()
    masks.attach(model)

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(model[0], "weight", Double())
    train(model)
    original = model[0].parametrizations.weight.original
    assert torch.equal(original != 0, masks["0.weight"])
    nn.utils.weight_norm(model[1])  # makes other parameters of it
    with pytest.raises(RuntimeError, match="1.weight has been replaced.*got nothing"):
        train(model)


def test_tied_weights_are_held_in_all_their_places():
    model, masks = pruned()
    model[2].weight = model[0].weight
    tied = Masks({"0.weight": masks["0.weight"]})
    tied.attach(model)
    model.load_state_dict({name: torch.randn(16, 16) for name in model.state_dict()}, assign=True)
    assert model[2].weight is not model[0].weight, "as PyTorch does it"
    train(model)
    for layer in (model[0], model[2]):
        assert torch.equal(layer.weight != 0, masks["0.weight"])
    assert model[1].weight.all()


def test_frozen_weights_may_be_thawed():
    model, masks = pruned()
    model.requires_grad_(False)
    masks.attach(model)
    model.requires_grad_(True)
    model(torch.randn(8, 16)).square().mean().backward()
    assert not model[0].weight.grad[~masks["0.weight"]].any()


def test_functional_calls_are_left_alone():
    model, masks = pruned()
    masks.attach(model)
    dense = {name: torch.ones(16, 16) for name in masks}
    out = torch.func.functional_call(model, dense, torch.ones(1, 16))
    assert torch.equal(out, torch.full((1, 16), 16.0**3))
    train(model)
    assert held(model, masks)


def test_under_torch_compile_in_one_graph():
    model, masks = pruned()
    masks.attach(model)
    torch.compiler.reset()  # other tests may have compiled a Sequential as often as is allowed
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(compiled)
    assert held(model, masks)


def test_wrong_arguments_change_nothing():
    model, masks = pruned()
    for arguments, error, words in (
        ((dict(model.named_parameters()),), TypeError, "model must be a module, got dict"),
        ((model, "sgd"), TypeError, "optimizer must be a torch.optim.Optimizer, or hold one.*got str"),
        ((network(1),), ValueError, "no parameter 1.weight"),
    ):
        with pytest.raises(error, match=words):
            masks.attach(*arguments)
    with pytest.raises(ValueError, match="on_revived must be 'zero' or 'error', got 'raise'"):
        masks.attach(model, on_revived="raise")
    assert not any(module._forward_pre_hooks for module in model.modules())
