"""Which schedule attention over a sharded sequence takes: arithmetic of bytes, from shapes alone."""

from typing import Literal, NamedTuple

Schedule = Literal["ring", "both_ways", "token_ring", "gather", "halo"]
SMALL = 2**25  # bytes of a layer's keys and values of whole rows up to which every device may have all of them


class Shapes(NamedTuple):
    """Of one device's attention: rows, queries and keys of its shard, heads, channels of a head, bytes of a number."""

    rows: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int


def sent(schedule: Schedule, shapes: Shapes, parts: int) -> float:
    """Bytes that a device sends in one layer's forward and backward pass, both directions of its links together.

    Rings send keys and values on at each step but the last, and again backwards, with float32 gradients at every step.
    TokenRing sends queries, results and log-sum-exps forwards; backwards queries, cotangents and two sums of each row,
    and float32 gradients home; of causal attention three quarters of all that.
    """
    rows, queries, keys, heads, kv_heads, dim, size = shapes
    kv, q = 2 * rows * keys * kv_heads * dim, rows * queries * heads * dim
    sums = 4 * rows * queries * heads
    if schedule in ("ring", "both_ways"):
        return 2 * (parts - 1) * kv * size + parts * kv * 4
    if schedule == "token_ring":
        return 0.75 * (parts - 1) * (2 * q * size + sums + 2 * q * size + 2 * sums + 4 * q)
    return (parts - 1) * kv * (size + 4)


def chosen(
    wanted: str, shapes: Shapes, parts: int, *, nodes: int, reach: int | None, causal: bool, platform: str
) -> Schedule:
    """The schedule of a layer; `wanted` where that can be, unless it is "auto".

    reach  positions before its own that a query sees; None: all
    """
    if causal and reach is not None and 2 * reach < (parts - 1) * shapes.keys:
        return "halo"
    if wanted == "both_ways" or (wanted == "auto" and platform == "tpu"):
        most: Schedule = "both_ways" if shapes.kv_heads > 1 and parts > 2 else "ring"
    else:
        most = "token_ring" if wanted == "token_ring" else "gather" if wanted == "gather" else "ring"
    if wanted != "auto":
        return most
    whole = 2 * shapes.rows * shapes.keys * parts * shapes.kv_heads * shapes.head_dim * shapes.itemsize
    if whole <= SMALL:
        return "gather"
    switched = platform == "gpu" and nodes == 1 and causal  # every device has a way to every other
    if switched and sent("token_ring", shapes, parts) < sent("ring", shapes, parts):
        return "token_ring"
    return most
