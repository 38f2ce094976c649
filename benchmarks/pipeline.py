"""Images a second of the input pipeline alone, against those of training: nothing may wait for its data.

python -m benchmarks.pipeline --device cuda --models alexnet,resnet18
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from drive.experiments.data.batches import Batches
from drive.experiments.data.dataset import Dataset
from drive.experiments.training.compute import Compute
from drive.experiments.training.loop import train
from drive.experiments.training.networks import Network, names
from drive.experiments.training.recipe import Recipe


def images_a_second(count: int, device: str, work: Callable[[], object]) -> float:
    """The best of three, after one that does not count."""
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return count / min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", default="mlp,cnn4,resnet8,alexnet", help=", ".join(names()))
    parser.add_argument("--images", type=int, default=2048, help="of 3x32x32, in an epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()

    images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(options.images) % 10
    data = Dataset(images, labels, images[:1], labels[:1], classes=10, augment=True).to(options.device)
    batches = Batches(data, options.batch_size, seed=0)
    count, compute = len(batches) * options.batch_size, Compute(options.device, options.precision)

    def pipeline() -> None:
        for _ in batches.epoch(0):
            pass

    alone = images_a_second(count, options.device, pipeline)
    device = torch.cuda.get_device_name(options.device) if options.device != "cpu" else "CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.precision}")
    print(f"cropped, flipped, normalised in batches of {options.batch_size}: {alone:,.0f} images a second\n")
    print(
        "| model | training, images a second | pipeline alone / training |", "| --- | ---: | ---: |", sep="\n"
    )
    for name in options.models.split(","):
        model = compute.place(Network(name, 10, 3, 32).build())
        recipe = Recipe(100, 1e-3, options.batch_size)
        rate = images_a_second(
            count,
            options.device,
            lambda m=model, r=recipe: train(m, batches, r, epochs=range(1), compute=compute),
        )
        print(f"| {name} | {rate:,.0f} | {alone / rate:.1f} |", flush=True)


if __name__ == "__main__":
    main()
