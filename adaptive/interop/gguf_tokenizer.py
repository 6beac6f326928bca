"""The tokenizer in a GGUF file, byte-level BPE or SentencePiece's, as a tokenizer.json and a tokenizer_config.json."""

from collections.abc import Mapping
from typing import Any

from adaptive.errors import CheckpointError

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # types of tokens
_SPACE = "\u2581"  # as SentencePiece writes a space
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
    own = {key.removeprefix(_PREFIX): value for key, value in values.items() if key.startswith(_PREFIX)}
    model, name = own.get("model"), str(own.get("pre", ""))
    if model != "llama" and (model != "gpt2" or name not in _SPLITS):
        return None
    tokens = own.get("tokens")
    if not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{where}: its tokenizer has no list of different tokens")
    listed = "merges" if model == "gpt2" else "scores"
    given, kinds = own.get(listed), own.get("token_type") or [_NORMAL] * len(tokens)
    if not isinstance(given, list):
        raise CheckpointError(f"{where}: its tokenizer has no {listed}")
    for what, found in (("types", kinds), *([("scores", given)] if model == "llama" else [])):
        if len(found) != len(tokens):
            raise CheckpointError(f"{where}: its tokenizer has {len(tokens):,} tokens and {what} of {len(found):,}")
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind != _USER}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (_UNKNOWN, _CONTROL, _USER)
    ]  # fmt: skip
    tree = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": None}
    tree |= _of_bytes(tokens, given, name) if model == "gpt2" else _of_scores(tokens, given, kinds, own)
    # What llama.cpp does where a file does not say.
    config: dict[str, Any] = {"add_bos_token": bool(own.get("add_bos_token", model == "llama"))}
    for ours, theirs in (("bos_token", "bos"), ("eos_token", "eos")):
        number = own.get(f"{theirs}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            config[ours] = tokens[number]
    return tree, config


def _bpe(tokens: list[str], merges: list[Any], **more: Any) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
    } | more  # fmt: skip


def _of_bytes(tokens: list[str], merges: list[str], name: str) -> dict[str, Any]:
    """Byte-level BPE."""
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _SPLITS[name]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens, merges, ignore_merges=name in _WHOLE),
    }


def _of_scores(tokens: list[str], scores: list[float], kinds: list[int], own: Mapping[str, Any]) -> dict[str, Any]:
    """SentencePiece's BPE: of two neighbours those are merged first whose token has the highest score, and what is no
    token is its bytes."""
    ids = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (_NORMAL, _USER)}
    pairs = [
        (scores[i], ids[left], ids[right], [left, right])
        for token, i in ids.items() for cut in range(1, len(token))
        if (left := token[:cut]) in ids and (right := token[cut:]) in ids
    ]  # fmt: skip
    merges = [pair for _, _, _, pair in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))]
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if own.get("add_space_prefix", True):  # behind a special token, too, as llama.cpp has it
        spaces.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }
