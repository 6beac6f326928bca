"""Which files hold a model's weights, where a folder or an index is given."""

import re
from pathlib import Path

from adaptive.errors import CheckpointError
from adaptive.settings import parse_json

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_FORMATS = ((".safetensors",), TORCH_SUFFIXES)  # of two that lie side by side the first is read
_INDEX = ".index.json"
_SHARD = re.compile(r"[-_.]?\d+([-_.]of[-_.]\d+)?$")  # what tells the files of one set apart
_FIRST = ("model", "pytorch_model")  # as Hugging Face names weights; a maker's own set may lie beside them
# What training scripts leave beside the weights, and adapters, which are no whole model.
_BESIDE = ("adapter_model", "optimizer", "scheduler", "scaler", "rng_state", "training_args")


def weight_files(path: Path) -> list[Path]:
    """The files that a file, an index of several or a folder stands for.

    Of a folder: model*.safetensors, or what its index names, then any other set of *.safetensors, then the same of
    PyTorch's files. Raises CheckpointError where there is none, or where there are several and none is called model.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        ending = _INDEX if path.suffix == ".json" else path.suffix
        near = [file.name for file in sorted(path.parent.glob("*")) if file.name.endswith(ending)][:3]
        hint = f"; there is {', '.join(near)}" if near else ""
        raise CheckpointError(f"no file {path}{hint}")
    return _indexed(path) if path.suffix == ".json" else [path]


def _in_folder(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    beside: list[str] = []
    for suffixes in _FORMATS:
        sets = _sets(files, suffixes)
        beside += [sets.pop(name)[0].name for name in _BESIDE if name in sets]
        first = next((name for name in (*_FIRST, *sets) if name in sets), "")
        if len(sets) > 1 and first not in _FIRST:
            shown = "; ".join(_described(own) for own in sets.values())
            raise CheckpointError(
                f"{folder} holds {len(sets)} sets of weights: {shown}. Give a file or an index of one of them, or a "
                "folder with one set alone"
            )
        if first:
            own = sets[first]
            return _indexed(own[0]) if own[0].suffix == ".json" else own
    if beside:
        raise CheckpointError(f"{folder} has no weights of a whole model, only {', '.join(beside)}")
    raise CheckpointError(f"{folder} has no *.safetensors, *.pt, *.pth or *.bin files")


def _sets(files: list[Path], suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    """The files of one format by the name of the set that they belong to, or that set's index alone."""
    sets: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix in suffixes:
            sets.setdefault(_SHARD.sub("", file.stem), []).append(file)
    for file in files:
        inside = Path(file.name.removesuffix(_INDEX))
        if file.name.endswith(_INDEX) and inside.suffix in suffixes:
            sets[inside.stem] = [file]
    return sets


def _described(files: list[Path]) -> str:
    return files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _indexed(index: Path) -> list[Path]:
    """The files of an index, weight_map: {tensor: file}."""
    try:
        names = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not a checkpoint index: it has no weight_map") from None
    for name in map(str, names):
        if Path(name).is_absolute() or ".." in Path(name).parts or not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is not beside it")
    return [index.parent / name for name in names]
