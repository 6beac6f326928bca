"""Low-rank additions to a body's matrices: W + scale A B (LoRA, arXiv 2106.09685), also apart for each pass of a
recursion (Relaxed Recursive Transformers, arXiv 2410.20672, section 2).

What a model computes with is the sum, formed once for a batch: for a matrix [a, b] that costs 2 r a b FLOPs, where
x A B costs 2 r (a + b) for each token. Runs are loaded with the sums in place of the matrices, so that generation,
evaluation and exports know nothing of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.named import matches
from adaptive.layers.site import Axes, Site, own_axes, passes_of
from adaptive.layers.stack import Making
from adaptive.models.bodies import Body, BodyModule, recursive
from adaptive.settings import ranged

Path = tuple[Any, ...]
Flat = dict[Path, nnx.Variable]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Additions A [a, rank] and B [rank, b] to matrices [a, b]; A is drawn, B begins as zeros.

    on        paths of the matrices below the body; "*" and "?" stand for any text and any character
    per_pass  whether each pass of a shared recursion has additions of its own; what no pass goes through has none then
    """

    rank: int = ranged(8, least=1)
    scale: float = ranged(1.0, above=0)  # LoRA's alpha / rank
    on: tuple[str, ...] = ("*",)
    per_pass: bool = False

    def check(self, body: Body, at: str) -> None:
        """Raises RecipeError where the body has no passes that could differ."""
        if self.per_pass and _apart(body) == body:
            raise RecipeError(
                f"{at}.per_pass=true: no pass of the body shares its parameters with another; model.body=recursive has "
                "such, with shared=all and at least 2 recursions"
            )

    def summed(self, body: Body) -> Body:
        """The body whose parameters are the sums."""
        return _apart(body) if self.per_pass else body


def _apart(body: Body) -> Body:
    """The body with parameters for every pass of a recursion."""
    if isinstance(body, recursive.Settings):
        return dataclasses.replace(body, shared="none") if body.recursions > 1 else body
    inner = getattr(body, "inner", None)
    return body if inner is None else dataclasses.replace(body, inner=_apart(inner))  # type: ignore[call-arg]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a stacked matrix: sizes of what is stacked, of its rows and of its columns, and their logical axes."""

    lead: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    axes: Axes

    @classmethod
    def of(cls, variable: nnx.Variable) -> "Shape":
        """Rows and columns are what it reads and writes, of which the residual stream is one."""
        shape, axes = variable.get_value().shape, variable.get_metadata()["axes"]
        own = own_axes(axes)
        lead = len(axes) - len(own)
        rows = 1 if own[0] == "width" else len(own) - 1
        return cls(shape[:lead], shape[lead : lead + rows], shape[lead + rows :], axes)

    def factors(self, rank: int) -> dict[str, tuple[tuple[int, ...], Axes]]:
        """Shape and logical axes of A and B."""
        lead, between = len(self.lead), len(self.lead) + len(self.rows)
        return {
            "a": ((*self.lead, *self.rows, rank), (*self.axes[:between], None)),
            "b": ((*self.lead, rank, *self.columns), (*self.axes[:lead], None, *self.axes[between:])),
        }


def additions(settings: Settings, body: Body, site: Site, making: Making, key: jax.Array) -> Any:
    """nnx.Dict of A and B of every matrix that is chosen, below its path. Raises RecipeError where there is none."""
    found: Any = nnx.Dict()
    shapes = chosen(settings, body, site, making)
    for (path, shape), own in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
        made = {name: (size, axes) for name, (size, axes) in shape.factors(settings.rank).items()}
        std = float(np.prod(shape.rows)) ** -0.5
        drawn = {
            "a": std * jax.random.normal(own, made["a"][0], jnp.float32),
            "b": jnp.zeros(made["b"][0], jnp.float32),
        }
        inside = found
        for part in map(str, path):
            inside = inside.setdefault(part, nnx.Dict())
        for name, value in drawn.items():
            inside[name] = nnx.Param(value, axes=made[name][1], role="matrix", group="main", rate=1.0)
    return found


