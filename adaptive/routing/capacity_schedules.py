"""How many experts a token takes on average, by how much of its text is masked (EC-DLM, arXiv 2604.01622, section 4).

A schedule is a share s(r) of the way from k_min to k_max, r the share of a text's tokens that are masked:

static             1/2
linear             r
linear_reverse     1 - r
cosine             (1 - cos(pi r)) / 2
cosine_reverse     (1 + cos(pi r)) / 2
gaussian           (exp(-(r - 1/2)^2 / (2 sigma^2)) - e) / (1 - e), e = exp(-1/4 / (2 sigma^2)), within 0 and 1
gaussian_reverse   1 - gaussian
bell               1 - 4 (r - 1/2)^2, within 0 and 1
bell_reverse       1 - bell

Over r uniform on [0, 1] the mean of s is 1/2 but for bell (2/3, 1/3) and, within 0.001 at sigma = 0.22, gaussian. The
released code calls gaussian bell_gaussian; both names are known.
"""

import difflib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.errors import RecipeError

SIGMA = 0.22
_SHAPES = ("static", "linear", "cosine", "gaussian", "bell")
NAMES = tuple(f"{shape}{reverse}" for shape in _SHAPES for reverse in ("", "_reverse"))
_RELEASED = {"bell_gaussian": "gaussian", "bell_gaussian_reverse": "gaussian_reverse"}


def budget(name: str, mask_ratio: Any, k_min: int, k_max: int, sigma: float = SIGMA) -> jax.Array:
    """i32[n]: the average number of experts per token of each text.

    name        a schedule, as above
    mask_ratio  f32[n], the exact share of each text's tokens that are masked
    sigma       of gaussian

    round(k_min + s(r) (k_max - k_min)) in float32, halves to even, within k_min and k_max. Operations come in the order
    of the released code, as results at exact halves depend on it.

    Raises RecipeError for an unknown name, k_min below 1 or above k_max, and sigma that is not above 0.
    """
    check(name, k_min, k_max, sigma)
    share = _share(_RELEASED.get(name, name), jnp.asarray(mask_ratio, jnp.float32), sigma)
    return jnp.clip(jnp.round(k_min + share * (k_max - k_min)).astype(jnp.int32), k_min, k_max)


def check(name: str, k_min: int, k_max: int, sigma: float = SIGMA, at: str = "") -> None:
    """Raises RecipeError as `budget`; at: what the names of settings begin with."""
    if name not in NAMES and name not in _RELEASED:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(f"{at}schedule={name}: there is no such schedule; {hint}there are: {', '.join(NAMES)}")
    if not 1 <= k_min <= k_max:
        raise RecipeError(f"{at}k_min={k_min} and {at}k_max={k_max}: must be 1 <= k_min <= k_max")
    if not sigma > 0:
        raise RecipeError(f"{at}sigma={sigma:g}: must be above 0")


def mean_share(name: str, sigma: float = SIGMA) -> float:
    """The mean of s over r uniform on [0, 1]."""
    if not name.startswith(("gaussian", "bell")):
        return 0.5
    mean = 2 / 3
    if name.startswith("gaussian"):
        edge = math.exp(-0.25 / (2 * sigma**2))
        area = sigma * math.sqrt(2 * math.pi) * math.erf(0.5 / (sigma * math.sqrt(2)))
        mean = (area - edge) / (1 - edge)
    return 1 - mean if name.endswith("_reverse") else mean


def most_of_strata(name: str, strata: int, sigma: float = SIGMA) -> float:
    """The largest mean of s over ratios of which one lies in each of `strata` equal parts of [0, 1]."""
    # s is monotone on either side of the middle.
    at = lambda r: float(_share(name, np.float64(r), sigma, np))  # noqa: E731
    within = lambda i: [i / strata, (i + 1) / strata] + [0.5] * (i <= strata / 2 <= i + 1)  # noqa: E731
    return sum(max(map(at, within(i))) for i in range(strata)) / strata


def _share(name: str, r: Any, sigma: float, xp: Any = jnp) -> Any:
    """s(r) of an array r of `xp`, jax.numpy or numpy."""
    shape, reverse = name.removesuffix("_reverse"), name.endswith("_reverse")
    if shape in ("linear", "cosine"):
        r = 1 - r if reverse else r
        return r if shape == "linear" else 0.5 * (1 + xp.cos(math.pi * (1 - r)))
    if shape == "static":
        return xp.full_like(r, 0.5)
    if shape == "bell":
        s = 1 - 4 * xp.square(r - 0.5)
    else:
        edge = math.exp(-0.25 / (2 * sigma**2))
        s = (xp.exp(-xp.square(r - 0.5) / (2 * sigma**2)) - edge) / (1 - edge)
    s = xp.clip(s, 0, 1)
    return 1 - s if reverse else s
