"""Tensors from other people's checkpoint files, and safetensors files back.

A PyTorch file is a zip archive with a pickle that may, by its format, run any code. Without `allow_pickle` only what a
dict of tensors is made of is understood, and nothing else is ever called; torch need not be installed. What is read:

    *.safetensors             as adaptive.interop.stored has it
    *.pt, *.pth, *.bin, ...   an archive that torch.save of version 1.6 or later wrote
    *.index.json, or a folder: all of the tensors of several files (see adaptive.interop.folder)

Nothing is read that a file could not hold: what it claims is compared with its size first.
"""

import collections
import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from adaptive.errors import CheckpointError
from adaptive.interop.dtypes import not_a_weight
from adaptive.interop.folder import weight_files
from adaptive.interop.stored import stored_tensors, write_tensors
from adaptive.paths import local_path

_STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
# Types of tensors, and what settings that a training script hung on its tensors are made of: no code of theirs is run,
# they are read as nothing. The release's own script expects OmegaConf's lists in its checkpoints.
_NOTHING_IN = ("omegaconf", "typing")
_NOTHING = {
    "torch.per_tensor_affine", "torch.per_channel_affine", "torch.Tensor", "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter", "collections.defaultdict",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "long", "object", "set", "str", "tuple")),
}  # fmt: skip
_WRAPPERS = ("model", "state_dict")  # keys under which training scripts keep the tensors
_TORCH_DTYPES = re.compile(r"(q?u?int|float|bfloat|complex|bits)\d\w*")


class _Unread(NamedTuple):
    """Stands for a tensor that numpy has no numbers for."""

    dtype: str


def read_tensors(path: str | Path, *, allow_pickle: bool = False) -> dict[str, np.ndarray]:
    """Every tensor in a checkpoint file, an index of several or a folder, by name, in its own dtype.

    allow_pickle  let torch read PyTorch files, which runs whatever code is in them: for files from a source you trust

    What lies under "model" or "state_dict" in a PyTorch file is taken out. Arrays may be views of one another and not
    writeable. Raises CheckpointError for what is missing, damaged, of another format, claims more than it can hold, is
    of no dtype that numpy has, or holds anything else than a dict of tensors, UserError for what is no path.
    """
    return {name: np.asarray(value) for name, value in lazy_tensors(path, allow_pickle=allow_pickle).items()}


