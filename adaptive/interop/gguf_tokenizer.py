"""The byte-level BPE tokenizer in a GGUF file, as a tokenizer.json and a tokenizer_config.json."""

from collections.abc import Mapping
from typing import Any

from adaptive.errors import CheckpointError

_CONTROL, _USER = 3, 4  # types of tokens that no merge makes
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _words(digits: str) -> list[dict[str, Any]]:
    """Splits as tiktoken's of 100,000 tokens do, but for numbers."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _BYTES | {"use_regex": False}]


# How text is split before merges, by the name that the file has for it (llama.cpp, unicode_regex_split).
_SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "gpt2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "qwen2": _words(r"\p{N}"),
    "llama-bpe": _words(r"\p{N}{1,3}"),  # Llama 3
}
_WHOLE = ("llama-bpe",)  # of these a word that is a token is never split


def tokenizer_files(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(tokenizer.json, tokenizer_config.json); None where the file's tokenizer is of another kind, or it has none.

    Raises CheckpointError where what it says of it makes no tokenizer.
    """
    name = str(values.get("tokenizer.ggml.pre", ""))
    if values.get("tokenizer.ggml.model") != "gpt2" or name not in _SPLITS:
        return None
    tokens, merges = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.merges")
    if not isinstance(tokens, list) or not isinstance(merges, list) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{where}: its tokenizer has no list of different tokens, or no merges")
    kinds = values.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError(f"{where}: its tokenizer has {len(tokens):,} tokens and types of {len(kinds):,}")
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind == _CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (_CONTROL, _USER)
    ]  # fmt: skip
    tree = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _SPLITS[name]}, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges, "ignore_merges": name in _WHOLE,
        },
    }  # fmt: skip
    config: dict[str, Any] = {"add_bos_token": bool(values.get("tokenizer.ggml.add_bos_token", False))}
    for ours, theirs in (("bos_token", "bos"), ("eos_token", "eos")):
        number = values.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            config[ours] = tokens[number]
    return tree, config
