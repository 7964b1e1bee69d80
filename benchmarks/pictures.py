"""The pictures of the methods' pages: error over size of one trained layer, from the digits network in the package.

    python -m benchmarks.pictures [--out docs/methods/pictures]

One SVG a method: its curve, over those of the families that `compress` chooses from. Errors are those of the layer's
output on the calibration scans, relative squared, in the metric of the inputs; nothing is drawn at random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch

import rankfold as rf
from benchmarks.families import FAMILIES
from rankfold.allocation.measuring import moments_of
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.decompositions import Decomposition, output_errors
from rankfold.digits.data import calibration
from rankfold.digits.model import trained
from rankfold.linalg.precision import widen
from rankfold.sites.site import Site

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "rankfold"
from matplotlib import pyplot  # noqa: E402 - after the backend is chosen

Points = tuple[list[float], list[float]]
GREY = ("WhitenedSVD", "Tucker2")
PAGES = {
    "cp": ("CP",),
    "tensor-train": ("TensorTrain", "TensorTrain, tied"),
    "tucker": ("Tucker",),
    "linear-train": ("LinearTrain",),
    "asvd": ("ASVD",),
    "fisher-svd": ("FisherSVD",),
    "kronecker-svd": ("KroneckerSVD",),
    "feature-pca": ("FeaturePCA",),
}


def curve(
    site: Site, weight: torch.Tensor, stats: rf.Statistics, method: Decomposition
) -> tuple[list[float], list[float]]:
    """Size and error of the options that no other one of the method beats in both."""
    moments = moments_of(site, 0, method, stats)
    errors, _ = output_errors(method, weight, moments, moments)
    sizes = [
        site_cost(site, method.form, rank).params / dense_cost(site).params
        for rank in method.ranks(site.geometry.canonical_shape)
    ]
    best: list[tuple[float, float]] = []
    for size, error in sorted(zip(sizes, errors.tolist(), strict=True)):
        if size < 1 and error > 1e-6 and (not best or error < best[-1][1]):
            best.append((size, error))
    return [size for size, _ in best], [error for _, error in best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/methods/pictures"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model, data = trained(), calibration()
    sites = rf.find_sites(model, data[0])
    families = [family for own in FAMILIES.values() for family in own if isinstance(family, Decomposition)]
    stats = rf.collect(model, data, sites=sites, statistics=rf.needed(families))
    rf.collect_gradients(model, data, stats, sites=sites)
    for page, names in PAGES.items():
        linear = page == "linear-train"
        layers = (each for each in sites if bool(each.geometry.kernel) != linear)
        site = max(layers, key=lambda each: dense_cost(each).params)
        weight = widen(dict(model.named_modules())[site.path].weight.detach())  # type: ignore[union-attr, operator]
        figure, axes = pyplot.subplots(figsize=(6, 3.6))
        for name in (*GREY, *names):
            (method,) = (each for each in FAMILIES[name] if isinstance(each, Decomposition))
            if method.refuses(weight.shape) is not None:
                continue
            grey = name in GREY
            axes.plot(
                *curve(site, weight, stats, method),
                label=name,
                color=None if not grey else ("0.55" if name == GREY[0] else "0.8"),
                linewidth=1.2 if grey else 2,
                marker="" if grey else ".",
            )
        axes.set(
            xlabel="parameters, share of the dense layer", ylabel="squared output error", yscale="log", xlim=(0, 1)
        )
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(options.out / f"{page}.svg", metadata={"Date": None})
        pyplot.close(figure)
        print(options.out / f"{page}.svg")


if __name__ == "__main__":
    main()