def lazy_tensors(path: str | Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """As `read_tensors`, but tensors of safetensors files stay there until numpy needs them (`Stored`)."""
    path = local_path(str(path), "tensors")
    tensors: dict[str, Any] = {}
    for file in weight_files(path):
        try:
            found = _read_file(file, allow_pickle)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
        if twice := next((name for name in found if name in tensors), None):
            raise CheckpointError(f"{path}: {twice} is in two of its files, the second is {file.name}")
        tensors |= found
    return tensors


def write_safetensors(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Writes `tensors` (name -> array) to one safetensors file. Raises CheckpointError where that cannot be."""
    path = local_path(str(path), "tensors")
    shapes = {name: (np.dtype(value.dtype), tuple(value.shape)) for name, value in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors.items(), shapes)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None


# One file


def _read_file(path: Path, allow_pickle: bool) -> Mapping[str, Any]:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the file itself: git lfs pull")
    if path.suffix == ".safetensors":
        return stored_tensors(path)
    if allow_pickle:
        return _read_with_torch(path)
    if not start.startswith(b"PK"):
        raise CheckpointError(
            f"{path} is no archive as torch.save writes it, nor named *.safetensors. Files of torch before 1.6 can be "
            "read with --allow_pickle, by torch, which runs whatever code is in them"
        )
    return _read_torch_archive(path)


# PyTorch's archives


def _read_torch_archive(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote: no data.pkl in it")
            content = _Reader(path, archive, pickles[0]).load()
    except CheckpointError:
        raise
    except OSError:
        raise
    except Exception as error:  # damaged bytes show as errors of many kinds
        raise CheckpointError(f"{path} is damaged: {error or type(error).__name__}") from None
    return _unwrapped(path, content)


class _Reader(pickle.Unpickler):
    """Builds what a dict of tensors is made of and calls nothing else."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, name: str):
        self._path, self._archive, self._folder = path, archive, name.rpartition("/")[0]
        self._left = path.stat().st_size
        content = self._read(name)
        super().__init__(io.BytesIO(content))
        for operation, argument, _ in pickletools.genops(content):
            if operation.name == "LONG_BINPUT" and int(argument or 0) > len(
                content
            ):  # memory is taken for as many objects
                raise ValueError(f"it numbers an object {argument}, more than it can hold")
        order = f"{self._folder}/byteorder"
        self._big = order in archive.namelist() and self._read(order).strip() == b"big"
        self._storages: dict[str, np.ndarray] = {}

    def _read(self, name: str) -> bytes:
        """An entry. torch.save does not compress, so that all of them together are no larger than the file."""
        self._left -= self._archive.getinfo(name).file_size
        if self._left < 0:
            raise CheckpointError(
                f"{self._path} claims to hold more than its {self._path.stat().st_size:,} bytes: it is compressed, "
                "which torch.save does not do, or made up"
            )
        return self._archive.read(name)

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_tensor_v3": lambda *about: _Unread(about[6].name),
            "torch._utils._rebuild_qtensor": lambda storage, *_: storage,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, arguments, state: rebuild(*arguments),
        }
        if full in known:
            return known[full]
        if module in ("torch", "torch.storage") and (name.endswith("Storage") or _TORCH_DTYPES.fullmatch(name)):
            return _Kind(name)
        full = full.replace("__builtin__.", "builtins.", 1)
        if full in _NOTHING or module.partition(".")[0] in _NOTHING_IN:
            return _Nothing
        raise CheckpointError(
            f"{self._path} holds {full}, which no dict of tensors needs. If you trust where the file comes from, "
            "--allow_pickle reads it with torch, which runs whatever code is in it"
        )

    def persistent_load(self, pid: Any) -> np.ndarray | _Unread:
        """The storage [elements] that ("storage", type, key, device, elements) names."""
        _, kind, key, _, count = pid
        if kind.name not in _STORAGES:
            return _Unread(kind.name.removesuffix("Storage"))
        if key not in self._storages:
            dtype = np.dtype(_STORAGES[kind.name])
            raw = self._read(f"{self._folder}/data/{key}")
            if len(raw) < count * dtype.itemsize:
                raise ValueError(f"tensor data {key} is cut off after {len(raw)} of {count * dtype.itemsize} bytes")
            values = np.frombuffer(raw, dtype, count=count)
            self._storages[key] = values.byteswap() if self._big else values
        return self._storages[key]


class _Kind:
    """Stands for a type of storage, or a dtype."""

    def __init__(self, name: str):
        self.name = name


class _Nothing:
    """Stands for an object of no interest; made from anything, holds nothing."""

    def __init__(self, *_: Any, **__: Any): ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, *_: Any) -> None: ...

    def append(self, _: Any) -> None: ...


def _tensor(storage: Any, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray | _Unread:
    """The array of `shape` whose element [i, j, ...] is storage[offset + i strides[0] + j strides[1] + ...]."""
    if isinstance(storage, _Unread):
        return storage
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    empty = 0 in shape
    if min((offset, *shape, *strides), default=0) < 0 or (not empty and last >= storage.size):
        raise ValueError(f"a tensor of shape {list(shape)} reaches beyond its data")
    if math.prod(shape) > storage.size:
        raise ValueError(f"a tensor of shape {list(shape)} has more numbers than its data, {storage.size}")
    steps = tuple(step * storage.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def _read_with_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"--allow_pickle reads {path} with torch, which is not installed: pip install torch, or leave it out"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(f"torch cannot read {path}: {error}") from None

    def array(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return {key: array(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
        value = value.detach().contiguous()
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        try:
            return value.numpy()
        except (TypeError, RuntimeError):
            return _Unread(str(value.dtype).removeprefix("torch."))

    return _unwrapped(path, array(content))


def _unwrapped(path: Path, content: Any) -> dict[str, np.ndarray]:
    """The dict of tensors in what a file holds."""
    for _ in range(2):
        inside = (content.get(name) for name in _WRAPPERS) if isinstance(content, Mapping) else ()
        content = next((inner for inner in inside if isinstance(inner, Mapping)), content)
    tensors = dict(_arrays(path, content))
    if not tensors:
        keys = f"a dict of {', '.join(map(_shown, list(content)[:4]))}" if isinstance(content, Mapping) else (
            f"a {type(content).__name__}"
        )  # fmt: skip
        raise CheckpointError(
            f"{path} holds no tensors by name, but {keys}; expected a dict of tensors, at the top or under "
            f"{' or '.join(map(repr, _WRAPPERS))}"
        )
    return tensors


def _shown(key: Any) -> str:
    return key if isinstance(key, str) else type(key).__name__


def _arrays(path: Path, content: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(content, Mapping):
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, _Unread):
                raise CheckpointError(f"{path}: {not_a_weight(name, value.dtype)}")
            if isinstance(name, str) and isinstance(value, np.ndarray):
                yield name, value
