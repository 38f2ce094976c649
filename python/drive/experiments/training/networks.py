"""Networks for small images, by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from drive.experiments.runs.inputs import InputError, require


@dataclass(frozen=True)
class Network:
    """Everything that it takes to build a network (with fresh weights from torch's RNG)."""

    name: str
    classes: int
    channels: int
    side: int  # height and width of the images, in pixels

    def build(self) -> nn.Module:
        """A new network: [B, channels, side, side] float32 -> [B, classes] logits.

        Raises:
            InputError: an unknown name, images too small for it, torchvision missing.
        """
        entry = _entry(self.name)
        if self.side % entry.multiple:
            fitting = [name for name, other in _NETWORKS.items() if self.side % other.multiple == 0]
            raise InputError(
                f"--model must be one of {', '.join(fitting) or 'none'} for images of side {self.side}, "
                f"got {self.name}"
            )
        return entry.make(self)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for a checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class _Entry:
    make: Callable[[Network], nn.Module]
    multiple: int  # the side of the images must be a multiple of this
    lr: float  # peak learning rate that trains it well at batch size 128


def names() -> list[str]:
    """Names of all networks."""
    return list(_NETWORKS)


def default_lr(name: str) -> float:
    """The peak learning rate that a network is trained with unless the user says otherwise."""
    return _entry(name).lr


def _entry(name: str) -> _Entry:
    if name not in _NETWORKS:
        raise InputError(f"--model must be one of {', '.join(_NETWORKS)}, got {name!r}")
    return _NETWORKS[name]


def _small_cnn(network: Network) -> nn.Module:
    """53,354 parameters for the digits: two convolutions, two linear layers."""
    return nn.Sequential(OrderedDict({
        "conv1": nn.Conv2d(network.channels, 32, 3, stride=2, padding=1, bias=False),
        "norm1": nn.BatchNorm2d(32),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        "norm2": nn.BatchNorm2d(64),
        "relu2": nn.ReLU(),
        "pool": nn.AvgPool2d(network.side // 8) if network.side > 8 else nn.Identity(),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(64 * 4, 128, bias=False),
        "norm3": nn.BatchNorm1d(128),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(128, network.classes),
    }))  # fmt: skip


def _mlp(network: Network) -> nn.Module:
    """LeNet-300-100: two hidden layers of 300 and 100."""
    widths = [network.channels * network.side**2, 300, 100]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, network.classes))


def _cnn4(network: Network) -> nn.Module:
    """Four 3x3 convolutions, each with BatchNorm, ReLU and max-pooling: 10.9 M multiply-adds at 3x32x32."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([network.channels, 32, 64, 96, 128]):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.MaxPool2d(2),
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (network.side // 16) ** 2, network.classes))


def _resnet8(network: Network) -> nn.Module:
    """He et al.'s ResNet for CIFAR with n = 1, of torchvision's blocks: 12.4 M multiply-adds at 3x32x32."""
    block = require("torchvision.models.resnet").BasicBlock
    layers: list[nn.Module] = [
        nn.Conv2d(network.channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        block(16, 16),
    ]  # fmt: skip
    for inputs, outputs in pairwise([16, 32, 64]):
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
        layers.append(block(inputs, outputs, 2, shortcut))
    for layer in nn.Sequential(*layers).modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, network.classes))


def _resnet18(network: Network) -> nn.Module:
    """torchvision's, with a 3x3 stem and no pooling after it."""
    model: nn.Module = require("torchvision.models").resnet18(num_classes=network.classes)
    stem = nn.Conv2d(network.channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as its other layers
    model.conv1, model.maxpool = stem, nn.Identity()
    return model


def _vgg(name: str) -> Callable[[Network], nn.Module]:
    """torchvision's layers, with a mean over the image and one Linear in place of three."""

    def make(network: Network) -> nn.Module:
        layers = getattr(require("torchvision.models"), name)(num_classes=1).features
        if network.channels != 3:
            layers[0] = nn.Conv2d(network.channels, 64, 3, padding=1)
            nn.init.kaiming_normal_(layers[0].weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layers[0].bias)
        return nn.Sequential(
            layers, nn.AvgPool2d(network.side // 32), nn.Flatten(), nn.Linear(512, network.classes)
        )

    return make


def _vgg16_narrow(network: Network) -> nn.Module:
    """VGG-16 with BatchNorm in an eighth of its width: 231,000 parameters, 4.9 M multiply-adds at 3x32x32."""
    widths = [8, 8, "M", 16, 16, "M", *([32] * 3), "M", *([64] * 3), "M", *([64] * 3), "M"]
    layers = require("torchvision.models.vgg").make_layers(widths, batch_norm=True)
    if network.channels != 3:
        layers[0] = nn.Conv2d(network.channels, 8, 3, padding=1)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(
        layers, nn.AvgPool2d(network.side // 32), nn.Flatten(), nn.Linear(64, network.classes)
    )


def _alexnet(network: Network) -> nn.Module:
    """AlexNet's five convolutions and three linear layers, kernels shrunk to 3x3 for small images."""
    widths = [network.channels, 64, 192, 384, 256, 256]
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2 if index == 0 else 1, padding=1), nn.ReLU()]
        if index in (0, 1, 4):
            layers.append(nn.MaxPool2d(2))
    layers += [nn.AvgPool2d(network.side // 32), nn.Flatten()]
    for inputs in (256 * 4, 4096):
        layers += [nn.Dropout(), nn.Linear(inputs, 4096), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4096, network.classes))


_NETWORKS = {
    "small_cnn": _Entry(_small_cnn, multiple=8, lr=0.1),
    "mlp": _Entry(_mlp, multiple=1, lr=0.05),
    "cnn4": _Entry(_cnn4, multiple=16, lr=0.1),
    "resnet8": _Entry(_resnet8, multiple=4, lr=0.1),
    "resnet18": _Entry(_resnet18, multiple=8, lr=0.1),
    "vgg16": _Entry(_vgg("vgg16"), multiple=32, lr=0.01),
    "vgg16_bn": _Entry(_vgg("vgg16_bn"), multiple=32, lr=0.05),
    "vgg16_narrow": _Entry(_vgg16_narrow, multiple=32, lr=0.05),
    "alexnet": _Entry(_alexnet, multiple=32, lr=0.01),
}
