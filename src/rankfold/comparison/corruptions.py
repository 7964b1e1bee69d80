"""Changes of the inputs under which a compressed model should still decide as the original does."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.checks import check_number, is_number
from rankfold.errors import DataError, OptionError, shown


class Corruption(ABC):
    """A change of a floating input tensor, its first axis the samples. A subclass is a frozen dataclass."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the corruption in a comparison."""

    @abstractmethod
    def apply(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """The changed inputs, of the same shape and dtype.

        Args:
            inputs: The inputs of a batch.
            generator: Source of the random numbers of a corruption that draws.
        """


@dataclass(frozen=True)
class Noise(Corruption):
    """Gaussian noise: `x + strength · std(x) · n`, with the standard deviation of the batch.

    Attributes:
        strength: Standard deviation of the noise, relative to that of the inputs; above 0.
    """

    strength: float = 0.1

    def __post_init__(self) -> None:
        _check_positive(self.strength, "Noise.strength")

    @property
    def name(self) -> str:
        """Noise and its strength."""
        return f"noise {self.strength:g}"

    def apply(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """See `Corruption.apply`."""
        drawn = torch.randn(inputs.shape, generator=generator, dtype=torch.float32).to(inputs)
        return inputs + self.strength * inputs.float().std().to(inputs) * drawn


@dataclass(frozen=True)
class Blur(Corruption):
    """Gaussian blur over the last two axes of images, edges repeated.

    Attributes:
        sigma: Standard deviation of the kernel in pixels, above 0; the kernel reaches 3 of them to each side.
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self.sigma, "Blur.sigma")

    @property
    def name(self) -> str:
        """Blur and its width."""
        return f"blur {self.sigma:g}"

    def apply(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """See `Corruption.apply`.

        Raises:
            DataError: The inputs are no images.
        """
        if inputs.ndim != 4:
            raise DataError(
                "data",
                law="a blur works on images: samples × channels × height × width",
                got=f"inputs of shape {tuple(inputs.shape)}",
                cure="leave Blur out of corruptions",
            )
        reach = math.ceil(3 * self.sigma)
        line = torch.exp(-(torch.arange(-reach, reach + 1).float() / self.sigma).square() / 2)
        line = (line / line.sum()).to(inputs)
        channels = inputs.shape[1]
        padded = F.pad(inputs, (reach, reach, reach, reach), mode="replicate")
        across = F.conv2d(padded, line.reshape(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
        return F.conv2d(across, line.reshape(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


@dataclass(frozen=True)
class Brightness(Corruption):
    """Brighter (or darker): `x + shift · std(x)`, with the standard deviation of the batch.

    Attributes:
        shift: Change of every element, relative to the standard deviation of the inputs; not 0.
    """

    shift: float = 0.3

    def __post_init__(self) -> None:
        if not is_number(self.shift) or not 0 < abs(self.shift) < math.inf:
            raise OptionError("Brightness.shift", law="a number other than 0", got=shown(self.shift), cure="try 0.3")

    @property
    def name(self) -> str:
        """Brightness and its shift."""
        return f"brightness {self.shift:+g}"

    def apply(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """See `Corruption.apply`."""
        return inputs + self.shift * inputs.float().std().to(inputs)


def _check_positive(value: object, place: str) -> None:
    check_number(place, value, law="a number above 0", cure="leave it out for the default", open_low=True)


CORRUPTIONS: tuple[Corruption, ...] = (Noise(0.1), Noise(0.3), Blur(0.6), Blur(1.0), Brightness(0.3), Brightness(-0.3))
