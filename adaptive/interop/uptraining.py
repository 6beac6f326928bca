"""Recursive models that begin as a trained plain one: which of its layers a shared core is made of.

stepwise  layers at equal intervals, the first and the last of those that are shared among them
average   the mean of the layers that the uses of one layer stand for
lower     the first ones
upper     the last ones
random    drawn without replacement, in their order

(MoR paper, section on uptraining and its released sharing_strategy; Relaxed Recursive Transformers, arXiv 2410.20672,
section 2.) The first and the last layers are copied, routers are drawn. Passes with parameters of their own begin as
the layers that they stand for.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.interop.tensors import Path, Place
from adaptive.layers import stack as stacks
from adaptive.layers.site import passes_of
from adaptive.layers.stack import Making
from adaptive.models import language_model, low_rank
from adaptive.models.bodies import plain, recursive
from adaptive.settings import leaf_values

Sharing = Literal["stepwise", "average", "lower", "upper", "random"]
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)

# What changes no number that a model computes from given parameters.
_OF_TRAINING = ("init_std", "embedding_std", "padding_token")
_OF_STACKS = ("repeats", "repeat", "scale_residual", "stream")
_NONE = object()


def sources(
    sharing: Sharing, layers: range, core: int, recursions: int, order: str = "cycle", seed: int = 0
) -> tuple[tuple[int, ...], ...]:
    """For each of `core` shared layers, the plain model's layers whose mean it begins as.

    layers  of the plain model that the core stands for
    order   of the passes, as in `recursive.Settings`

    Raises RecipeError where there are too few layers, or an average has not one for every use.
    """
    if core > len(layers):
        raise RecipeError(f"the core has {core} layers, and only {len(layers)} of the plain model are to be shared")
    match sharing:
        case "stepwise":
            chosen = np.linspace(layers[0], layers[-1], core).round().astype(int).tolist()
        case "lower":
            chosen = list(layers[:core])
        case "upper":
            chosen = list(layers[len(layers) - core :])
        case "random":
            chosen = sorted(np.random.default_rng(seed).choice(list(layers), core, replace=False).tolist())
        case "average":
            if core * recursions != len(layers):
                raise RecipeError(
                    f"sharing=average needs a layer for every use: {recursions} passes of {core} layers are "
                    f"{core * recursions}, and {len(layers)} layers of the plain model are to be shared; use another "
                    f"sharing ({', '.join(s for s in SHARINGS if s != 'average')})"
                )
            return tuple(
                tuple(layers[_use(j, r, core, recursions, order)] for r in range(recursions)) for j in range(core)
            )
    return tuple((layer,) for layer in chosen)


def _use(j: int, r: int, core: int, recursions: int, order: str) -> int:
    """Which layer of the unrolled core layer j is in pass r."""
    return j * recursions + r if order == "sequence" else r * core + j


@dataclasses.dataclass(frozen=True)
class Uptrained:
    """A recursive model of `settings` that begins as the plain one whose state is `trained`, by path.

    shared  layers of the plain model that the core stands for; chosen: see `sources`
    """

    settings: language_model.Settings
    trained: Mapping[Any, Any]
    shared: range
    chosen: tuple[tuple[int, ...], ...]
    seed: int = 0

    def state(self, shapes: Any, place: Place) -> Any:
        """The model's state, each parameter made by itself and put where `place` says."""
        added = self._additions()
        drawn: dict[Any, Any] = dict(nnx.to_flat_state(self._drawn(shapes, added)))

        def made(path: Path, variable: nnx.Variable) -> nnx.Variable:
            value = drawn[path][...] if path in drawn else added.get(path)
            value = self._value(path, variable) if value is None else value
            return variable.replace(place(path, np.asarray(value, np.float32)))

        flat = nnx.to_flat_state(shapes)
        return nnx.from_flat_state([(path, made(path, variable)) for path, variable in flat])

    def _drawn(self, shapes: Any, added: Mapping[Path, Any]) -> Any:
        """What the plain model does not have: the routers, and additions of low rank other than those."""
        paths = [path for path, _ in nnx.to_flat_state(shapes)]
        ours = {p for p in paths if p[:2] == ("body", "depth") or (p[0] == "low_rank" and p not in added)}

        def draw(key: jax.Array) -> Any:
            flat = nnx.to_flat_state(nnx.state(self.settings.build(key)))
            return nnx.from_flat_state([(path, variable) for path, variable in flat if path in ours])

        return jax.jit(draw)(jax.random.key(self.seed)) if ours else nnx.State({})

    def _additions(self) -> dict[Path, np.ndarray]:
        """Additions that make each pass nearest to the layers that it stands for, where it stands for some."""
        body, own = self._body, self.settings.low_rank
        if own is None or not own.per_pass or not self._one_for_each_use:
            return {}
        shapes = low_rank.chosen(own, body, self.settings.site, Making(jnp.dtype(jnp.float32)))
        added: dict[Path, np.ndarray] = {}
        for path, shape in shapes.items():
            layers = self.trained["body", "stack", *path[1:]]
            residual = self._each_use(layers) - self._mean(layers)
            a, b = low_rank.nearest(np.asarray(residual), shape, own.rank)
            name = ("low_rank", *map(str, path))
            added |= {(*name, "a"): a, (*name, "b"): b / own.scale}
        return added

    @property
    def _body(self) -> recursive.Settings:
        assert isinstance(self.settings.body, recursive.Settings)
        return self.settings.body

    @property
    def _one_for_each_use(self) -> bool:
        return self._body.core.layers * self._body.recursions == len(self.shared)

    def _each_use(self, layers: Any) -> jax.Array:
        """[passes, core, ...]: of the plain model's layers those that each use stands for."""
        core, passes = self._body.core.layers, self._body.recursions
        uses = [[self.shared[_use(j, r, core, passes, self._body.order)] for j in range(core)] for r in range(passes)]
        return jnp.asarray(layers)[jnp.asarray(uses)]

    def _mean(self, layers: Any) -> jax.Array:
        """[core, ...]: what the shared layers begin as."""
        return jnp.stack([jnp.asarray(layers)[jnp.asarray(of)].mean(0) for of in self.chosen])

    def _value(self, path: Path, variable: nnx.Variable) -> Any:
        if path[0] != "body":
            return self.trained[path]
        part, rest = path[1], path[2:]
        if part == "norm":
            return self.trained["body", "stack", "norm", *rest]
        layers = self.trained["body", "stack", *rest]
        if part == "prelude":
            return layers[: self.shared.start]
        if part == "coda":
            return layers[self.shared.stop :]
        if passes_of(variable) and self._one_for_each_use:
            return self._each_use(layers)
        return jnp.broadcast_to(self._mean(layers), variable.shape)


