"""Working in a wider dtype, and sums of products at any scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rankfold.linalg.precision import cross, full_products, gram, power_of_two_scale, total, widen, work_dtype
from rankfold.testing.matrices import normal


@given(st.floats(min_value=1e-300, max_value=1e300), st.booleans())
def test_the_scale_is_the_power_of_two_just_below(value: float, negative: bool) -> None:
    scale = float(power_of_two_scale(torch.tensor([-value if negative else value, 0.0], dtype=torch.float64)))
    assert scale <= value < 2 * scale
    assert np.frexp(scale)[0] == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_scale_is_representable_at_both_ends_of_a_dtype(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for value in (info.max, info.tiny, info.smallest_normal):
        tensor = torch.tensor([value], dtype=dtype)
        scale = power_of_two_scale(tensor).to(dtype)
        assert 1 <= float(tensor / scale) < 2


def test_nothing_to_scale_by_is_one() -> None:
    for values in ([], [0.0, 0.0], [float("nan"), 1.0], [float("inf")]):
        assert float(power_of_two_scale(torch.tensor(values))) == 1


def test_scaling_back_changes_no_bit() -> None:
    tensor = normal(50, seed=1) * 1e-250
    scale = power_of_two_scale(tensor)
    assert torch.equal((tensor / scale) * scale, tensor)


def test_widening_copies_only_where_the_dtype_differs() -> None:
    wide = normal(3, 3, seed=2).requires_grad_()
    assert widen(wide).data_ptr() == wide.data_ptr()
    assert not widen(wide).requires_grad
    assert widen(wide.half()).dtype == work_dtype(torch.device("cpu")) == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20], ids=str)
def test_gram_equals_numpy(dtype: torch.dtype, scale: float) -> None:
    if dtype == torch.float16 and scale != 1:
        pytest.skip("outside the range of float16")
    rows = (normal(2, 300, 7, seed=3) * scale).to(dtype)
    exact = rows.double().numpy()
    expected = np.einsum("gpi,gpj->gij", exact, exact)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    found = gram(rows)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance * float(np.abs(expected).max()))


@pytest.mark.parametrize("features", [255, 256, 301])
def test_a_gram_in_blocks_is_the_whole_and_exactly_symmetric(features: int) -> None:
    rows = normal(2, 40, features, seed=8).float()
    exact = rows.double().numpy()
    found = gram(rows)
    np.testing.assert_allclose(found.numpy(), np.einsum("gpi,gpj->gij", exact, exact), rtol=0, atol=1e-4)
    half = features // 2
    assert torch.equal(found[:, :half, half:], found[:, half:, :half].mT)


@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20, 0.0], ids=str)
def test_sums_of_rows_equal_numpy(scale: float) -> None:
    rows = (normal(2, 300, 7, seed=9) * scale).float()
    expected = rows.double().numpy().sum(1)
    found = total(rows)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * float(rows.abs().max()))


@given(
    st.integers(1, 30), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1.0, 1e20, 1e-20]), st.integers(0, 99)
)
def test_cross_equals_numpy_at_two_scales(positions: int, m: int, n: int, scale: float, seed: int) -> None:
    left, right = normal(positions, m, seed=seed) * scale, normal(positions, n, seed=seed + 1) / scale
    expected = left.numpy().T @ right.numpy()
    np.testing.assert_allclose(cross(left, right).numpy(), expected, rtol=1e-9, atol=1e-12 * positions)


def test_the_gram_is_the_cross_moment_with_itself() -> None:
    rows = normal(40, 5, seed=4)
    torch.testing.assert_close(gram(rows), cross(rows, rows.clone()), rtol=1e-14, atol=1e-14)


def test_products_of_two_dtypes_are_taken_in_the_wider() -> None:
    left, right = normal(40, 5, seed=5), normal(40, 3, seed=6)
    narrow = left.bfloat16()
    torch.testing.assert_close(cross(narrow, right), narrow.double().mT @ right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cross(right, narrow), right.mT @ narrow.double(), rtol=1e-12, atol=1e-12)
    assert torch.equal(narrow, left.bfloat16())


def test_the_largest_float32_has_a_finite_gram() -> None:
    largest = torch.finfo(torch.float32).max
    found = gram(torch.full((2, 1), largest))
    assert float(found) == pytest.approx(2 * largest**2)


def test_values_that_are_not_finite_are_not_hidden() -> None:
    for value in (float("nan"), float("inf")):
        rows = normal(4, 3, seed=7)
        rows[1, 1] = value
        assert not bool(torch.isfinite(gram(rows)).all())


class _Recorder(TorchDispatchMode):
    """Notes the precision in which each product on the CPU would be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.seen.append((torch.backends.mkldnn.matmul.fp32_precision, args[0].dtype))
        return func(*args, **(kwargs or {}))


def _legacy(value: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(value)


def _new(**values: str) -> Callable[[], None]:
    def choose() -> None:
        for place, value in values.items():
            holder = torch.backends if place == "all" else getattr(torch.backends, place).matmul
            holder.fp32_precision = value

    return choose


SETTINGS = {
    "highest": _legacy("highest"),
    "high": _legacy("high"),
    "medium": _legacy("medium"),
    "one backend": _new(mkldnn="bf16", cuda="tf32"),
    "all backends": _new(all="tf32"),
}


def _places() -> list[str]:
    return [
        torch.backends.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    ]


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> Iterator[None]:
    SETTINGS[request.param]()
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    _new(cuda="none", mkldnn="none")()


@pytest.mark.parametrize("setting", SETTINGS, indirect=True)
@pytest.mark.parametrize("features", [40, 300])
@pytest.mark.usefixtures("setting")
def test_products_in_float32_carry_all_its_bits_whatever_the_user_allows(features: int) -> None:
    x, y = normal(500, features, seed=1).float(), normal(500, 7, seed=2).float()
    before = _places()
    with _Recorder() as recorder:
        own, paired = gram(x), cross(x, y)
    assert recorder.seen
    assert all(precision in ("ieee", "none") and dtype == torch.float32 for precision, dtype in recorder.seen)
    for got, expected in ((own, x.double().T @ x.double()), (paired, x.double().T @ y.double())):
        assert float((got - expected).norm() / expected.norm()) < 1e-6
    assert _places() == before


@pytest.mark.parametrize("setting", SETTINGS, indirect=True)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.usefixtures("setting")
def test_the_setting_is_given_back_after_an_error_too(device: str) -> None:
    before = _places()
    with suppress(KeyError), full_products(torch.device(device)):
        backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
        assert backend.matmul.fp32_precision in ("ieee", "none")
        raise KeyError
    assert _places() == before


def test_an_inherited_setting_stays_inherited() -> None:
    torch.backends.fp32_precision = "tf32"
    try:
        with full_products(torch.device("cuda")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_the_legacy_setting_can_still_be_read_inside_and_after() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with full_products(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_inside_autocast_are_no_narrower() -> None:
    x, y = normal(500, 30, seed=1).float(), normal(500, 7, seed=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own, paired = gram(x), cross(x, y)
    assert torch.equal(own, gram(x))
    assert torch.equal(paired, cross(x, y))
