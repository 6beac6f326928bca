"""What tells whether a checkpoint is as it was saved: names of arrays, their digest, a checksum of all beside them."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FEW = 2**24  # elements of a state in this machine's memory, which numpy hashes sooner than a program is compiled
_AT_ONCE = 2**15  # elements, which stay in a cache of the processor
_WRAPPERS = ("inner_states", "inner_state")  # fields of optax that wrap the states of a chain and tell nothing


def digest(tree: Any) -> str:
    """16 hexadecimal digits that tell whether two trees hold the same arrays under the same names, bit for bit.

    Each array is hashed where it lies, every element's bits mixed with its position, and summed modulo 2^32: the result
    depends neither on the sharding nor on the order of the sum. For comparing runs and finding damage; it is no
    cryptographic hash.
    """
    found = sums(tree)
    rows = [f"{name} {a.dtype.name} {a.shape} {found[name]}" for name, a in named(tree).items()]
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16]


def sums(tree: Any) -> dict[str, int]:
    """Of every array by its name, what its bits and their places sum to, modulo 2^32; see `digest`."""
    arrays = named(tree)
    seeds = np.array([zlib.crc32(name.encode()) for name in arrays], np.uint32)
    leaves = list(arrays.values())
    totals = _sums_here(leaves, seeds) if _here(leaves) else jax.device_get(_sums(leaves, seeds))
    return {name: int(total) for name, total in zip(arrays, totals, strict=True)}


def _here(leaves: list[Any]) -> bool:
    """Whether all are arrays in this machine's memory, and few."""
    return sum(a.size for a in leaves) <= FEW and all(
        isinstance(a, jax.Array) and a.is_fully_addressable and all(d.platform == "cpu" for d in a.devices())
        for a in leaves
    )


def _sums_here(arrays: list[jax.Array], seeds: np.ndarray) -> list[int]:
    """The same as `_sums`, by numpy: nothing is compiled."""
    return [_hashed_here(np.asarray(a), seed) for a, seed in zip(arrays, seeds, strict=True)]


def _hashed_here(a: np.ndarray, seed: np.uint32) -> int:
    bits = np.ascontiguousarray(a).reshape(-1).view(f"uint{min(32, a.dtype.itemsize * 8)}")
    total = 0
    for begin in range(0, bits.size, _AT_ONCE):
        part = bits[begin : begin + _AT_ONCE].astype(np.uint32)
        position = np.arange(begin, begin + part.size, dtype=np.uint32) + seed
        total += int(_mixed(part ^ _mixed(position)).sum(dtype=np.uint32))
    return total % 2**32


@jax.jit
def _sums(arrays: list[jax.Array], seeds: jax.Array) -> jax.Array:
    """u32[len(arrays)]. One program: many small ones with collectives could starve each other of threads."""
    return jnp.stack([_hashed(a, seed) for a, seed in zip(arrays, seeds, strict=True)])


def _hashed(a: jax.Array, seed: jax.Array) -> jax.Array:
    """u32[]; the mixing is the finalizer of MurmurHash3, applied to bits and position together."""
    a = jnp.asarray(a)
    if a.dtype == jnp.bool_:
        a = a.astype(jnp.uint8)
    width = min(32, a.dtype.itemsize * 8)
    bits = jax.lax.bitcast_convert_type(a, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    position = jnp.full(bits.shape, seed, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):  # no reshape: it would gather a sharded array
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position += index * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return _mixed(bits ^ _mixed(position)).sum(dtype=jnp.uint32)


def _mixed(x: Any) -> Any:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def checksum(about: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of what JSON holds of `about`, its own checksum left out."""
    rest = json.loads(json.dumps({name: value for name, value in about.items() if name != "checksum"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def named(tree: Any) -> dict[str, Any]:
    """The leaves under names such as params/block/attention/q, opt/main/1/mu/embedding, step."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = {_name(path): leaf for path, leaf in leaves}
    assert len(found) == len(leaves), "two arrays of the state would get the same name in a checkpoint"
    return found


def _name(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    if parts and isinstance(path[-1], jax.tree_util.GetAttrKey) and parts[-1] == "value":
        parts.pop()  # an nnx.Variable around the array
    return "/".join(part for part in parts if part not in _WRAPPERS)
