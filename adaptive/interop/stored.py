"""Safetensors files: tensors that are read when they are needed, and files written tensor by tensor.

A file is 8 bytes of the header's length, that header as JSON {name: {dtype, shape, data_offsets}}, and the numbers. No
package is needed. What a header claims is compared with the file's size before anything else is read.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from adaptive.errors import CheckpointError
from adaptive.interop.dtypes import not_a_weight
from adaptive.settings import parse_json

DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "U64": np.uint64, "I32": np.int32, "U32": np.uint32, "I16": np.int16, "U16": np.uint16, "I8": np.int8,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_ALIGNED = 8
LONGEST_HEADER = 100_000_000  # bytes, as the format's own library allows


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array that lies in a file from byte `offset` on, in row-major order; numpy reads it where it needs it.

    decoded  makes the numbers of (the bytes of some rows, their shape), where they are packed; None: they are as they
             stand. row_bytes: of one row of a packed array
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    decoded: Callable[[bytes, tuple[int, ...]], np.ndarray] | None = None
    row_bytes: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                if self.decoded is not None:
                    value = self.decoded(file.read(self._row * self.shape[0]), self.shape)
                else:
                    value = np.fromfile(file, self.dtype, self.size).reshape(self.shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {self.path}: {getattr(error, 'strerror', None) or error}") from None
        return value if dtype is None else value.astype(dtype, copy=False)

    def __getitem__(self, place: Any) -> "Stored":
        """Some of the leading rows: a number, a slice without steps, or several of these, one after another."""
        if place is Ellipsis or place == ():
            return self
        first, *rest = place if isinstance(place, tuple) else (place,)
        if isinstance(first, slice):
            start, stop, _ = first.indices(self.shape[0])
            part = dataclasses.replace(
                self, shape=(max(0, stop - start), *self.shape[1:]), offset=self.offset + start * self._row
            )
            assert not rest, "rows of rows are not contiguous"
            return part
        assert 0 <= first < self.shape[0] and self.ndim > 1
        part = dataclasses.replace(self, shape=self.shape[1:], offset=self.offset + first * self._row)
        return part[tuple(rest)]

    @property
    def _row(self) -> int:
        return self.row_bytes or self.dtype.itemsize * math.prod(self.shape[1:])


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. Raises CheckpointError for a header that is damaged, claims more than
    the file holds, or has numbers that numpy has not."""
    try:
        start, header = _header(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error or type(error).__name__}") from None
    size, found = path.stat().st_size, {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path} is damaged or no safetensors file: of {name} it says {about!r}") from None
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {not_a_weight(name, str(dtype))}")
        kind = np.dtype(DTYPES[dtype])
        if not whole or end - begin != kind.itemsize * math.prod(shape) or start + end > size:
            raise CheckpointError(
                f"{path} is damaged or no safetensors file: {name} claims {dtype}{list(shape)} in bytes {begin} to "
                f"{end} of the {size - start:,} that follow the header"
            )
        found[name] = Stored(path, kind, shape, start + begin)
    return found


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """(where the numbers begin, what the header says)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"it claims a header of {length:,} bytes and has {max(0, size - 8):,} in all")
        header = parse_json(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return 8 + length, header


def write_tensors(path: Path, tensors: Iterable[tuple[str, Any]], shapes: Mapping[str, tuple[np.dtype, tuple]]) -> None:
    """Writes a safetensors file; tensors: (name, array) in the order of `shapes`, which has dtype and shape of each, so
    that one of them exists at a time. Raises OSError where it cannot be written."""
    offset, header = 0, {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape) in shapes.items():
        end = offset + np.dtype(dtype).itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, end]}  # type: ignore[dict-item]
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, value), (wanted, (dtype, shape)) in zip(tensors, shapes.items(), strict=True):
            assert name == wanted and tuple(value.shape) == tuple(shape)
            np.ascontiguousarray(np.asarray(value).astype(dtype, copy=False)).tofile(file)
