"""A step that is computed twice must give the same bits: devices that now and then compute wrongly are found."""

import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.errors import CorruptionError
from adaptive.runs.digest import named, sums
from adaptive.runs.state import TrainState


class Taken(NamedTuple):
    """What a step gives."""

    state: TrainState
    metrics: Any


_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
_SHOWN = 4  # names in a message


def repeated(call: Callable[[TrainState, Any], tuple[TrainState, Any]], state: TrainState, batch: Any) -> Any:
    """What `call(state, batch)`, which may consume its state, gives, computed twice. Holds the state twice meanwhile.

    Raises CorruptionError, in every process, unless both are equal to the bit: with the arrays that differ and the
    processes that hold differing parts.
    """
    kept = _copied(state)
    first = Taken(*call(state, batch))
    second = Taken(*call(kept, batch))
    before, after = sums(first), sums(second)
    differ = [name for name in before if before[name] != after[name]]
    if differ:
        raise CorruptionError(_message(int(first.state.step), differ, first, second))
    return tuple(second)


def _message(step: int, differ: list[str], first: Any, second: Any) -> str:
    more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    return (
        f"step {step} was computed twice from the same state and gave different numbers in "
        f"{', '.join(differ[:_SHOWN])}{more}, on {_where(differ, first, second)}. A device computes wrongly, or the "
        "program is not deterministic (on GPUs: XLA_FLAGS=--xla_gpu_deterministic_ops=true). This step was not saved"
    )


def _where(differ: list[str], first: Any, second: Any) -> str:
    """The processes that hold parts that differ; behind a sum over all devices that is every process."""
    one, other = named(first), named(second)
    mine = any(
        np.asarray(a.data).tobytes() != np.asarray(b.data).tobytes()
        for name in differ
        for a, b in zip(one[name].addressable_shards, other[name].addressable_shards, strict=True)
    )
    if jax.process_count() == 1:
        return socket.gethostname()
    from jax.experimental import multihost_utils

    found = np.flatnonzero(multihost_utils.process_allgather(np.array(mine)))
    return f"process {', '.join(map(str, found))} of {jax.process_count()}"
