"""What is published and how its rows are trained: numbers, learning rates, networks."""

import math

import pytest
import torch
from torch import nn

from drive.experiments.paper.published import METHODS, ROWS, SMALL, TABLE1, TABLE2
from drive.experiments.paper.tables import describe
from drive.experiments.training.networks import Network
from drive.experiments.training.recipe import Recipe, Steps


def test_all_rows_are_there() -> None:
    assert [row.name for row in TABLE1] == [
        "cifar10-alexnet", "cifar10-vgg16_bn", "cifar10-resnet18", "cifar100-vgg16_bn", "cifar100-resnet18",
        "tinyimagenet-vgg16_bn", "tinyimagenet-resnet18",
    ]  # fmt: skip
    assert [row.name for row in TABLE2] == ["imagenet32-resnet18"]
    missing = {row.name for row in ROWS.values() if row.published and set(row.published) != set(METHODS)}
    assert missing == {"cifar100-resnet18", "tinyimagenet-resnet18"}  # SynFlow, in the source
    assert not any(row.published for row in SMALL)


@pytest.mark.parametrize(
    ("row", "method", "sparsity", "accuracy"),
    [
        ("cifar10-alexnet", "drive", 0.95, 87.21),
        ("cifar10-vgg16_bn", "snip", 0.993, 10.00),
        ("cifar100-vgg16_bn", "snip", 0.993, 1.00),
        ("tinyimagenet-resnet18", "imp", 0.98, 42.35),
        ("imagenet32-resnet18", "synflow", 0.7, 48.39),
    ],
)
def test_published_accuracies(row: str, method: str, sparsity: float, accuracy: float) -> None:
    assert ROWS[row].published[method].accuracy[sparsity] == accuracy


def test_published_seconds_give_the_headline() -> None:
    """DRIVE prunes 43 to 869 times as fast as IMP."""
    ratios = [row.published["imp"].seconds / row.published["drive"].seconds for row in (*TABLE1, *TABLE2)]
    assert (round(min(ratios)), round(max(ratios))) == (43, 869)


@pytest.mark.parametrize(
    ("row", "rates"),
    [
        ("cifar10-alexnet", {0: 1e-4, 25.5: 1e-4, 49.9: 1e-4}),
        ("cifar10-vgg16_bn", {0: 0.01, 29.99: 0.01, 30: 0.002, 60: 4e-4, 90: 8e-5, 120: 1.6e-5, 149: 1.6e-5}),
        ("cifar10-resnet18", {0: 0.01, 50: 0.005 * (1 + math.sqrt(0.5)), 100: 0.005, 200: 0}),
        ("cifar100-vgg16_bn", {59.9: 0.01, 60: 0.002, 120: 4e-4, 160: 8e-5, 199: 8e-5}),
        ("cifar100-resnet18", {79.9: 0.01, 80: 1e-3, 119: 1e-3, 120: 1e-5, 199: 1e-5}),
        ("tinyimagenet-vgg16_bn", {29: 0.01, 30: 1e-3, 60: 1e-4, 80: 1e-5}),
        ("imagenet32-resnet18", {29: 0.1, 30: 0.01, 60: 1e-3, 80: 1e-4}),
    ],
)
def test_learning_rates(row: str, rates: dict[float, float]) -> None:
    recipe = ROWS[row].recipe
    assert {epoch: recipe.lr_at(epoch) for epoch in rates} == pytest.approx(rates, rel=1e-9, abs=1e-18)


def test_a_scaled_recipe_drops_as_much_earlier() -> None:
    recipe = ROWS["cifar10-vgg16_bn"].recipe.scaled(0.1)
    assert recipe.epochs == 15
    assert [recipe.lr_at(epoch) for epoch in (2.9, 3, 14)] == pytest.approx([0.01, 0.002, 1.6e-5])
    assert "x 0.2 at 3, x 0.2 at 6, x 0.2 at 9, x 0.2 at 12" in describe(recipe)
    assert recipe.scaled(1e-6).epochs == 1


def test_recipes_are_the_papers() -> None:
    found = {name: (row.recipe.epochs, row.recipe.batch_size, row.warmup) for name, row in ROWS.items()}
    assert found["cifar10-alexnet"] == (50, 256, 5) and found["imagenet32-resnet18"] == (100, 256, 1)
    assert found["cifar10-resnet18"] == (200, 128, 5) and found["tinyimagenet-vgg16_bn"] == (100, 128, 1)
    assert all((row.levels, row.level_epochs) == (50, 20) for row in (*TABLE1, *TABLE2))


def test_optimizers() -> None:
    weight = [nn.Parameter(torch.ones(3))]
    adam = ROWS["cifar10-alexnet"].recipe.make_optimizer(weight)
    assert isinstance(adam, torch.optim.Adam) and adam.defaults["weight_decay"] == 5e-4
    sgd = Recipe(4, 0.1, momentum=0.5, schedule=Steps(((2, 0.1),), 4)).make_optimizer(weight)
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.5


# as docs/paper.md has them: parameters, and multiply-adds of an image in millions
SIZES = {
    "mlp": (953_010, 0.95),
    "cnn4": (190_954, 10.9),
    "resnet8": (78_042, 12.4),
    "alexnet": (23_272_266, 62.7),
    "vgg16_bn": (14_728_266, 313.2),
    "resnet18": (11_173_962, 555.4),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_networks(name: str) -> None:
    if name not in ("mlp", "cnn4", "alexnet"):
        pytest.importorskip("torchvision", reason=f"{name} is torchvision's")
    model = Network(name, 10, 3, 32).build().eval()
    products = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal products
        products += output.numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    parameters = sum(weight.numel() for weight in model.parameters())
    assert (parameters, products / 1e6) == (SIZES[name][0], pytest.approx(SIZES[name][1], rel=0.01))
