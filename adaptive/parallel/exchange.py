"""Collectives over an axis of the mesh, the experts' if no other is named, for code inside `sharded`. With one device
on the axis they do nothing."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adaptive.parallel.pairs import before, segments
from adaptive.parallel.rules import active_placement, split

EXPERT = "expert"


@dataclasses.dataclass(frozen=True)
class Communicator:
    """size    devices on the axis
    nodes   that they are on, devices of a node being neighbours; above 1, an all-to-all goes within nodes, then between
    batch   mesh axes that split the batch's tokens
    hidden  mesh axes besides `axis` that split the experts' hidden units, and the number of parts
    axis    of the mesh, or several as one
    """

    size: int = 1
    nodes: int = 1
    batch: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    hidden_parts: int = 1
    axis: str | tuple[str, ...] = EXPERT

    def index(self) -> jax.Array | int:
        """This device's number on the axis."""
        return lax.axis_index(self.axis) if self.size > 1 else 0

    def gather(self, x: jax.Array) -> jax.Array:
        """[n, ...] of each device -> [size * n, ...], all of them."""
        return lax.all_gather(x, self.axis, tiled=True) if self.size > 1 else x

    def scatter_sum(self, x: jax.Array) -> jax.Array:
        """[size * n, ...] -> this device's [n, ...] of the sum over devices."""
        return lax.psum_scatter(x, self.axis, tiled=True) if self.size > 1 else x

    def all_to_all(self, x: jax.Array) -> jax.Array:
        """[size, ...], a part for each device -> [size, ...], the part that each device had for this one."""
        if self.size == 1:
            return x
        if self.nodes == 1:
            return lax.all_to_all(x, self.axis, 0, 0, tiled=True)
        nodes, local = self.nodes, self.size // self.nodes
        within = [[node * local + i for i in range(local)] for node in range(nodes)]
        between = [[node * local + i for node in range(nodes)] for i in range(local)]
        grid = x.reshape(nodes, local, *x.shape[1:])
        grid = lax.all_to_all(grid, self.axis, 1, 1, tiled=True, axis_index_groups=within)
        grid = lax.all_to_all(grid, self.axis, 0, 0, tiled=True, axis_index_groups=between)
        return grid.reshape(x.shape)

    def sum_hidden(self, x: jax.Array) -> jax.Array:
        """The sum over the parts of the experts' hidden units, on each of their devices."""
        return _sum_equal(x, self.hidden, self.hidden_parts) if self.hidden_parts > 1 else x

    def sum_batch(self, x: jax.Array) -> jax.Array:
        """The sum over all parts of the batch."""
        return lax.psum(x, self.batch) if self.batch else x


