"""Where a model of other people comes from: a folder as Hugging Face's hub has it, or a GGUF file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adaptive.errors import CheckpointError
from adaptive.interop import gguf, gguf_model, gguf_tokenizer
from adaptive.interop.families import kind_of
from adaptive.interop.files import lazy_tensors
from adaptive.settings import parse_json

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Source(NamedTuple):
    """kind, configuration and tensors (those of safetensors and GGUF files stay there until they are needed);
    tokenizer: text of each file of it, by the file's name, {} where there is none."""

    name: str
    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Any]
    tokenizer: Mapping[str, str]

    def write_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer's files. Raises CheckpointError where that cannot be."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in self.tokenizer.items():
                (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from None


def source(path: Path, kind: str = "", *, allow_pickle: bool = False) -> Source:
    """What lies at `path`; kind "": as its configuration says. Raises CheckpointError and RecipeError."""
    if path.is_file() and path.suffix == ".gguf":
        read = gguf.read_gguf(path)
        named = gguf_model.named(read, str(path))
        files = gguf_tokenizer.tokenizer_files(read.values, str(path))
        texts = {} if files is None else dict(zip(_TOKENIZER, map(json.dumps, files), strict=False))
        return Source(path.stem, kind or named.kind, named.config, named.tensors, texts)
    if not path.is_dir():
        raise CheckpointError(f"--from {path}: expected a folder with a config.json, or a *.gguf file")
    config = read_config(path / "config.json", "--from")
    kind = kind or kind_of(config)
    texts = {name: _text(path / name) for name in _TOKENIZER if (path / name).is_file()}
    texts = texts if "tokenizer.json" in texts else {}
    return Source(path.resolve().name, kind, config, lazy_tensors(path, allow_pickle=allow_pickle), texts)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def read_config(path: Path, option: str = "--config") -> dict[str, Any]:
    """A configuration in JSON. Raises CheckpointError, which begins with the option, for what cannot be read as one."""
    try:
        config = parse_json(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {option} {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{option} {path} is not JSON that can be used: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{option} {path} must be a JSON object of settings, not a {type(config).__name__}")
    return config
