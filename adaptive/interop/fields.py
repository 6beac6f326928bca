"""Reading the fields of a config.json."""

import re
from collections.abc import Mapping
from typing import Any

from adaptive.errors import RecipeError

# What the library writes into every config.json and what changes no number here. Dropout is refused where it is not 0.
HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "use_cache", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id", "max_position_embeddings", "pretraining_tp", "tokenizer_class",
    "task_specific_params", "id2label", "label2id", "output_attentions", "output_hidden_states", "return_dict",
    "problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "finetuning_task", "prefix",
    "pruned_heads", "decoder_start_token_id", "sep_token_id", "attn_implementation", "auto_map", "max_window_layers",
    "cache_implementation", "is_llama_config", "rope_interleaved", "summary_type", "summary_use_proj",
    "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "n_ctx", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "unsloth_fixed", "unsloth_version", "sliding_window_pattern", "_sliding_window_pattern",
    "router_aux_loss_coef", "output_router_logits", "vocab_size", "hidden_act", "adaptive",
}  # fmt: skip
_NOTHING: tuple[Any, ...] = (None, False, 0, 0.0, 1.0, "", [], {})


class Fields:
    """A config.json with the defaults of its kind; remembers which fields were read.

    Raises RecipeError, naming the field, for whatever is asked of it and is of another type.
    """

    def __init__(self, kind: str, given: Mapping[str, Any], defaults: Mapping[str, Any]):
        if not isinstance(given, Mapping):
            raise RecipeError(
                f"official {kind}: the configuration must be a dict of config.json's fields, not {given!r}"
            )
        self.kind, self._given, self._defaults = kind, given, defaults
        self.all_given = given
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, the library's default where it is left out."""
        self._read.add(name)
        return self._given.get(name, self._defaults.get(name, default))

    def given(self, name: str) -> Any:
        """The value of a field, None where it is left out."""
        self._read.add(name)
        return self._given.get(name)

    def integer(self, name: str, *, least: int = 1, most: int = 2**31 - 1) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "must be an integer")
        if not least <= value <= most:
            raise self.wrong(name, f"must be at least {least} and at most {most}")
        return value

    def integer_or_none(self, name: str) -> int | None:
        return None if self.get(name) is None else self.integer(name)

    def number(self, name: str) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "must be a number")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.get(name, False)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return bool(value)

    def only(self, name: str, *known: Any) -> None:
        """Refuses a field of another value than these, as it would change what the model computes."""
        value = self.get(name, known[0])
        if value not in known:
            raise self.wrong(
                name, f"is not supported, only {', '.join(map(repr, known))}: the model would be another one"
            )

    def wrong(self, name: str, right: str) -> RecipeError:
        return RecipeError(f"official {self.kind}: {name}={self.get(name)!r}: {right}")

    def check_rest(self) -> None:
        """Refuses fields that nobody has read and that may change what the model computes."""
        if self.given("quantization_config") is not None:
            raise self.wrong("quantization_config", "is not supported; give the tensors in a float dtype, without it")
        for name in ("attention_dropout", "hidden_dropout", "dropout"):
            if self.given(name):
                raise self.wrong(
                    name, "has no counterpart in training here; set it to 0.0, which leaves inference as it is"
                )
        known = HARMLESS | self._read
        other = [n for n, v in self._given.items() if n not in known and not _harmless(n, v)]
        if other:
            shown = ", ".join(f"{name}={self._given[name]!r}"[:80] for name in other[:8])
            raise RecipeError(
                f"official {self.kind}: {shown}: nothing here knows what "
                f"{'this field does' if len(other) == 1 else 'these fields do'}, and the model might be another one; "
                "leave out of the configuration what changes nothing"
            )


def _harmless(name: str, value: Any) -> bool:
    return name.startswith("_") or bool(re.search(r"version|token|_name|name_", name)) or value in _NOTHING