def uptrained(
    settings: language_model.Settings,
    trained: language_model.Settings,
    state: Any,
    sharing: Sharing,
    seed: int = 0,
) -> Uptrained:
    """The recursive model `settings` as it begins from the plain model `trained` with this state.

    Raises RecipeError where one is no recursive model or the other no plain one, or where they differ in more than the
    recursion.
    """
    body, plainly = settings.body, trained.body
    if not isinstance(body, recursive.Settings):
        raise RecipeError(f"uptraining makes recursive models, and this recipe's body is {body.kind()}")
    if not isinstance(plainly, plain.Settings) or len(plainly.stack.blocks) != 1:
        raise RecipeError("uptraining begins from a plain model whose layers are all of one kind; the run's is another")
    ends = [end for end in (body.prelude, body.coda) if end is not None]
    if sum(end.layers for end in ends) >= plainly.layers:
        raise RecipeError(
            f"the run's model has {plainly.layers} layers: too few for what comes before and behind the core"
        )
    _compare(_outside(settings), _outside(trained), "model.")
    for part in (body.core, *ends):
        _compare(_block(part), _block(plainly.stack), "a block's ")
    shared = range(body.prelude.layers if body.prelude else 0, plainly.layers - (body.coda.layers if body.coda else 0))
    chosen = sources(sharing, shared, body.core.layers, body.recursions, body.order, seed)
    flat = {path: variable[...] for path, variable in nnx.to_flat_state(state)}
    return Uptrained(settings, flat, shared, chosen, seed)


def _outside(settings: language_model.Settings) -> dict[str, Any]:
    found = leaf_values(dataclasses.replace(settings, body=plain.Settings(), low_rank=None))
    return {path: value for path, value in found.items() if not path.startswith("body") and path not in _OF_TRAINING}


def _block(stack: stacks.Settings) -> dict[str, Any]:
    if len(stack.blocks) != 1:
        raise RecipeError("uptraining is of stacks whose layers are all of one kind")
    return {path: value for path, value in leaf_values(stack.blocks[0]).items() if path not in _OF_STACKS}


def _compare(ours: dict[str, Any], theirs: dict[str, Any], of: str) -> None:
    wrong = [p for p in {**ours, **theirs} if ours.get(p, _NONE) != theirs.get(p, _NONE)]
    if wrong:
        shown = ", ".join(f"{of}{p} is {ours.get(p, 'absent')}, the run has {theirs.get(p, 'none')}" for p in wrong[:8])
        raise RecipeError(f"the recursive model is another one than the run's: {shown}")
