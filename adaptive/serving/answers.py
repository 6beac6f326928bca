"""Answers as OpenAI's clients read them: whole, or in parts as the text comes."""

import math
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from adaptive.data.tokenizers import JsonTokenizer, Tokenizer
from adaptive.serving.asked import Asked
from adaptive.serving.served import Served
from adaptive.serving.texts import Piece, Token

Ended = Literal["stop", "length"]
LEAST = -9999.0  # stands for a probability of 0, whose logarithm JSON has no number for


class Usage(NamedTuple):
    """Tokens of the prompts, each once, and of all that was drawn."""

    prompt: int
    drawn: int

    def tree(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt, "completion_tokens": self.drawn, "total_tokens": self.prompt + self.drawn}


class Shape(Protocol):
    """One of the two kinds of answers. `number` is that of a choice."""

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The answer with all choices."""

    def choice(self, number: int, piece: Piece, ended: Ended) -> dict[str, Any]:
        """A whole choice."""

    def opening(self, number: int) -> dict[str, Any] | None:
        """The first part of a choice, before any text; None: none is needed."""

    def part(self, number: int, piece: Piece, ended: Ended | None) -> dict[str, Any]:
        """A part with some text, or the last one, which says why it ended."""

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The part that tells how much there was."""


class Completion:
    """Of /v1/completions."""

    def __init__(self, served: Served, asked: Asked):
        self._tokenizer, self._asked = served.tokenizer, asked
        self._head = _head("cmpl", "text_completion", served)

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return self._head | {"choices": list(choices), "usage": usage.tree()}

    def choice(self, number: int, piece: Piece, ended: Ended | None) -> dict[str, Any]:
        echoed = self._echoed(number)
        told = self._logprobs(piece.tokens, len(echoed)) if self._asked.logprobs else None
        made = {"index": number, "text": echoed + piece.text, "logprobs": told, "finish_reason": ended}
        return made | _details(self._asked, self._tokenizer, piece.tokens)

    def opening(self, number: int) -> dict[str, Any] | None:
        return self._head | {"choices": [self.choice(number, Piece(), None)]} if self._echoed(number) else None

    def part(self, number: int, piece: Piece, ended: Ended | None) -> dict[str, Any]:
        told = self._logprobs(piece.tokens, len(self._echoed(number))) if self._asked.logprobs else None
        made = {"index": number, "text": piece.text, "logprobs": told, "finish_reason": ended}
        return self._head | {"choices": [made | _details(self._asked, self._tokenizer, piece.tokens)]}

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._head | {"choices": [], "usage": usage.tree()}

    def _echoed(self, number: int) -> str:
        return self._asked.echoed[number // self._asked.choices] if self._asked.echoed else ""

    def _logprobs(self, tokens: Sequence[Token], begin: int) -> dict[str, Any]:
        """begin: characters that stand before the continuation."""
        name = self._name
        return {
            "tokens": [name(token.made.token) for token in tokens],
            "token_logprobs": [finite(token.made.logprob) for token in tokens],
            "top_logprobs": [{name(t): finite(p) for t, p in token.made.likeliest} for token in tokens],
            "text_offset": [begin + token.offset for token in tokens],
        }

    def _name(self, token: int) -> str:
        """The token's text; of one that holds part of a character its bytes, as in bytes:\\xe2\\x82."""
        content = self._tokenizer.token_bytes(token)
        try:
            return content.decode() or marker_name(self._tokenizer, token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class ChatCompletion:
    """Of /v1/chat/completions."""

    def __init__(self, served: Served, asked: Asked):
        self._tokenizer, self._asked = served.tokenizer, asked
        self._head = _head("chatcmpl", "chat.completion", served)
        self._part_head = self._head | {"object": "chat.completion.chunk"}

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return self._head | {"choices": list(choices), "usage": usage.tree()}

    def choice(self, number: int, piece: Piece, ended: Ended | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._made(number, {"message": message}, piece, ended)

    def opening(self, number: int) -> dict[str, Any] | None:
        return self._chunk(number, {"role": "assistant", "content": ""}, Piece(), None)

    def part(self, number: int, piece: Piece, ended: Ended | None) -> dict[str, Any]:
        delta = {} if ended and not piece.text else {"content": piece.text}
        return self._chunk(number, delta, piece, ended)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._part_head | {"choices": [], "usage": usage.tree()}

    def _chunk(self, number: int, delta: dict[str, Any], piece: Piece, ended: Ended | None) -> dict[str, Any]:
        return self._part_head | {"choices": [self._made(number, {"delta": delta}, piece, ended)]}

    def _made(self, number: int, content: dict[str, Any], piece: Piece, ended: Ended | None) -> dict[str, Any]:
        told = {"content": [self._logprob(token) for token in piece.tokens], "refusal": None}
        made = {"index": number, **content, "logprobs": told if self._asked.logprobs else None, "finish_reason": ended}
        return made | _details(self._asked, self._tokenizer, piece.tokens)

    def _logprob(self, token: Token) -> dict[str, Any]:
        made = token.made
        return {
            **self._entry(made.token, made.logprob),
            "top_logprobs": [self._entry(other, logprob) for other, logprob in made.likeliest],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._tokenizer.token_bytes(token)
        text = content.decode("utf-8", errors="replace") or marker_name(self._tokenizer, token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(content)}


def finite(logprob: float) -> float:
    return logprob + 0.0 if math.isfinite(logprob) else LEAST  # no -0.0


def marker_name(tokenizer: Tokenizer, token: int) -> str:
    """How a token is called that stands for no text."""
    return tokenizer.piece(token) if isinstance(tokenizer, JsonTokenizer) else f"<{token}>"


def _head(prefix: str, kind: str, served: Served) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": served.name,
        "system_fingerprint": f"step-{served.step}",
    }  # fmt: skip


def _details(asked: Asked, tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Every token with its text, its bytes as they are, and what it took."""
    if not asked.details:
        return {}
    return {
        "details": [
            {
                "token": made.token, "text": text, "bytes": list(tokenizer.token_bytes(made.token)),
                "logprob": finite(made.logprob), "depth": made.depth, "begins": list(made.begins), "flops": made.flops,
            }
            for made, text, _ in tokens
        ]
    }  # fmt: skip
