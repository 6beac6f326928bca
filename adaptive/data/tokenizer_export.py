"""A tokenizer as the files that the transformers library reads: tokenizer.json and tokenizer_config.json."""

import json
from typing import Any

from adaptive.data.token_texts import byte_level_alphabet
from adaptive.data.tokenizers import Bytes, HNetBytes, JsonTokenizer, Tokenizer

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Text of each file by its name. Ids and what stands around a text are those of `tokenizer`."""
    if isinstance(tokenizer, JsonTokenizer):
        content = tokenizer.to_json()
        names = {token: tokenizer.piece(token) for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None}
    else:
        assert isinstance(tokenizer, Bytes)
        names = _markers(tokenizer)
        content = json.dumps(_of_bytes(tokenizer, names))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": names[tokenizer.eos_id],
        "add_bos_token": tokenizer.bos_id is not None,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.bos_id is not None:
        config["bos_token"] = names[tokenizer.bos_id]
    return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}


def _markers(tokenizer: Bytes) -> dict[int, str]:
    """Names of ids that stand for no byte."""
    if isinstance(tokenizer, HNetBytes):
        return {254: "<|begin|>", 255: "<|end|>"}
    return {tokenizer.eos_id: "<|endoftext|>", tokenizer.pad_id: "<|pad|>"}


def _of_bytes(tokenizer: Bytes, markers: dict[int, str]) -> dict[str, Any]:
    """A byte-level vocabulary without merges, in which a byte's id is the byte."""
    vocab = {letter: byte for letter, byte in byte_level_alphabet().items() if byte not in markers}
    added = [
        {"id": token, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for token, name in markers.items()
    ]  # fmt: skip
    begin = None if tokenizer.bos_id is None else markers[tokenizer.bos_id]
    around = None if begin is None else {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {begin: {"id": begin, "ids": [tokenizer.bos_id], "tokens": [begin]}},
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL, "post_processor": around, "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab | {
                name: token for token, name in markers.items()}, "merges": [],
        },
    }  # fmt: skip
