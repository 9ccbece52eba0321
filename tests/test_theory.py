"""docs/method.md: what rho says of the error, on factors of known rho."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from theory import LowRank, measure


def magnitudes(sigma: float, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = (
        normal(1, d, 16).sign() * (sigma * normal(1, d, 16)).exp() * normal(1, d, 1).exp() for d in (300, 400)
    )
    return LowRank(left, right)


@pytest.mark.parametrize("sigma", [0.2, 0.4])
def test_rho_and_the_error_of_rounding_are_as_derived(sigma):
    row = measure("", "", magnitudes(sigma, seed=1))
    rho = (1 - torch.exp(torch.tensor(-(sigma**2))).item()) ** 0.5
    assert row.rho_a == pytest.approx(rho, rel=0.1) and row.rho_b == pytest.approx(rho, rel=0.1)
    assert row.rounded == pytest.approx(row.expected, rel=0.05)
    assert row.admm <= row.rounded * (1 + 1e-6) < row.bound


def test_what_signs_and_scales_hold_has_no_error():
    row = measure("", "", magnitudes(0.0, seed=2))
    assert max(row.rho_a, row.rho_b, row.rounded, row.admm, row.bound) < 1e-6


def test_equal_columns_break_the_expectation_but_not_the_bound():
    target = magnitudes(0.6, seed=3)
    left = target.left[..., :1].expand(-1, -1, 16) * (1 + 1e-3 * target.left.sign())
    row = measure("", "", LowRank(left, target.right))
    assert row.rounded > 1.05 * row.expected or row.rounded < 0.95 * row.expected
    assert row.rounded < row.bound
