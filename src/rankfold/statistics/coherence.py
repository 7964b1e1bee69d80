"""Whether a site's errors at its positions add up or cancel: by how much a curve's errors are off, at every error.

`tr(G D A Dᵀ)` assumes that the errors of a sample's positions are independent, of each other and of the gradients. In
front of a pooling layer they are not: the part that is common to all of them passes, the rest is averaged away. So the
true change of every sample's output by a cut's error `D_r (x − x̄)` is measured, for all ranks at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankfold.decompositions import Moments, WhitenedSVD, output_root
from rankfold.layers import adapter_for
from rankfold.layers.calls import rows_of
from rankfold.linalg.precision import gram, widen
from rankfold.linalg.spectrum import tail_sums
from rankfold.linalg.whitening import left_spectrum
from rankfold.sites.site import Site
from rankfold.statistics._coherence import Coherence
from rankfold.statistics.collect import tells_apart
from rankfold.statistics.store import Statistics


@dataclass(eq=False)
class Followed:
    """Projections that follow the errors `D_r (x − x̄)` of a site to the network's outputs, for all ranks at once.

    `D_r = F⁻¹(I − U_r U_rᵀ) F W`, with `FᵀF = G + λI` and `U` that of the whitened SVD of `F W`. So the change of a
    sample's output is `Σ_{i>r} h_i`, `h = Σ (UᵀF (y − ȳ)) ∘ (UᵀF⁻ᵀ g)` over its positions and calls.

    Attributes:
        outputs: Projection `UᵀF` of the outputs, shape (groups, k, out).
        gradients: Projection `UᵀF⁻ᵀ` of the gradients, shape (groups, k, out).
        mean: Mean output `ȳ`, shape (groups, out).
        energy: Second moment `UᵀF W A WᵀFᵀU` of the projected outputs, shape (groups, k, k).
        felt: Sum `f = Σ_s (Σ_{i>r} h_i)²` for every r from 0, and the sum of its squared terms, shape (2, k + 1).
        gram: Gram of `UᵀF⁻ᵀ g`, shape (groups, k, k).
        samples: Number of samples.
    """

    outputs: Tensor
    gradients: Tensor
    mean: Tensor
    energy: Tensor
    felt: Tensor
    gram: Tensor
    samples: int = 0

    @classmethod
    def of(cls, site: Site, layer: nn.Module, stats: Statistics) -> Followed | None:
        """The projections of a site, before any sample; None where moments or gradient Grams were not collected."""
        own, adapter = stats.sites.get(site.path, {}), adapter_for(layer)
        if adapter is None or not all(name in own for name in ("input-gram", "input-mean", "gradient-gram")):
            return None
        parts = [
            _rotation(weight, stats.moments(site, group), stats.moments(site, group, shrink=False))
            for group, weight in enumerate(widen(adapter.canonical(layer)).flatten(2))
        ]
        outputs, gradients, mean, energy = (torch.stack(each) for each in zip(*parts, strict=True))
        bias = adapter.bias(layer)
        if bias is not None:
            mean = mean + widen(bias.detach()).reshape(mean.shape)
        return cls(outputs, gradients, mean, energy, energy.new_zeros(2, energy.shape[1] + 1), torch.zeros_like(energy))

    def rotated(self, outputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """`h` at every position, shape (positions, k), and the Gram of `UᵀF⁻ᵀ g`.

        Args:
            outputs: Outputs `y`, shape (groups, positions, out).
            gradients: Gradients `g`, of that shape.
        """
        changes = (outputs - self.mean.to(outputs)[:, None]) @ self.outputs.to(outputs).mT
        turned = gradients @ self.gradients.to(gradients).mT
        return (changes * turned).sum(0), gram(turned)

    def add(self, changes: Tensor) -> None:
        """Add samples.

        Args:
            changes: Changes `h`, shape (samples, k).
        """
        squares = changes.to(self.felt).flip(1).cumsum(1).flip(1).square()
        self.felt[:, :-1] += torch.stack([squares.sum(0), squares.square().sum(0)])
        self.samples += len(changes)

    def statistic(self) -> Coherence:
        """The statistic of the samples that were added."""
        predicted = torch.stack([tail_sums(one) for one in self.energy * self.gram]).sum(0)
        return Coherence(self.samples, torch.stack([self.felt[0], predicted, self.felt[1]])[None])


def _rotation(weight: Tensor, moments: Moments, seen: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`UᵀF`, `UᵀF⁻ᵀ`, `W x̄` and `UᵀF W A WᵀFᵀU` of one group, `A` the covariance as it was seen."""
    method = WhitenedSVD()
    if moments.gradient_gram is None or seen.gram is None or seen.mean is None:
        raise TypeError("moments and gradient Grams were collected of every group or of none")
    root = output_root(moments.gradient_gram.to(weight))
    basis, _ = left_spectrum(root @ weight, moments.metric(method).to(weight), damping=method.damping)
    rows = basis.mT @ root @ weight
    energy = rows @ seen.metric(method).to(weight) @ rows.mT
    mean = weight @ seen.mean if seen.bias else torch.zeros_like(weight[:, 0])
    return basis.mT @ root, torch.linalg.solve_triangular(root, basis, upper=True).mT, mean, energy


def add_samples(
    followed: Mapping[str, Followed],
    reached: Sequence[tuple[Site, nn.Module, Tensor]],
    gradients: Sequence[Tensor | None],
    samples: int,
) -> None:
    """Add the samples of one batch.

    Args:
        followed: Projections by path of the site; changed.
        reached: Calls of the sites, each as the site, its layer, and its output.
        gradients: Gradients of a random projection of the network's outputs by the output of each call; None where they
            do not depend on it.
        samples: Number of samples in the batch.
    """
    changes: dict[str, Tensor] = {}
    for (site, layer, outputs), gradient in zip(reached, gradients, strict=True):
        own, adapter = followed.get(site.path), adapter_for(layer)
        if own is None or adapter is None or gradient is None:
            continue
        if not tells_apart(rows_of(adapter, layer, outputs), samples, site.rows):
            continue
        here, seen = own.rotated(adapter.outputs(layer, outputs.detach()), adapter.outputs(layer, gradient))
        own.gram += seen
        here = here.reshape(samples, -1, here.shape[1]).sum(1)
        changes[site.path] = here + changes[site.path] if site.path in changes else here
    for path, here in changes.items():
        followed[path].add(here)