def communicator() -> Communicator:
    """Of the active placement; one device without one."""
    current = active_placement()
    if current is None or current.mesh.size == 1:
        return Communicator()
    mesh, rules, experts = current.mesh, current.rules, current.experts
    hidden = tuple(axis for axis in rules.expert_ff if axis not in experts.axes)
    nodes = experts.nodes if experts.exchange == "hierarchical" else 1
    named = lambda axes: tuple(axis for axis in axes if mesh.shape[axis] > 1)  # noqa: E731 - those that `sharded` names
    tokens, over = named((*rules.batch, *rules.expert_seq)), named(experts.axes)
    axis = over[0] if len(over) == 1 else over or EXPERT
    return Communicator(split(mesh, over), nodes, tokens, hidden, split(mesh, hidden), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sum_equal(x: jax.Array, axes: tuple[str, ...], parts: int) -> jax.Array:
    return lax.psum(x, axes)


# The sum's cotangent is equal on all devices, each holding 1 / parts of it: summing it needs no communication.
_sum_equal.defvjp(lambda x, axes, parts: (lax.psum(x, axes), None), lambda axes, parts, _, g: (g * parts,))


# Ragged exchange


class Route(NamedTuple):
    """One direction of a ragged exchange as one device sees it, each i32[devices].

    start, size    rows of its operand for each device: first and number
    put            where they begin in that device's output
    arrive, come   rows of its output from each device: first and number
    """

    start: jax.Array
    size: jax.Array
    put: jax.Array
    arrive: jax.Array
    come: jax.Array


def routes(wanted: jax.Array, sent: jax.Array, me: jax.Array | int) -> tuple[Route, Route]:
    """The ways to the experts and back of device `me`.

    wanted, sent  i32[devices, devices]: rows that the first has for the second, and how many of them, from the start,
                  find room (MaxText, truncated buffers). Received rows are dense; returned ones keep their first place
    """
    own = before(wanted, 1)
    room = before(sent, 0)
    there = Route(own[me], sent[me], room[me], room[:, me], sent[:, me])
    back = Route(room[:, me], sent[:, me], own[:, me], own[me], sent[me])
    return there, back


def truncated(wanted: jax.Array, room: int) -> jax.Array:
    """Of i32[devices, ...] rows that come from each device in turn, those that fit into `room` rows in all."""
    total = jnp.minimum(jnp.cumsum(wanted, 0, dtype=jnp.int32), room)
    return jnp.diff(total, axis=0, prepend=jnp.zeros_like(total[:1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def ragged_all_to_all(
    rows: jax.Array, way: Route, back: Route, operand_rows: int, output_rows: int, most: int, comm: Communicator
) -> jax.Array:
    """[operand_rows, D] -> [output_rows, D]: sends each device its rows. Output that nothing comes to is 0.

    back  the opposite way, which gradients take
    most  bound on the rows between any two devices
    """
    ragged = functools.partial(_ragged, output_rows=output_rows, comm=comm)
    padded = functools.partial(_padded, output_rows=output_rows, most=most, comm=comm)
    # XLA has no ragged all-to-all on CPU.
    return lax.platform_dependent(rows, way, tpu=ragged, cuda=ragged, default=padded)


def _fwd(rows, way, back, operand_rows, output_rows, most, comm):
    return ragged_all_to_all(rows, way, back, operand_rows, output_rows, most, comm), (way, back)


def _bwd(operand_rows, output_rows, most, comm, kept, g):
    way, back = kept
    return ragged_all_to_all(g, back, way, output_rows, operand_rows, most, comm), None, None


ragged_all_to_all.defvjp(_fwd, _bwd)


def _ragged(rows: jax.Array, way: Route, output_rows: int, comm: Communicator) -> jax.Array:
    output = jnp.zeros((output_rows, *rows.shape[1:]), rows.dtype)
    return lax.ragged_all_to_all(rows, output, way.start, way.size, way.put, way.come, axis_name=comm.axis)


def _padded(rows: jax.Array, way: Route, output_rows: int, most: int, comm: Communicator) -> jax.Array:
    """The same by an all-to-all of `most` rows for each device."""
    number = jnp.arange(most, dtype=jnp.int32)
    index = jnp.where(number < way.size[:, None], way.start[:, None] + number, rows.shape[0])
    received = comm.all_to_all(rows.at[index].get(mode="fill", fill_value=0)).reshape(-1, *rows.shape[1:])
    position = jnp.arange(output_rows, dtype=jnp.int32)
    source = jnp.searchsorted(way.arrive, position, side="right") - 1
    number = position - way.arrive[source]
    index = jnp.where(number < way.come[source], source * most + number, received.shape[0])
    return received.at[index].get(mode="fill", fill_value=0)


def by_expert(come: jax.Array, room: int) -> tuple[jax.Array, jax.Array]:
    """(index, inverse), both i32[room]: between the order of arrival (source, expert) and (expert, source).

    come  i32[sources, experts] rows
    """
    arrived, sorted_ = before(come.reshape(-1)).reshape(come.shape), before(come.T.reshape(-1)).reshape(come.T.shape)
    index = segments(arrived.T.reshape(-1), come.T.reshape(-1), room, room)
    inverse = segments(sorted_.T.reshape(-1), come.reshape(-1), room, room)
    return index, inverse
