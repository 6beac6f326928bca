"""What a run reads: plain data, importable without grain."""

import dataclasses
from typing import Literal

from adaptive.errors import RecipeError
from adaptive.paths import bucket_path, bucket_scheme, is_address, local_path
from adaptive.settings import ranged, show, since


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how they become rows of `seq_len` tokens.

    `paths` and `weights` name what `source` reads:
      embedded     names of corpora shipped with the package: english, python, chinese, dna
      files        files, folders or globs of .txt, .md, .jsonl, .ndjson and .json (also .gz, .bz2, .xz, .zst) and
                   .parquet
      tokens       token stores written by `python -m adaptive.data prepare`, or token files of nanoGPT, llm.c,
                   Megatron-LM and OLMo (.bin, .npy)
      huggingface  hub datasets, streamed: "repo" or "repo:config"; the first 4,096 documents are held out
      synthetic    tasks made from an index: uniform, copy, reverse, recall, chase, addition, brackets
      own          functions of the user's, as MODULE:FUNCTION, that give documents; read as a hub dataset is
    """

    source: Literal["embedded", "files", "tokens", "huggingface", "synthetic", "own"] = "embedded"
    paths: tuple[str, ...] = ("english",)
    # Proportion of rows drawn from each path; () mixes by size (streams equally).
    weights: tuple[float, ...] = ranged((), above=0)
    tokenizer: str = "bytes"  # bytes | hnet-bytes | bpe-4096 | path or hub name of a tokenizer.json
    # Token before each document and each prompt. "": as the tokenizer's files say; none: no token.
    bos: str | None = since("", before="")
    # Token after each document, where generation ends. "": as the tokenizer's files say, or the best-known name it has.
    eos: str = since("", before="")
    text_key: str = "text"  # field of jsonl and parquet rows
    prompt_key: str = since("", before="")  # field of jsonl rows whose text comes before and is not predicted; "": none
    token_dtype: Literal["uint8", "uint16", "uint32"] = "uint16"  # of headerless .bin files
    seq_len: int = ranged(256, least=2, most=2**31 - 1)
    shuffle: bool = True
    shuffle_seed: int = ranged(0, least=0)
    cross_document: bool = False  # True: attend and predict across document boundaries (as the MoR release trains)
    boundaries: Literal["none", "words"] = "none"  # where chunks of an H-Net begin: words as HAT splits them
    # Document i is validation when i % every == every - 1; 0: nothing is held out.
    validation_every: int = ranged(20, least=0)
    prefetch: int = ranged(4, least=1)  # batches prepared ahead, per process
    # Processes that make the batches of each process, for text that is encoded on the way; 0: a thread of its own does.
    workers: int = since(0, before=0, least=0)
    cache_dir: str = ""  # where token stores are kept; "" is the user's cache directory

    def validate(self) -> None:
        """Raises RecipeError for settings that cannot work together."""
        if not self.paths or not all(self.paths):
            raise RecipeError("data.paths is empty: name what to read, as in data.paths=corpus/ or data=embedded")
        if self.weights and len(self.weights) != len(self.paths):
            raise RecipeError(
                f"data.weights has {len(self.weights)} numbers for {len(self.paths)} data.paths "
                f"({show(self.paths)}): give one per path, or none to mix by size (data.weights=)"
            )
        if not self.tokenizer:
            raise RecipeError("data.tokenizer is empty: bytes, hnet-bytes, bpe-4096, or a tokenizer.json")
        if self.validation_every == 1:
            raise RecipeError("data.validation_every=1 holds out every document: at least 2, or 0 to hold out none")
        self._check_paths()

    def _check_paths(self) -> None:
        """Raises UserError for addresses that cannot be read: of hosts, and of buckets whose package is missing."""
        for path in self.paths:
            if self.source in ("files", "tokens"):
                (bucket_path if bucket_scheme(path) else local_path)(path, "data.paths")
            elif self.source == "huggingface" and is_address(path):
                raise RecipeError(f"data.paths: {path}: name a data set of the hub as owner/name or owner/name:config")
        local_path(self.tokenizer, "data.tokenizer")
        if self.cache_dir:
            local_path(self.cache_dir, "data.cache_dir")

    def unread(self) -> dict[str, str]:
        """Fields that mean nothing beside the others, and why."""
        at, found = f"data.source={self.source}", {}
        if self.source not in ("files", "huggingface"):
            found["text_key"] = f"{at} has no fields of text"
        if self.source != "files":
            found["prompt_key"] = f"{at} has no rows with prompts"
        if self.source != "tokens":
            found["token_dtype"] = f"{at} reads no files of tokens"
        if self.source in ("huggingface", "synthetic", "own"):
            found["validation_every"] = f"{at} holds out rows of its own"
        if not self.shuffle and self.source != "synthetic":
            found["shuffle_seed"] = "data.shuffle=false"
        if len(self.paths) == 1:
            found["weights"] = "there is one path"
        return found


# `data=NAME` on the command line replaces these fields and leaves the others as the recipe has them.
DATA_PRESETS: dict[str, dict[str, object]] = {
    "embedded": {"source": "embedded", "paths": ("english",), "weights": (), "tokenizer": "bytes"},
    "mixed": {
        "source": "embedded",
        "paths": ("english", "python", "chinese"),
        "weights": (0.5, 0.3, 0.2),
        "tokenizer": "bytes",
    },
    "fineweb_edu": {
        "source": "huggingface",
        "paths": ("HuggingFaceTB/smollm-corpus:fineweb-edu-dedup",),
        "weights": (),
        "tokenizer": "HuggingFaceTB/SmolLM-360M",
    },
    "fineweb_edu_bytes": {
        "source": "huggingface",
        "paths": ("HuggingFaceFW/fineweb-edu:sample-100BT",),
        "weights": (),
        "tokenizer": "hnet-bytes",
    },
    "synthetic": {"source": "synthetic", "paths": ("uniform",), "weights": (), "tokenizer": "bytes"},
}
