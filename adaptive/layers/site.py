"""Where a part stands in a model, and the parameters and buffers made there, with all that others need to know of them.

A parameter's metadata says what it is; nobody guesses from names:

axes   logical name of every dimension (adaptive/parallel/rules.py). Leading "uses" tells a recursion's passes apart,
       "layers" the layers that a scan runs over, "stages" those that a pipeline can split
role   matrix, kernel (of a convolution of each channel alone), scale (of a norm, or a temperature), gated_scale (of
       Mamba-2's norm), bias or vector (one number per head or channel, stacked or not): what weight decay and the
       optimizer ask
group  main, or auxiliary: trained by losses of its own
rate   multiple of the learning rate
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

Role = Literal["matrix", "kernel", "scale", "gated_scale", "bias", "vector"]
Axes = tuple[str | None, ...]
STACKING = ("uses", "layers", "stages", "experts")  # axes that tell apart what is stacked, and are no dimension of it


class Buffer(nnx.Variable):
    """State of a model that no gradient trains (biases, running thresholds, adaptive coefficients)."""


class Site(NamedTuple):
    """Where in a model a layer stands.

    width    of the residual stream
    std      of initial weights; out_std: of matrices that write to the residual stream, None: the same
    stack    leading axes of its parameters: (layers,), or (uses, layers) where each pass of a recursion has its own
    uses     passes that share the parameters: buffers have this leading axis; 0: buffers have none
    layers   number of each stacked layer in the unrolled network, from 0, in the first pass of a recursion
    stride   layers between one of them and itself in the next pass; 0: as many as `layers`
    depth    layers of the unrolled network
    norm_eps of its normalisations
    """

    width: int
    std: float = 0.02
    stack: tuple[int, ...] = ()
    uses: int = 0
    layers: tuple[int, ...] = (0,)
    depth: int = 1
    norm_eps: float = 1e-5
    out_std: float | None = None
    stride: int = 0

    @property
    def writes_std(self) -> float:
        """Standard deviation of the initial matrices that write to the residual stream."""
        return self.std if self.out_std is None else self.out_std

    def buffer(self, value: jax.Array) -> Buffer:
        """A buffer that starts as `value` in every stacked layer and use: f32, or i32 of whole numbers, or bool."""
        value = _narrow(jnp.asarray(value))
        lead = (self.uses,) * bool(self.uses) + self.stack
        axes = ("uses",) * bool(self.uses) + lead_axes(self.stack) + (None,) * jnp.ndim(value)
        return Buffer(jnp.broadcast_to(value, (*lead, *jnp.shape(value))), axes=axes)


def lead_axes(stack: tuple[int, ...]) -> Axes:
    """Logical names of the leading axes of stacked parameters."""
    names: list[str | None] = ["uses", "layers"]
    return tuple(names[2 - len(stack) :])


def own_axes(axes: Axes) -> Axes:
    """The axes of one of what a parameter stacks."""
    return tuple(name for name in axes if name not in STACKING)


def param(value: jax.Array, axes: Axes, *, stack: tuple[int, ...] = (), role: Role, group: str = "main") -> nnx.Param:
    """A float32 parameter that starts as `value`, which has the leading axes of `stack` and then those named."""
    assert role not in ("matrix", "kernel") or len(own_axes(axes)) > 1, f"{axes}: what has one dimension is no {role}"
    value = jnp.asarray(value, jnp.float32)  # whatever JAX_ENABLE_X64 says
    return nnx.Param(value, axes=lead_axes(stack) + axes, role=role, group=group, rate=1.0)


def _narrow(value: jax.Array) -> jax.Array:
    """`value` in 32 bits, whatever JAX_ENABLE_X64 says."""
    if jnp.issubdtype(value.dtype, jnp.floating):
        return value.astype(jnp.float32)
    return value.astype(jnp.int32) if jnp.issubdtype(value.dtype, jnp.integer) else value


def normal_param(
    key: jax.Array,
    shape: tuple[int, ...],
    axes: Axes,
    std: float,
    stack: tuple[int, ...] = (),
    *,
    role: Role = "matrix",
    group: str = "main",
) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2), `stack` leading layer axes included."""
    value = std * jax.random.normal(key, (*stack, *shape), jnp.float32)
    return param(value, axes, stack=stack, role=role, group=group)


def is_variable(leaf: Any) -> bool:
    """Whether a leaf of a state is a variable, whose metadata a map over the state is to see."""
    return isinstance(leaf, nnx.Variable)


def passes_of(value: nnx.Variable) -> bool:
    """Whether a variable of a recursion's shared block has a leading axis for its passes."""
    axes: Axes = value.get_metadata().get("axes") or ()
    return bool(axes) and axes[0] == "uses"


def name_layers(module: nnx.Module, name: str) -> None:
    """Gives the axis "layers" of every parameter and buffer below `module` another name."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable) and (axes := node.get_metadata().get("axes")):
            node.set_metadata(axes=tuple(name if axis == "layers" else axis for axis in axes))


def scale_rates(module: nnx.Module, by: float) -> None:
    """Multiplies the learning rate's multiple of every parameter below `module`."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            node.set_metadata(rate=node.get_metadata()["rate"] * by)
