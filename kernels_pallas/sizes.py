"""Sizes of blocks by device: one table, `sizes.json`, which `python -m adaptive.bench tune` writes.

A form asks by a name of its own, and says what it takes where the table has nothing for the device.
"""

import contextlib
import contextvars
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from kernels_pallas.choice import active_target

TABLE = Path(__file__).with_name("sizes.json")  # kind of device -> name -> numbers
Sizes = tuple[int, ...]

_tried: contextvars.ContextVar[Mapping[str, Sizes] | None] = contextvars.ContextVar("tried", default=None)


def sizes(name: str, usual: Sizes) -> Sizes:
    """The numbers of this name for the device that a program is made for."""
    if name in (now := _tried.get() or {}):
        return now[name]
    target = active_target()
    return _table().get(target.device if target else "", {}).get(name, usual)


@contextlib.contextmanager
def tried(some: Mapping[str, Sizes]) -> Iterator[None]:
    """Within it these numbers hold, whatever the table says."""
    token = _tried.set({**(_tried.get() or {}), **some})
    try:
        yield
    finally:
        _tried.reset(token)


def write(device: str, found: Mapping[str, Sizes]) -> None:
    """Adds what was found for a kind of device to the table."""
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    table[device] = table.get(device, {}) | {name: list(numbers) for name, numbers in found.items()}
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _table.cache_clear()


@functools.cache
def _table() -> dict[str, dict[str, Sizes]]:
    if not TABLE.exists():
        return {}
    read = json.loads(TABLE.read_text(encoding="utf-8"))
    return {device: {name: tuple(numbers) for name, numbers in of.items()} for device, of in read.items()}
