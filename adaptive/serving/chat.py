"""How the messages of a chat become a prompt: by the template of the run's tokenizer, else in a plain form."""

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from adaptive.data.tokenizers import JsonTokenizer, Tokenizer, tokenizer_paths
from adaptive.errors import DataError, UserError
from adaptive.inference.sampling import prompt_tokens
from adaptive.serving.errors import Refused

TEMPLATE = "chat_template.jinja"
_APART = "\ufdd2"  # no character: it keeps what a user writes from being read as a marker
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # what transformers marks for training alone


class Message(NamedTuple):
    """role: system, user or assistant."""

    role: str
    content: str


class Chat(Protocol):
    """kind: as documents call it; stops: texts that end an answer besides those of the request."""

    kind: str
    stops: tuple[str, ...]

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """i32[n] after which the assistant's answer follows. Raises Refused for messages that have no such form."""


class Plain:
    """For models that learned no chat: a play of three voices, which a new turn of the user ends.

    System: You answer in one word.

    User: The capital of France?

    Assistant:
    """

    kind = "plain"
    stops: tuple[str, ...] = ("\n\nUser:", "\nUser:")

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        turns = [f"{message.role.capitalize()}: {message.content}\n\n" for message in messages]
        return prompt_tokens(self._tokenizer, "".join(turns) + "Assistant:")


class Template:
    """That of the tokenizer (Jinja). Markers that it writes are such; what a message holds is text and never one.

    source   of the template
    named    texts of the begin and end token, as bos_token and eos_token
    markers  every one's text and id
    at       where the template was found; messages name it

    Raises UserError where it is none.
    """

    kind = "template"
    stops: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer, source: str, named: dict[str, str], markers: dict[str, int], at: str):
        self._tokenizer, self._named, self._markers, self._at = tokenizer, named, markers, at
        self._template, self._error = _compiled(source, at)
        longest_first = sorted(markers, key=len, reverse=True)
        self._marker = re.compile("|".join(map(re.escape, longest_first))) if markers else None

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        given = [{"role": message.role, "content": self._safe(message.content)} for message in messages]
        try:
            text = self._template.render(messages=given, add_generation_prompt=True, tools=None, **self._named)
        except (self._error, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise Refused(400, f"the chat template of this model does not take these messages: {error}",
                          param="messages", code="invalid_value") from None  # fmt: skip
        ids: list[int] = []
        at = 0
        for found in self._marker.finditer(text) if self._marker else ():
            ids += [*self._plain(text[at : found.start()]), self._markers[found.group()]]
            at = found.end()
        ids += self._plain(text[at:])
        if not ids:
            raise Refused(400, "the chat template of this model makes an empty prompt of these messages",
                          param="messages", code="invalid_value")  # fmt: skip
        return np.array(ids, np.int32)

    def _safe(self, text: str) -> str:
        """The text with something inside each marker, which `_plain` takes out again."""
        text = text.replace(_APART, "")
        return self._marker.sub(lambda found: _APART.join(found.group()), text) if self._marker else text

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text.replace(_APART, "")).tolist() if text else []


def chat_of(tokenizer: Tokenizer, name: str) -> Chat:
    """The form for a run's tokenizer; name: as its recipe calls it. Raises UserError for a template that is none."""
    if not isinstance(tokenizer, JsonTokenizer):
        return Plain(tokenizer)
    path, config_path = tokenizer_paths(name)
    config = _config(config_path)
    beside = path.with_name(TEMPLATE)
    source, at = (_text(beside), beside) if beside.is_file() else (_chosen(config.get("chat_template")), config_path)
    if not source:
        return Plain(tokenizer)
    named = {key: _content(config.get(key)) for key in ("bos_token", "eos_token")}
    return Template(tokenizer, source, named, tokenizer.markers(), str(at))


def _compiled(source: str, at: str) -> tuple[Any, type[Exception]]:
    """(template, what it raises)."""
    try:
        import jinja2.sandbox
    except ModuleNotFoundError:
        raise UserError(f"the chat template {at} needs a package: pip install 'adaptive-lm[serve]'") from None
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment.globals |= {"raise_exception": refuse, "strftime_now": now}
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(_GENERATION.sub("", source)), jinja2.TemplateError
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template {at} cannot be read: {error}") from None


def _config(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(_text(path)) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"data.tokenizer: {path} is not JSON: {error}") from None
    return tree if isinstance(tree, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.tokenizer: {path}: {getattr(error, 'strerror', None) or error}") from None


def _chosen(templates: Any) -> str:
    """The template, of several that have names the one called default."""
    if isinstance(templates, list):
        named = {each.get("name"): each.get("template") for each in templates if isinstance(each, dict)}
        templates = named.get("default")
    return templates if isinstance(templates, str) else ""


def _content(token: Any) -> str:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""
