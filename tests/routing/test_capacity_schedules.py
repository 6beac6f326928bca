"""Budgets against published values and the formulas in float64."""

import numpy as np
import pytest

from adaptive.errors import RecipeError
from adaptive.routing.capacity_schedules import NAMES, budget

pytestmark = pytest.mark.compiles

RATIOS = (0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1)
PUBLISHED = {  # of EC-DLM's ranges
    (8, 32, "linear"): (8, 9, 10, 14, 20, 26, 30, 31, 32),
    (8, 32, "linear_reverse"): (32, 31, 30, 26, 20, 14, 10, 9, 8),
    (8, 32, "cosine"): (8, 8, 9, 12, 20, 28, 31, 32, 32),
    (8, 32, "cosine_reverse"): (32, 32, 31, 28, 20, 12, 9, 8, 8),
    (8, 32, "bell"): (8, 13, 17, 26, 32, 26, 17, 13, 8),
    (8, 32, "gaussian"): (8, 9, 11, 20, 32, 20, 11, 9, 8),
    (8, 32, "gaussian_reverse"): (32, 31, 29, 20, 8, 20, 29, 31, 32),
    (2, 14, "linear_reverse"): (14, 13, 13, 11, 8, 5, 3, 3, 2),
    (2, 14, "cosine_reverse"): (14, 14, 14, 12, 8, 4, 2, 2, 2),
    (2, 14, "gaussian"): (2, 3, 4, 8, 14, 8, 4, 3, 2),
    (8, 32, "static"): (20,) * 9,
    (2, 14, "static"): (8,) * 9,
}


def share(name, r, sigma):
    edge = np.exp(-0.25 / (2 * sigma**2))
    bump = (np.exp(-((r - 0.5) ** 2) / (2 * sigma**2)) - edge) / (1 - edge)
    return {
        "static": 0 * r + 0.5,
        "static_reverse": 0 * r + 0.5,
        "linear": r,
        "linear_reverse": 1 - r,
        "cosine": (1 - np.cos(np.pi * r)) / 2,
        "cosine_reverse": (1 + np.cos(np.pi * r)) / 2,
        "bell": 1 - 4 * (r - 0.5) ** 2,
        "bell_reverse": 4 * (r - 0.5) ** 2,
        "gaussian": bump,
        "gaussian_reverse": 1 - bump,
    }[name]


@pytest.mark.parametrize(("least", "most", "name"), PUBLISHED)
def test_published_budgets(least, most, name):
    found = budget(name, np.array(RATIOS, np.float32), least, most)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, PUBLISHED[least, most, name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigma", [0.22, 0.1])
def test_every_number_of_masked_tokens(name, sigma):
    r = np.arange(1, 514) / 513  # never an exact half but at few, which are left out
    for least, most in ((8, 32), (2, 14), (1, 8)):
        exact = least + (most - least) * share(name, r, sigma)
        clear = np.abs(exact % 1 - 0.5) > 1e-4
        found = np.asarray(budget(name, r.astype(np.float32), least, most, sigma))
        np.testing.assert_array_equal(found[clear], np.clip(np.round(exact[clear]), least, most))
        if not name.startswith("bell") and sigma == 0.22 and most > 8:  # what makes budgets comparable at equal compute
            assert abs(found.mean() - (least + most) / 2) < 0.05


def test_halves_go_to_even():
    np.testing.assert_array_equal(budget("linear", np.array([0.25, 0.75]), 1, 3), [2, 2])  # 1.5, 2.5
    np.testing.assert_array_equal(budget("static", np.zeros(1), 2, 3), [2])


def test_released_names():
    r = np.linspace(0, 1, 9)
    np.testing.assert_array_equal(budget("bell_gaussian", r, 2, 14), budget("gaussian", r, 2, 14))
    np.testing.assert_array_equal(budget("bell_gaussian_reverse", r, 2, 14), budget("gaussian_reverse", r, 2, 14))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("linear_reversed", 1, 2), "did you mean linear_reverse"),
        (("linear", 3, 2), "k_min <= k_max"),
        (("linear", 0, 2), "1 <= k_min"),
        (("gaussian", 1, 2, 0.0), "above 0"),
    ],
)
def test_refusals(given, said):
    name, *rest = given
    with pytest.raises(RecipeError, match=said):
        budget(name, np.zeros(1), *rest)
