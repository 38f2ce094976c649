"""The networks of `drive sparse-bench` and of benchmarks/cpu/engine, untrained and sparse."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import drive
from drive.experiments.runs.inputs import require
from drive.experiments.training import networks
from drive.experiments.training.networks import Network

IMAGENET = ("resnet50", "mobilenet_v2", "vgg16")  # torchvision's, for 224x224; the others for 32x32
_IMAGES = 8  # of noise, by which BatchNorm is settled


def names() -> list[str]:
    """Names of all networks."""
    return list(dict.fromkeys([*IMAGENET, *networks.names()]))


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network with fresh weights, the same ones each time, and the shape of an image.

    Raises:
        InputError: torchvision is missing.
    """
    torch.manual_seed(0)
    if name in IMAGENET:
        model: nn.Module = getattr(require("torchvision.models"), name)()
        return model, (3, 224, 224)
    return Network(name, classes=10, channels=3, side=32).build(), (3, 32, 32)


def uniform_masks(model: nn.Module, sparsity: float) -> drive.Masks:
    """Random ones, of the same sparsity in every layer; the model stays as it is."""
    return drive.prune(
        copy.deepcopy(model), [], method="random", scope="uniform", sparsity=sparsity, progress=False
    )


def settle_(model: nn.Module, masks: drive.Masks, shape: tuple[int, ...]) -> nn.Module:
    """Prune an untrained network, in place, so that activations neither vanish nor grow from layer to layer.

    As in a trained one: the survivors of a layer get the norm that all its weights had, and BatchNorm the
    statistics of some noise.

    Args:
        shape: of an image.

    Returns:
        The model, in eval mode.
    """
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            norm = weight.norm()
            weight.mul_(mask)
            if mask.any():
                weight.mul_(norm / weight.norm())
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.reset_running_stats()
                module.momentum = None  # a mean over all passes: this one
        model.train()(noise(_IMAGES, shape))
    return model.eval()


def noise(images: int, shape: tuple[int, ...]) -> Tensor:
    """Images of noise, the same ones each time."""
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(0))


def sparse_network(name: str, sparsity: float) -> tuple[nn.Module, drive.Masks, tuple[int, int, int]]:
    """A settled network, uniform masks of it, and the shape of an image.

    Raises:
        InputError: as `build`.
    """
    model, shape = build(name)
    masks = uniform_masks(model, sparsity)
    return settle_(model, masks, shape), masks, shape
