"""What a request asks for, read from its fields; everything that cannot be is refused."""

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adaptive.errors import UserError
from adaptive.inference.drawing import Drawing
from adaptive.inference.requests import Request
from adaptive.inference.sampling import prompt_tokens
from adaptive.serving.chat import Message
from adaptive.serving.errors import Refused
from adaptive.serving.fields import Fields, clean
from adaptive.serving.served import Served

MOST_CHOICES = 128  # texts of one request
MOST_LIKELIEST = 20
MOST_STOPS = 16
COMPLETION_TOKENS = 16  # without max_tokens, as OpenAI's documents say
ANY_SEED = 2**63
SEEDS = 2**32
MOST = 2**31 - 1  # that a whole number of the engine can be
LARGEST = 1e4  # of a penalty, and its inverse: far beyond use, and no logit overflows
COLDEST = 1e-4  # lower temperatures but 0 would overflow
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that can be computed.

    prompts   of each, ids i32[n]
    requests  to the engine, `choices` for each prompt, one prompt after another
    echoed    text of each prompt where it is to stand before its continuations; () where not
    stops     texts that end a continuation
    logprobs  whether they are told
    details   whether every token is told, with its depth and cost
    stream    whether tokens are sent as they come; usage: and then at the end how many there were
    """

    prompts: tuple[np.ndarray, ...]
    requests: tuple[Request, ...]
    choices: int
    echoed: tuple[str, ...]
    stops: tuple[str, ...]
    logprobs: bool
    details: bool
    stream: bool
    usage: bool

    def prompt_of(self, number: int) -> np.ndarray:
        """i32[n] of a request's number."""
        return self.prompts[number // self.choices]


def completion(fields: Fields, served: Served) -> Asked:
    """Of /v1/completions."""
    _check_model(fields, served)
    prompts = [*_prompts(fields, served)]
    echo = fields.flag("echo")
    likeliest = fields.integer("logprobs", -1, least=0, most=MOST_LIKELIEST)
    if echo and likeliest >= 0:
        raise fields.wrong("echo", "cannot be had with logprobs: those of a prompt are not computed")
    if fields.any("best_of") not in (None, fields.any("n") or 1):
        raise fields.wrong("best_of", "must be n, or absent: nothing is computed that is not answered")
    fields.only("suffix", [""], "these models write from left to right alone: leave it out")
    tokens = fields.integer("max_tokens", COMPLETION_TOKENS, least=1, most=MOST)
    echoed = tuple(served.tokenizer.decode(ids) for ids in prompts) if echo else ()
    return _asked(fields, served, prompts, tokens, max(0, likeliest), (), echoed=echoed, logprobs=likeliest >= 0)


def chat(fields: Fields, served: Served) -> Asked:
    """Of /v1/chat/completions."""
    _check_model(fields, served)
    for name in ("tools", "functions", "audio", "prediction", "web_search_options", "reasoning_effort", "verbosity"):
        fields.only(name, [[]], "is not supported: leave it out")
    for name in ("tool_choice", "function_call"):
        fields.only(name, ["none", "auto"], "there are no tools here: leave it out")
    fields.only("parallel_tool_calls", [True, False], "must be true or false")
    fields.only("modalities", [["text"]], "text is all there is: leave it out")
    form = fields.inner("response_format")
    form.only("type", ["text"], "text is all there is: leave it out")
    form.finish()
    ids = _within("messages", lambda: served.chat.prompt(_messages(fields)))
    told = fields.flag("logprobs")
    likeliest = fields.integer("top_logprobs", 0, least=0, most=MOST_LIKELIEST)
    if likeliest and not told:
        raise fields.wrong("top_logprobs", "needs logprobs=true")
    older = fields.integer("max_tokens", 0, least=1, most=MOST)
    tokens = fields.integer("max_completion_tokens", older, least=1, most=MOST)
    return _asked(fields, served, [ids], tokens, likeliest, served.chat.stops, echoed=(), logprobs=told)


def _asked(
    fields: Fields, served: Served, prompts: Sequence[np.ndarray], tokens: int, likeliest: int, stops: tuple[str, ...],
    *, echoed: tuple[str, ...], logprobs: bool,
) -> Asked:  # fmt: skip
    """What both have in common; tokens 0: as many as there is room for."""
    choices = fields.integer("n", 1, least=1, most=MOST_CHOICES)
    if len(prompts) * choices > MOST_CHOICES:
        raise fields.wrong("n", f"is {choices} for each of {len(prompts)} prompts; {MOST_CHOICES} texts are the most")
    how = _drawing(fields)
    seed = fields.integer("seed", secrets.randbelow(SEEDS), least=-ANY_SEED, most=ANY_SEED - 1)
    end = None if fields.flag("ignore_eos") else served.tokenizer.eos_id
    stops += fields.texts("stop", most=MOST_STOPS)
    stream, details = fields.flag("stream"), fields.flag("details")
    options = fields.inner("stream_options")
    if fields.any("stream_options") is not None and not stream:
        raise fields.wrong("stream_options", "needs stream=true")
    usage = options.flag("include_usage")
    options.flag("include_obfuscation")  # asks for nothing where there is nothing to hide
    options.finish()
    for name in ("frequency_penalty", "presence_penalty"):
        fields.only(name, [0, 0.0], "is not supported (repetition_penalty is): leave it out, or give 0")
    fields.only("logit_bias", [{}], "is not supported: leave it out")
    fields.only("store", [False], "nothing is kept: leave it out")
    for name in ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"):
        fields.any(name)  # says nothing of the text
    fields.finish()
    requests = []
    for ids in prompts:
        room = _room(ids, tokens, served)
        for number in range(choices):
            requests.append(Request(ids, room, how, seed % SEEDS, number, end, likeliest, served.seconds))
        if why := served.engine.refuse(requests[-1]):
            raise Refused(400, why, code="refused")
    return Asked(tuple(prompts), tuple(requests), choices, echoed, stops, logprobs, details, stream, usage)


def _check_model(fields: Fields, served: Served) -> None:
    name = fields.text("model", served.name)
    if name != served.name:
        raise no_model(name, served)


def no_model(name: str, served: Served) -> Refused:
    shown = name if len(name) < 100 else f"{name[:97]}..."
    message = f"there is no model '{shown}' here; there is '{served.name}'"
    return Refused(404, message, param="model", code="model_not_found")


def _drawing(fields: Fields) -> Drawing:
    temperature = fields.real("temperature", 1.0, least=0, most=2)
    if 0 < temperature < COLDEST:
        raise fields.wrong("temperature", f"must be 0, which takes the likeliest token, or {COLDEST:g} and more")
    return Drawing(
        temperature,
        fields.integer("top_k", 0, least=0, most=MOST),
        fields.real("top_p", 1.0, least=0, most=1, above=0),
        fields.real("min_p", 0.0, least=0, most=1),
        fields.real("repetition_penalty", 1.0, least=1 / LARGEST, most=LARGEST),
    )


def _room(ids: np.ndarray, tokens: int, served: Served) -> int:
    """Tokens to write after the prompt, 0 standing for all that fit. Raises Refused where they do not."""
    free = served.context - len(ids)
    if free < max(1, tokens):
        asked = f"{tokens} to write" if tokens else "one to write at least"
        message = f"the context of this model is {served.context} tokens; {len(ids)} of the prompt and {asked} are more"
        raise Refused(400, message, param="max_tokens" if free > 0 else "prompt", code="context_length_exceeded")
    return tokens or free


def _within(param: str, call: Callable[[], np.ndarray]) -> np.ndarray:
    """What `call` returns, its UserError a refusal of the field."""
    try:
        return call()
    except UserError as error:
        raise Refused(400, f"'{param}': {error}", param=param, code="invalid_value") from None


# Prompts


def _prompts(fields: Fields, served: Served) -> list[np.ndarray]:
    """i32[n] of each: a text, a list of texts, a list of ids or a list of such lists."""
    given = fields.any("prompt")
    if given is None:
        raise Refused(400, "'prompt' is missing: give a text to continue", param="prompt", code="missing_parameter")
    many = isinstance(given, list) and bool(given) and not _is_number(given[0])
    each = given if many else [given]
    if len(each) > MOST_CHOICES:
        raise fields.wrong("prompt", f"may have {MOST_CHOICES} texts at most, not {len(each)}")
    return [_prompt(one, f"prompt.{i}" if many else "prompt", served) for i, one in enumerate(each)]


def _prompt(given: Any, at: str, served: Served) -> np.ndarray:
    if isinstance(given, str):
        return _within(at, lambda: prompt_tokens(served.tokenizer, clean(given)))
    vocab = served.tokenizer.vocab_size
    if not isinstance(given, list) or not all(_is_number(token) for token in given):
        message = f"'{at}' must be a text or a list of token ids"
    elif not given:
        message = f"'{at}' is empty: give some text"
    elif not all(0 <= token < vocab for token in given):
        message = f"'{at}' has ids beyond the vocabulary: each is from 0 to {vocab - 1}"
    else:
        return np.array(given, np.int32)
    raise Refused(400, message, param=at, code="invalid_value")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _messages(fields: Fields) -> list[Message]:
    given = fields.any("messages")
    if given is None:
        raise Refused(400, "'messages' is missing: give one at least", param="messages", code="missing_parameter")
    if not isinstance(given, list) or not given:
        raise fields.wrong("messages", "must be a list of messages, one at least")
    return [_message(one, f"messages.{i}") for i, one in enumerate(given)]


def _message(given: Any, at: str) -> Message:
    if not isinstance(given, dict):
        raise Refused(400, f"'{at}' must be an object with role and content", param=at, code="invalid_value")
    fields = Fields(given, at)
    role = fields.text("role")
    if role not in ROLES:
        raise fields.wrong("role", f"must be one of {', '.join(ROLES)}")
    for name in ("tool_calls", "function_call", "audio", "refusal"):
        fields.only(name, [[], ""], "is not supported: leave it out")
    fields.any("name")
    content = fields.any("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{at}.content.{i}") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise fields.wrong("content", "must be a text, or a list of parts of type text")
    fields.finish()
    return Message(ROLES[role], clean(content))


def _part(given: Any, at: str) -> str:
    fields = Fields(given if isinstance(given, dict) else {}, at)
    if fields.any("type") != "text" or not isinstance(text := fields.any("text"), str):
        raise Refused(400, f"'{at}' must be an object of type text with a text", param=at, code="invalid_value")
    fields.finish()
    return text
