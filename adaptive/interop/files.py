"""Tensors from other people's checkpoint files, and safetensors files back.

A PyTorch file is a zip archive with a pickle that may, by its format, run any code. Without `allow_pickle` only what a
dict of tensors is made of is understood, and nothing else is ever called; torch need not be installed. What is read:

    *.safetensors             the safetensors package (pip install 'adaptive[hf]')
    *.pt, *.pth, *.bin, ...   an archive that torch.save of version 1.6 or later wrote
    *.index.json, or a folder with one, or with files of one of these kinds: all of the tensors of several files
"""

import collections
import io
import json
import pickle
import types
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from adaptive.errors import CheckpointError

_STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
# Types of tensors, and what settings that a training script hung on its tensors are made of: no code of theirs is run,
# they are read as nothing. The release's own script expects OmegaConf's lists in its checkpoints.
_NOTHING_IN = ("omegaconf", "typing")
_NOTHING = {
    "torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "collections.defaultdict",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "long", "object", "set", "str", "tuple")),
}  # fmt: skip
_WRAPPERS = ("model", "state_dict")  # keys under which training scripts keep the tensors
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")


def read_tensors(path: str | Path, *, allow_pickle: bool = False) -> dict[str, np.ndarray]:
    """Every tensor in a checkpoint file, an index of several or a folder, by name, in its own dtype.

    allow_pickle  let torch read PyTorch files, which runs whatever code is in them: for files from a source you trust

    What lies under "model" or "state_dict" in a PyTorch file is taken out. Raises CheckpointError for what is missing,
    damaged, of another format, or holds anything else than a dict of tensors.
    """
    path = Path(path).expanduser()
    tensors: dict[str, np.ndarray] = {}
    for file in _files(path):
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
    path = Path(path).expanduser()
    library = _safetensors()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        library.save_file(arrays, path, metadata={"format": "pt"})
    except (OSError, library.SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


# Which files


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        indices = sorted(path.glob("*.index.json"))
        for found in (indices[:1], sorted(path.glob("*.safetensors"))):
            if found:
                return _indexed(found[0]) if found[0].suffix == ".json" else found
        found = sorted(file for file in path.iterdir() if file.suffix in _TORCH_SUFFIXES)
        if not found:
            raise CheckpointError(f"{path} has no *.safetensors, *.pt, *.pth or *.bin files")
        return found
    if not path.exists():
        near = [file.name for file in sorted(path.parent.glob("*")) if file.suffix == path.suffix][:3]
        hint = f"; there is {', '.join(near)}" if near else ""
        raise CheckpointError(f"no file {path}{hint}")
    return _indexed(path) if path.suffix == ".json" else [path]


def _indexed(index: Path) -> list[Path]:
    """The files of an index, weight_map: {tensor: file}."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not a checkpoint index: it has no weight_map") from None
    if missing := [name for name in names if not (index.parent / str(name)).is_file()]:
        raise CheckpointError(f"{index} names {missing[0]}, which is not beside it")
    return [index.parent / name for name in names]


def _read_file(path: Path, allow_pickle: bool) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the file itself: git lfs pull")
    if path.suffix == ".safetensors":
        library = _safetensors()
        try:
            return library.load_file(path)
        except library.SafetensorError as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None
    if allow_pickle:
        return _read_with_torch(path)
    if not start.startswith(b"PK"):
        raise CheckpointError(
            f"{path} is no archive as torch.save writes it, nor named *.safetensors. Files of torch before 1.6 can be "
            "read with --allow_pickle, by torch, which runs whatever code is in them"
        )
    return _read_torch_archive(path)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise CheckpointError("*.safetensors files need the package safetensors: pip install 'adaptive[hf]'") from None
    return types.SimpleNamespace(
        load_file=safetensors.numpy.load_file,
        save_file=safetensors.numpy.save_file,
        SafetensorError=safetensors.SafetensorError,
    )


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
        super().__init__(io.BytesIO(archive.read(name)))
        self._path, self._archive, self._folder = path, archive, name.rpartition("/")[0]
        order = f"{self._folder}/byteorder"
        big = order in archive.namelist() and archive.read(order).strip() == b"big"
        self._order = ">" if big else "<"
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, arguments, state: rebuild(*arguments),
        }
        if full in known:
            return known[full]
        if module == "torch" and name in _STORAGES:
            return _Storage(name)
        full = full.replace("__builtin__.", "builtins.", 1)
        if full in _NOTHING or module.partition(".")[0] in _NOTHING_IN:
            return _Nothing
        raise CheckpointError(
            f"{self._path} holds {full}, which no dict of tensors needs. If you trust where the file comes from, "
            "--allow_pickle reads it with torch, which runs whatever code is in it"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        """The storage [elements] that ("storage", type, key, device, elements) names."""
        _, kind, key, _, count = pid
        if key not in self._storages:
            dtype = np.dtype(_STORAGES[kind.name])
            raw = self._archive.read(f"{self._folder}/data/{key}")
            if len(raw) < count * dtype.itemsize:
                raise ValueError(f"tensor data {key} is cut off after {len(raw)} of {count * dtype.itemsize} bytes")
            values = np.frombuffer(raw, dtype, count=count)
            self._storages[key] = values.byteswap() if self._order == ">" else values
        return self._storages[key]


class _Storage:
    """Stands for a type of storage."""

    def __init__(self, name: str):
        self.name = name


class _Nothing:
    """Stands for an object of no interest; made from anything, holds nothing."""

    def __init__(self, *_: Any, **__: Any): ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, *_: Any) -> None: ...

    def append(self, _: Any) -> None: ...


def _tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    """The array of `shape` whose element [i, j, ...] is storage[offset + i strides[0] + j strides[1] + ...]."""
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    empty = 0 in shape
    if min((offset, *shape, *strides), default=0) < 0 or (not empty and last >= storage.size):
        raise ValueError(f"a tensor of shape {list(shape)} reaches beyond its data")
    steps = tuple(step * storage.itemsize for step in strides)
    view = np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)
    return np.ascontiguousarray(view).reshape(shape)


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
        return value.numpy()

    return _unwrapped(path, array(content))


def _unwrapped(path: Path, content: Any) -> dict[str, np.ndarray]:
    """The dict of tensors in what a file holds."""
    for _ in range(2):
        inside = (content.get(name) for name in _WRAPPERS) if isinstance(content, Mapping) else ()
        content = next((inner for inner in inside if isinstance(inner, Mapping)), content)
    tensors = dict(_arrays(content))
    if not tensors:
        keys = f"a dict of {', '.join(map(str, list(content)[:4]))}" if isinstance(content, Mapping) else (
            f"a {type(content).__name__}"
        )  # fmt: skip
        raise CheckpointError(
            f"{path} holds no tensors by name, but {keys}; expected a dict of tensors, at the top or under "
            f"{' or '.join(map(repr, _WRAPPERS))}"
        )
    return tensors


def _arrays(content: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(content, Mapping):
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, np.ndarray):
                yield name, value
