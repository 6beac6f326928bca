"""What a run reads: plain data, importable without grain."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how they become rows of `seq_len` tokens.

    `paths` and `weights` name what `source` reads:
      embedded     names of corpora shipped with the package: english, python, chinese, dna
      files        files, directories or globs of .txt, .jsonl[.gz|.xz|.zst] and .parquet
      tokens       token stores written by `python -m adaptive.data prepare`, or token files of nanoGPT, llm.c,
                   Megatron-LM and OLMo (.bin, .npy)
      huggingface  hub datasets, streamed: "repo" or "repo:config"; the first 4,096 documents are held out
      synthetic    tasks made from an index: uniform, copy, reverse, recall, chase, addition, brackets
    """

    source: Literal["embedded", "files", "tokens", "huggingface", "synthetic"] = "embedded"
    paths: tuple[str, ...] = ("english",)
    weights: tuple[float, ...] = ()  # proportion of rows drawn from each path; () mixes by size (streams equally)
    tokenizer: str = "bytes"  # bytes | hnet-bytes | bpe-4096 | path or hub name of a tokenizer.json
    text_key: str = "text"  # field of jsonl and parquet rows
    token_dtype: Literal["uint8", "uint16", "uint32"] = "uint16"  # of headerless .bin files
    seq_len: int = 256
    shuffle: bool = True
    shuffle_seed: int = 0
    cross_document: bool = False  # True: attend and predict across document boundaries (as the MoR release trains)
    boundaries: Literal["none", "words"] = "none"  # where chunks of an H-Net begin: words as HAT splits them
    validation_every: int = 20  # document i is validation when i % every == every - 1; 0: nothing is held out
    prefetch: int = 4  # batches prepared ahead, per process
    cache_dir: str = ""  # where token stores are kept; "" is the user's cache directory


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
