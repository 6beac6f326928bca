"""GGUF files of llama.cpp: what they say of a model, and their tensors, multiplied out where they are quantised.

Facts: gguf/constants.py and ggml-quants.c of llama.cpp. A file is a magic number, a version, counts, typed values by
name, a table of tensors, and their bytes. Quantised tensors are runs of blocks (gguf_types.py). Whatever the file
claims is compared with its size before memory is taken for it.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptive.errors import CheckpointError
from adaptive.interop.gguf_types import BLOCKS, NAMES, PLAIN
from adaptive.interop.stored import Stored

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Of values: struct format; 8 is text, 9 a list.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_MOST_DIMENSIONS = 8


class Gguf(NamedTuple):
    """A file's values by name, and its tensors f32 (or as they stand) by name, row-major, outermost dimension first."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Stored]


def read_gguf(path: Path) -> Gguf:
    """Raises CheckpointError for a file that is damaged, of another version, claims more than it holds, or has tensors
    of a type that is not read here."""
    try:
        with path.open("rb") as file:
            reader = _Reader(file, path.stat().st_size)
            return _read(path, reader)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, struct.error, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no GGUF file: {error}") from None


class _Reader:
    """Takes values off a file and never more than are left."""

    def __init__(self, file: Any, size: int):
        self._file, self.size = file, size

    @property
    def place(self) -> int:
        return int(self._file.tell())

    def take(self, count: int) -> bytes:
        if count > self.size - self.place:
            raise ValueError(f"it claims {count:,} bytes at {self.place:,} and has {self.size:,} in all")
        return bytes(self._file.read(count))

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="surrogateescape")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _LIST or depth > 2:
            raise ValueError(f"it has a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            form = _SCALARS[inner]
            raw = self.take(count * struct.calcsize(f"<{form}"))
            return list(struct.unpack(f"<{count}{form}", raw))
        if count * 8 > self.size - self.place:
            raise ValueError(f"it claims a list of {count:,} and has {self.size:,} bytes in all")
        return [self.value(inner, depth + 1) for _ in range(count)]


def _read(path: Path, reader: _Reader) -> Gguf:
    if reader.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"it is of version {version}, known: {', '.join(map(str, _VERSIONS))}")
    tensors, values = reader.number("Q"), reader.number("Q")
    if (tensors + values) * 12 > reader.size:
        raise ValueError(f"it claims {tensors:,} tensors and {values:,} values in {reader.size:,} bytes")
    found: dict[str, Any] = {}
    for _ in range(values):
        name = reader.text()
        found[name] = reader.value(reader.number("I"))
    table = [_entry(reader) for _ in range(tensors)]
    aligned = int(found.get("general.alignment", 32)) or 32
    start = -(-reader.place // aligned) * aligned
    stored: dict[str, Stored] = {}
    for name, shape, kind, offset in table:
        if name in stored:
            raise ValueError(f"it has two tensors {name}")
        stored[name] = _stored(path, name, shape, kind, start + offset, reader.size)
    return Gguf(found, stored)


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape with the outermost dimension first, type, offset) of a tensor."""
    name, dimensions = reader.text(), reader.number("I")
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
    return name, shape, reader.number("I"), reader.number("Q")


def _stored(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, size: int) -> Stored:
    if kind in PLAIN:
        dtype = np.dtype(PLAIN[kind])
        needed, found = dtype.itemsize * math.prod(shape), Stored(path, dtype, shape, offset)
    elif kind in BLOCKS:
        block = BLOCKS[kind]
        if len(shape) < 2:
            raise ValueError(f"{name} has {len(shape)} dimensions and is quantised")
        if shape[-1] % block.weights:
            raise ValueError(f"{name} has shape {list(shape)} and blocks of {block.weights}")
        row = math.prod(shape[1:]) // block.weights * block.size
        needed = shape[0] * row
        found = Stored(path, np.dtype(np.float32), shape, offset, block.decoded, row)
    else:
        known = ", ".join((*(NAMES[k] for k in PLAIN), *(NAMES[k] for k in BLOCKS)))
        raise CheckpointError(
            f"{path}: {name} is of type {NAMES.get(kind, kind)}, which is not read here; known: {known}"
        )
    if offset + needed > size:
        raise ValueError(f"{name} claims {needed:,} bytes from {offset:,} on, and the file has {size:,}")
    return found
