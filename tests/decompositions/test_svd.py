"""Plain SVD against TensorLy and the closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.decompositions import SVD, Moments, SpatialSVD
from rankfold.errors import OptionError
from rankfold.testing.matrices import normal

SHAPE = (7, 5, 3, 2)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_it_equals_tensorly_s_partial_svd(rank: int) -> None:
    tensorly_svd = pytest.importorskip("tensorly.tenalg.svd")
    weight = normal(*SHAPE, seed=1)
    u, s, vh = tensorly_svd.svd_interface(weight.flatten(1).numpy(), n_eigenvecs=rank)
    found = SVD().decompose(weight, rank, Moments()).reconstruct()
    np.testing.assert_allclose(found.flatten(1).numpy(), (u * s) @ vh, rtol=0, atol=1e-12)


@given(st.integers(1, 10), st.integers(0, 99))
def test_the_mirrored_form_is_the_svd_of_the_other_unfolding(rank: int, seed: int) -> None:
    weight = normal(4, 10, 3, seed=seed)
    unfolded = weight.permute(0, 2, 1).reshape(12, 10).numpy()
    u, s, vh = np.linalg.svd(unfolded, full_matrices=False)
    expected = ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(4, 3, 10).transpose(0, 2, 1)
    factors = SVD(mirrored=True).decompose(weight, rank, Moments())
    np.testing.assert_allclose(factors.reconstruct().numpy(), expected, rtol=0, atol=1e-12)
    assert float(SVD(mirrored=True).errors(weight, Moments())[rank - 1]) == pytest.approx(
        float(np.square(s[rank:]).sum() / np.square(s).sum()), abs=1e-13
    )


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_the_plain_spatial_form_is_the_svd_of_rows_against_columns(rank: int) -> None:
    weight = normal(*SHAPE, seed=2)
    unfolded = weight.permute(0, 3, 1, 2).reshape(14, 15).numpy()  # out·kw × in·kh
    u, s, vh = np.linalg.svd(unfolded, full_matrices=False)
    expected = ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(7, 2, 5, 3).transpose(0, 2, 3, 1)
    factors = SpatialSVD(whitened=False).decompose(weight, rank, Moments())
    np.testing.assert_allclose(factors.reconstruct().numpy(), expected, rtol=0, atol=1e-12)


def test_both_stages_get_the_root_of_the_singular_values() -> None:
    weight = normal(6, 9, seed=3)
    factors = SVD().decompose(weight, 4, Moments())
    s = torch.linalg.svdvals(weight)[:4]
    torch.testing.assert_close(factors.left.norm(dim=0).square(), s)
    torch.testing.assert_close(factors.right.norm(dim=1).square(), s)


def test_refused_shapes_say_why() -> None:
    assert SVD().refuses((4, 4)) is None
    assert "kernel larger than 1" in str(SVD(mirrored=True).refuses((4, 4)))
    assert "kernel larger than 1" in str(SVD(mirrored=True).refuses((4, 4, 1, 1)))
    assert SVD(mirrored=True).refuses((4, 4, 1, 3)) is None
    for shape in ((4, 4), (4, 4, 3), (4, 4, 1, 3), (4, 4, 3, 3, 3)):
        assert "2-d kernel" in str(SpatialSVD().refuses(shape))
    assert SpatialSVD().refuses((4, 4, 3, 2)) is None


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_flags_are_true_or_false(value: object) -> None:
    with pytest.raises(OptionError, match="True or False"):
        SVD(mirrored=value)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="True or False"):
        SpatialSVD(whitened=value)  # type: ignore[arg-type]


def test_the_message_of_a_rank_out_of_range_names_the_range() -> None:
    with pytest.raises(OptionError, match="between 1 and 4") as caught:
        SVD().decompose(normal(4, 9, seed=4), 5, Moments())
    assert "5" in str(caught.value)


def test_its_name_says_the_options_that_were_changed() -> None:
    assert str(SVD()) == "svd"
    assert str(SVD(mirrored=True)) == "svd(mirrored=True)"
    assert str(SpatialSVD(damping=0.5)) == "spatial-svd(damping=0.5)"
