"""Names, and so masks, are those of the innermost model, whatever wraps it or parts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import drive
from drive import Masks, fused_drive_prune
from drive.distributed.team import replicated
from drive.targets.structures import axes_of
from drive.targets.wrappers import named_modules, owners, unwrap

NAMES = ["0.0.weight", "1.0.weight", "2.weight"]
loss_fn = nn.functional.cross_entropy


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.Tanh()) for inputs in (6, 8))
    return nn.Sequential(*blocks, nn.Linear(8, 3)).eval()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def regional(model: nn.Module, wrap: Callable[[nn.Module], nn.Module] = compiled) -> nn.Module:
    model[0], model[1][0] = wrap(model[0]), wrap(model[1][0])  # type: ignore[index,operator]
    return model


def fabric(model: nn.Module) -> nn.Module:
    made = pytest.importorskip("lightning.fabric", reason="needs lightning").Fabric(accelerator="cpu")
    return made.setup(model)


def fabric_of(forward: nn.Module, model: nn.Module) -> nn.Module:
    """What a Fabric of several processes makes: it calls one module, and keeps another."""
    wrapper = fabric(nn.Linear(1, 1))
    wrapper._forward_module, wrapper._original_module = forward, model
    return wrapper


def ema(version: int) -> Callable[[nn.Module], nn.Module]:
    name = f"ModelEmaV{version}"
    return lambda model: getattr(pytest.importorskip("timm.utils", reason="needs timm"), name)(model)


def adapted(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft", reason="needs peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=r"0\.(.*\.)?0|2", r=2)).eval()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "compile": compiled,
    "regional compile": regional,
    "DataParallel": DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "ModelEmaV2": ema(2),
    "ModelEmaV3": ema(3),
    "Fabric": fabric,
    "checkpoints": lambda model: regional(model, checkpoint_wrapper),
    "PEFT": adapted,
    "compile, Fabric, compile, DDP": lambda model: compiled(
        fabric_of(compiled(DistributedDataParallel(model)), model)
    ),
    "average of compiled, checkpointed parts, PEFT": lambda model: AveragedModel(
        adapted(regional(regional(model, checkpoint_wrapper)))
    ),
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


def of_base(name: str, module: nn.Module | None, tensor: Tensor) -> bool:
    return isinstance(module, nn.Linear) and name.endswith("weight") and "lora_" not in name


def assert_equal(found: Masks, expected: Masks) -> None:
    assert list(found) == list(expected) == NAMES
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


def pruned() -> Masks:
    model = plain()
    loss_fn(model(batch()[0]), batch()[1]).backward()
    return fused_drive_prune(model, sparsity=0.7).masks


@every_wrapper
def test_a_step_has_the_plain_models_masks(wrapper: str):
    model = WRAPPERS[wrapper](plain()).requires_grad_()
    loss_fn(model(batch()[0]), batch()[1]).backward()
    expected = pruned()
    assert_equal(fused_drive_prune(model, sparsity=0.7, include=of_base).masks, expected)
    for name in NAMES:
        module, key = owners(model)[name]
        assert torch.equal(module.get_parameter(key) != 0, expected[name])


@every_wrapper
@pytest.mark.parametrize("method", ("drive", "synflow"))
def test_a_loop_has_the_plain_models_masks(wrapper: str, method: str):
    def masks(model: nn.Module) -> Masks:
        return drive.prune(
            model, [batch()] * 3, loss_fn, sparsity=0.7, iterations=3, method=method, include=of_base,
            structure="1x2", progress=False,
        )  # fmt: skip

    assert_equal(masks(WRAPPERS[wrapper](plain())), masks(plain()))


@every_wrapper
def test_masks_go_from_the_plain_model_to_the_wrapped_one_and_back(wrapper: str):
    model, masks = WRAPPERS[wrapper](plain()), pruned()
    before = {name: p.detach().clone() for name, p in plain().named_parameters()}
    masks.apply_(model)
    made = {name: module.get_parameter(key) for name, (module, key) in owners(model).items()}
    assert all(torch.equal(made[n], p * masks[n] if n in masks else p) for n, p in before.items())
    theirs = Masks({name: torch.ones_like(m) for name, m in Masks.dense(model, of_base).items()})
    theirs.load_state_dict(masks.state_dict())
    other = plain()
    theirs.apply_(other)
    assert all(torch.equal(other.get_parameter(name), made[name]) for name in before)


@every_wrapper
def test_masks_apply_to_state_dicts(wrapper: str):
    """The best checkpoint, say, or an average."""
    model, masks = WRAPPERS[wrapper](plain()), pruned()
    before = {name: p.detach().clone() for name, p in plain().named_parameters()}
    masks.apply_(model.state_dict())  # shares the model's memory
    made = owners(model)
    for name, weight in before.items():
        module, key = made[name]
        assert torch.equal(module.get_parameter(key), weight * masks[name] if name in masks else weight)


@every_wrapper
def test_modules_have_the_plain_models_names_and_order(wrapper: str):
    model = WRAPPERS[wrapper](plain())
    expected = [name for name, _ in plain().named_modules()]
    found = [(name, module) for name, module in named_modules(model) if "lora_" not in name]
    assert list(dict.fromkeys(name for name, _ in found)) == expected
    assert {type(dict(found)[name]) for name in ("0.0", "1.0", "2")} == {nn.Linear}
    names = [name for name in owners(model) if "lora_" not in name]
    assert names == [name for name, _ in plain().named_parameters()]
    if "average" not in wrapper:
        assert type(unwrap(model)) is nn.Sequential


def test_fully_sharded_parts_have_the_plain_models_names():
    model = regional(plain())
    fully_shard(model[0]._orig_mod)
    fully_shard(model)
    loss_fn(model(batch()[0]), batch()[1]).backward()
    masks, expected = fused_drive_prune(model, sparsity=0.7).masks, pruned()
    assert list(masks) == NAMES
    assert all(torch.equal(mask.full_tensor(), expected[name]) for name, mask in masks.items())


@every_wrapper
def test_attached_masks_hold_in_what_is_wrapped(wrapper: str):
    masks, model = pruned(), WRAPPERS[wrapper](plain()).requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with masks.attach(model, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            loss_fn(model(batch()[0]), batch()[1]).backward()
            weights = {name: module.get_parameter(key) for name, (module, key) in owners(model).items()}
            assert not any(weights[name].grad[~mask].any() for name, mask in masks.items())
            optimizer.step()
    assert all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())


def test_a_models_own_module_keeps_its_name():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.base_layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Net()
            self.weight = nn.Parameter(torch.ones(4, 4))

    names = [f"module.{part}.weight" for part in ("module", "base_layer", "head")]
    model = Wrapping()
    masks = Masks({name: torch.rand(4, 4) < 0.5 for name in ("weight", *names)})
    for made in (model, DataParallel(model), compiled(DataParallel(model))):
        assert unwrap(made) is model
        assert list(Masks.dense(made)) == names
        state = {name: torch.ones(4, 4) for name in made.state_dict()}
        masks.apply_(state)
        for key, tensor in state.items():
            name = key.removeprefix("_orig_mod.").removeprefix("" if made is model else "module.")
            assert torch.equal(tensor, masks[name].float() if name in masks else torch.ones(4, 4)), key


def test_names_of_earlier_files_are_known_in_the_models_that_had_them():
    expected = plain()
    pruned().apply_(expected)
    for wrap, names in (
        (lambda model: DataParallel(regional(model)), ("module.0._orig_mod.0.weight", "module.2.weight")),
        (
            lambda model: DistributedDataParallel(regional(model)),
            ("0._orig_mod.0.weight", "1.0._orig_mod.weight", "2.weight"),
        ),
    ):
        model, masks = wrap(plain()), pruned()
        of = {name: name.removeprefix("module.").replace("_orig_mod.", "") for name in names}
        Masks({name: masks[of[name]] for name in names}).apply_(model)
        for name in of.values():
            module, key = owners(model)[name]
            assert torch.equal(module.get_parameter(key), expected.get_parameter(name))


def test_a_state_dict_that_lacks_a_name_or_has_it_twice_is_refused():
    masks = pruned()
    state = {f"module.{name}": torch.ones_like(mask, dtype=torch.float32) for name, mask in masks.items()}
    ambiguous = {**state, "_orig_mod.2.weight": torch.ones(3, 8)}
    with pytest.raises(
        ValueError, match="apply_: 2.weight must stand for one tensor, got 2 whose keys differ"
    ):
        masks.apply_(ambiguous)
    lacking = {name: tensor for name, tensor in state.items() if name != "module.2.weight"}
    with pytest.raises(ValueError, match="apply_: the model has no parameter 2.weight: masks of another"):
        masks.apply_(lacking)
    assert all(tensor.all() for tensor in (*ambiguous.values(), *lacking.values()))


def test_one_name_for_two_parameters_is_refused():
    model = adapted(plain())
    unwrap(model)[2].base_layer = unwrap(adapted(plain()))[2]
    with pytest.raises(
        ValueError, match="parameters must have different names .* two called 2.lora_A.default"
    ):
        Masks.dense(model)


def test_tied_parameters_have_all_their_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU())
    model[1].weight = model[0].weight
    model.append(model[0])
    found = owners(compiled(DataParallel(model)))
    assert list(found) == [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert list(Masks.dense(DataParallel(model))) == ["0.weight"]


def test_saved_modules_of_peft_are_beside_the_original():
    peft = pytest.importorskip("peft", reason="needs peft")
    model = peft.get_peft_model(plain(), peft.LoraConfig(target_modules=r"0\.0", modules_to_save=["2"]))
    assert {"2.weight", "2.modules_to_save.default.weight", "0.0.lora_A.default.weight"} < owners(
        model
    ).keys()
    assert unwrap(model)[2].original_module.weight is owners(model)["2.weight"][0].weight


def test_transposed_convolutions_are_found_in_wrappers():
    model = nn.Sequential(nn.ConvTranspose1d(4, 2, 1), nn.Conv1d(2, 4, 1))
    model[0] = compiled(model[0])
    axes = axes_of(DataParallel(model), Masks.dense(model))
    assert {name: weight.inputs for name, weight in axes.items()} == {"0.weight": 0, "1.weight": 1}


def test_replicas_are_found_beneath_other_wrappers():
    model = plain()
    ddp = DistributedDataParallel(model)
    for made in (ddp, compiled(ddp), fabric_of(compiled(ddp), model), AveragedModel(ddp).module):
        assert isinstance(replicated(made), DistributedDataParallel)
    assert replicated(fabric(plain())) is None


def test_collapse_of_compiled_parts_is_that_of_the_model():
    """What was compiled for the model would fit its copy, too, but normalises."""
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 3))
    model.double().eval()[0][1].running_mean.fill_(100)
    masks = Masks({"0.0.weight": torch.ones(8, 6).bool(), "1.weight": torch.ones(3, 8).bool()})
    masks["1.weight"][:, 0] = False
    model[0] = compiled(model[0])
    inputs = batch()[0].double()
    model(inputs)
    found = drive.collapse(model, masks, inputs)
    assert found.effective == {"0.0.weight": 42, "1.weight": 21} and not found.disconnected


def test_compiled_parts_become_sparse():
    masks, model = pruned(), regional(plain())
    masks.apply_(model)
    found = drive.sparse.convert(model, masks, batch()[0], deterministic=True)
    assert [choice.name for choice in drive.sparse.report(found).choices] == ["0.0", "1.0", "2"]
    assert list(found.state_dict()) == list(model.state_dict())
    assert torch.allclose(found(batch()[0]), model(batch()[0]), atol=1e-6)


@pytest.mark.parametrize("part", (False, True))
def test_flat_pieces_are_refused(part: bool):
    cpu = torch.device("cpu")
    model, masks = plain(), pruned()
    model = nn.Sequential(*model[:2], FullyShardedDataParallel(model[2], device_id=cpu)) if part else (
        FullyShardedDataParallel(model, device_id=cpu)
    )  # fmt: skip
    for op, call in {
        "prunable": lambda: drive.targets.prunable(model),
        "fused_drive_prune": lambda: fused_drive_prune(model, sparsity=0.5),
        "prune": lambda: drive.prune(model, [batch()], loss_fn, sparsity=0.5, progress=False),
        "Masks.apply_": lambda: masks.apply_(model),
        "Masks.attach": lambda: masks.attach(model),
    }.items():
        with pytest.raises(TypeError, match=rf"^{op}: model must be sharded by .*fully_shard \(FSDP2\), got"):
            call()
