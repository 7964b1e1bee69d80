"""VGG-16 with batch norm for CIFAR-10: the network of the seed's curve, and the script that trains it.

    python -m benchmarks.vgg                    # on a GPU: 100 epochs; on a CPU: the short run
    python -m benchmarks.vgg --phases 16:5 24:1 32:1.5
    python -m benchmarks.vgg --further --peak 0.05 --phases 16:4 24:0.7 32:0.8    # another cycle from those weights

The short run spends its first epochs on smaller images: a 3x3 convolution costs a quarter on half the
side, and batch norm and the last pooling do not mind. Every few minutes the state is saved, and the same
command goes on from it. Weights lie in benchmarks/weights, outside the repository.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).parent / "weights" / "vgg16.safetensors"
WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
SAVE_EVERY_S = 240.0


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions with batch norm, five poolings, one linear layer: 14.7 M parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            if width == 0:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))  # ceil: images of 16 pixels train, too
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def load() -> VGG16:
    """The trained network, in eval mode.

    Raises:
        FileNotFoundError: It has not been trained on this machine yet.
    """
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"{WEIGHTS} · holds the trained VGG-16 · got nothing · run python -m benchmarks.vgg")
    model = VGG16()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def augmented(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Crops of the images padded by an eighth, every other one mirrored, at `pixels` a side."""
    if pixels != images.shape[-1]:
        images = F.interpolate(images, size=pixels, mode="bilinear", antialias=True)
    pad = pixels // 8
    wide = F.pad(images, (pad, pad, pad, pad))
    count = len(images)
    drawn = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator).to(images.device)
    mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(images.device)
    along = torch.arange(pixels, device=images.device)
    rows = drawn[0] + along
    columns = drawn[1] + torch.where(mirrored, along.flip(0), along)
    sample = torch.arange(count, device=images.device)
    return wide.permute(0, 2, 3, 1)[sample[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of images whose class the network gets right."""
    pairs = zip(images.split(batch), labels.split(batch), strict=True)
    hits = int(sum((model(x).argmax(1) == y).sum() for x, y in pairs))
    return hits / len(images)


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate: linearly up over a quarter of the steps, linearly down to nothing over the rest."""
    rise = steps / 4
    return peak * min((step + 1) / rise, (steps - step) / (steps - rise))


def keep(file: Path, model: nn.Module, optimiser: torch.optim.SGD, step: int) -> None:
    """Write weights, momenta and the number of steps taken, whole or not at all."""
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors[f"momentum.{name}"] = optimiser.state[parameter]["momentum_buffer"].contiguous()
    save_file(tensors, file.with_suffix(".part"), {"step": str(step)})
    os.replace(file.with_suffix(".part"), file)


def restore(file: Path, model: nn.Module, optimiser: torch.optim.SGD) -> int:
    """Take over what `keep` wrote; returns the number of steps taken."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
        step = int(opened.metadata()["step"])
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    for name, parameter in model.named_parameters():
        own = tensors[f"momentum.{name}"].to(
            parameter.device, memory_format=torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
        )
        optimiser.state[parameter]["momentum_buffer"] = own
    return step


def train(
    phases: list[tuple[int, float]], *, batch: int, peak: float, decay: float, seed: int, device: str, further: bool
) -> None:
    """Trains through the phases of (pixels, epochs), saving as it goes; ends with weights at `WEIGHTS`.

    `further` starts from the weights that lie there, not from random ones.
    """
    from benchmarks.networks import definitions

    images, labels = (data.to(device) for data in definitions().cifar10("train"))
    torch.manual_seed(seed)
    model = (load() if further else VGG16()).to(device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=decay)
    per_epoch = len(images) // batch
    sizes = [pixels for pixels, epochs in phases for _ in range(round(epochs * per_epoch))]
    state_file = WEIGHTS.with_suffix(".training")
    WEIGHTS.parent.mkdir(exist_ok=True)
    start = 0
    if state_file.is_file():
        start = restore(state_file, model, optimiser)
    saved = time.monotonic()
    total = 0.0
    for step in range(start, len(sizes)):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step // per_epoch)
        order = torch.randperm(len(images), generator=draw)
        chosen = order[step % per_epoch * batch :][:batch].to(device)
        crops = augmented(images[chosen], sizes[step], torch.Generator().manual_seed(seed + step))
        for group in optimiser.param_groups:
            group["lr"] = one_cycle(step, len(sizes), peak)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or has_bf16()):
            loss = F.cross_entropy(model(crops.contiguous(memory_format=torch.channels_last)), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += float(loss.detach())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{len(sizes)}  {sizes[step]} pixels  loss {total / 50:.3f}", flush=True)
            total = 0.0
        if time.monotonic() - saved > SAVE_EVERY_S:
            keep(state_file, model, optimiser, step + 1)
            saved = time.monotonic()
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(weights, WEIGHTS)
    state_file.unlink(missing_ok=True)
    test = definitions().cifar10("test")
    print(f"top-1 on the test images: {accuracy(load().to(device), *(data.to(device) for data in test)):.4f}")


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere autocast only slows down."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--phases", nargs="+", default=["32:100"] if cuda else ["16:5", "24:1", "32:1.5"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak", type=float, default=0.1, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--further", action="store_true", help="start from the weights of an earlier run")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    phases = [(int(pixels), float(epochs)) for pixels, epochs in (phase.split(":") for phase in options.phases)]
    train(
        phases,
        batch=options.batch,
        peak=options.peak,
        decay=options.decay,
        seed=options.seed,
        device="cuda" if cuda else "cpu",
        further=options.further,
    )


if __name__ == "__main__":
    main()
