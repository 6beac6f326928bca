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


def _share(name: str, r: jax.Array, sigma: float) -> jax.Array:
    """s(r), f32 of r's shape."""
    shape, reverse = name.removesuffix("_reverse"), name.endswith("_reverse")
    if shape in ("linear", "cosine"):
        r = 1 - r if reverse else r
        return r if shape == "linear" else 0.5 * (1 + jnp.cos(math.pi * (1 - r)))
    if shape == "static":
        return jnp.full_like(r, 0.5)
    if shape == "bell":
        s = 1 - 4 * jnp.square(r - 0.5)
    else:
        edge = math.exp(-0.25 / (2 * sigma**2))
        s = (jnp.exp(-jnp.square(r - 0.5) / (2 * sigma**2)) - edge) / (1 - edge)
    s = jnp.clip(s, 0, 1)
    return 1 - s if reverse else s