def chosen(settings: Settings, body: Body, site: Site, making: Making) -> dict[Path, Shape]:
    """Matrices with additions, by their paths below the body. Raises RecipeError where there is none."""
    flat = abstract(settings.summed(body), site, making)[1]
    own = {path: variable for path, variable in flat.items() if variable.get_metadata().get("role") == "matrix"}
    if settings.per_pass:
        own = {path: variable for path, variable in own.items() if passes_of(variable)}
    names = {path: "/".join(map(str, path)) for path in own}
    for pattern in settings.on:
        if not any(matches(name, (pattern,)) for name in names.values()):
            raise RecipeError(
                f"model.low_rank.on={pattern}: no matrix of the body is called so; there are, among others, "
                f"{', '.join(list(names.values())[:4])}"
            )
    return {path: Shape.of(variable) for path, variable in own.items() if matches(names[path], settings.on)}


def parameters(settings: Settings, body: Body, site: Site) -> int:
    """How many numbers the additions are."""
    shapes = chosen(settings, body, site, Making(jnp.dtype("float32")))
    return sum(int(np.prod(size)) for shape in shapes.values() for size, _ in shape.factors(settings.rank).values())


@functools.lru_cache(maxsize=32)
def abstract(body: Body, site: Site, making: Making) -> tuple[nnx.GraphDef, Flat]:
    """A body's graph and the shapes of its variables by path; no array is created."""

    def build() -> BodyModule:
        made: BodyModule = body.build(site, iter(jax.random.split(jax.random.key(0), 64)), making)
        return made

    graphdef, state = nnx.split(nnx.eval_shape(build))
    return graphdef, dict(nnx.to_flat_state(state))


def summed(settings: Settings, of: Body, site: Site, making: Making, body: BodyModule, additions: Any) -> BodyModule:
    """The network with the sums in place of its matrices, of which the passes may have their own."""
    graphdef, shapes = abstract(settings.summed(of), site, making)
    have = dict(nnx.to_flat_state(nnx.state(body)))
    factors = {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(additions))}

    def value(path: Path, variable: nnx.Variable) -> nnx.Variable:
        base = have[path][...]
        if passes_of(variable) and not passes_of(have[path]):
            base = jnp.broadcast_to(base, variable.get_value().shape)
        name = tuple(map(str, path))
        if (*name, "a") in factors:
            base = base + settings.scale * product(factors[*name, "a"], factors[*name, "b"], Shape.of(variable))
        return variable.replace(base)

    return nnx.merge(graphdef, nnx.from_flat_state([(path, value(path, v)) for path, v in shapes.items()]))


def product(a: jax.Array, b: jax.Array, shape: Shape) -> jax.Array:
    """A B, as the matrix is shaped."""
    lead, rank = shape.lead, a.shape[-1]
    flat = jnp.matmul(a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1), precision=jax.lax.Precision.HIGHEST)
    return flat.reshape(*lead, *shape.rows, *shape.columns)


def nearest(residual: np.ndarray, shape: Shape, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A and B whose product is nearest to a stacked matrix: its singular value decomposition, cut (arXiv 2410.20672,
    section 2.3). What ranks beyond the matrix's own would add is zero."""
    lead = shape.lead
    flat = np.asarray(residual, np.float32).reshape(*lead, int(np.prod(shape.rows)), -1)
    u, s, v = np.linalg.svd(flat, full_matrices=False)
    kept = min(rank, s.shape[-1])
    a, b = u[..., :kept], s[..., :kept, None] * v[..., :kept, :]
    missing = [(0, 0)] * len(lead)
    a = np.pad(a, [*missing, (0, 0), (0, rank - kept)])
    b = np.pad(b, [*missing, (0, rank - kept), (0, 0)])
    return a.reshape(*lead, *shape.rows, rank), b.reshape(*lead, rank, *shape.columns)
