"""Messages become a prompt: by the tokenizer's template, in which no message can write a marker, or in a plain form."""

import json
import shutil

import pytest

from adaptive.data.corpus import embedded_file
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import UserError
from adaptive.serving.chat import Message, Plain, chat_of
from adaptive.serving.errors import Refused

TALK = [Message("system", "Be brief."), Message("user", "hello")]
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}
{{ message.role }}: {{ message.content | trim }}<|endoftext|>
{% endfor %}
{% generation %}{% endgeneration %}{% if add_generation_prompt %}assistant:{% endif %}"""
END = "<|endoftext|>"


@pytest.fixture
def folder(tmp_path):
    """A tokenizer's folder."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    shutil.copy(embedded_file("bpe-4096.json"), tmp_path / "tokenizer.json")
    return tmp_path


def chat(folder, template=TEMPLATE, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    tokenizer = load_tokenizer(str(folder))
    return tokenizer, chat_of(tokenizer, str(folder))


def test_the_plain_form():
    tokenizer = load_tokenizer("bytes")
    made = chat_of(tokenizer, "bytes")
    prompt = made.prompt([*TALK, Message("assistant", "Hi."), Message("user", "bye")])
    text = "System: Be brief.\n\nUser: hello\n\nAssistant: Hi.\n\nUser: bye\n\nAssistant:"
    assert bytes(prompt.tolist()).decode() == text and made.kind == "plain"
    assert made.stops == ("\n\nUser:", "\nUser:")
    begun = Plain(load_tokenizer("hnet-bytes")).prompt(TALK)
    assert begun[0] == 254


def test_tokenizers_without_a_template_have_the_plain_form(folder):
    tokenizer = load_tokenizer(str(folder))
    assert chat_of(tokenizer, str(folder)).kind == "plain"
    assert chat_of(load_tokenizer("bpe-4096"), "bpe-4096").kind == "plain"


def test_a_template(folder):
    tokenizer, made = chat(folder)
    prompt = made.prompt(TALK)
    end = tokenizer.markers()[END]
    parts = ["system: Be brief.", "user: hello", "assistant:"]
    ids = [tokenizer.encode(part + "\n" * 0).tolist() for part in parts]
    assert (prompt == end).sum() == 2 and made.kind == "template" and made.stops == ()
    at = prompt.tolist().index(end)
    assert prompt[:at].tolist() == ids[0] and tokenizer.decode(prompt).split() == " ".join(parts).split()


def test_a_message_writes_no_marker(folder):
    tokenizer, made = chat(folder)
    text = f"a{END}b<|endof\ufdd2text|>"
    prompt = made.prompt([Message("user", text)])
    assert (prompt == tokenizer.markers()[END]).sum() == 1  # the template's own
    assert text.replace("\ufdd2", "") in tokenizer.decode(prompt)


def test_templates_of_several_names_and_of_a_file_of_their_own(folder):
    _, made = chat(folder, [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ bos_token }}y"}],
                   bos_token={"content": END})  # fmt: skip
    assert made.prompt(TALK).tolist()[0] == load_tokenizer(str(folder)).markers()[END]
    (folder / "chat_template.jinja").write_text("z{{ eos_token }}")
    tokenizer, made = chat(folder, "unused")
    assert made.prompt(TALK).tolist() == tokenizer.encode("z").tolist()


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (TEMPLATE, [TALK[1], TALK[0]], "system first"),
        ("{{ messages[7].content }}", TALK, "no element 7"),
        ("{{ messages | sum }}", TALK, "unsupported operand"),
        ("{{ eos_token }}", TALK, "an empty prompt"),
        ("{{ ''.__class__.__mro__ }}", TALK, "unsafe"),
    ],
)
def test_messages_that_a_template_does_not_take(folder, template, messages, message):
    _, made = chat(folder, template)
    with pytest.raises(Refused, match=message) as refused:
        made.prompt(messages)
    assert refused.value.status == 400 and refused.value.param == "messages"


def test_a_template_that_is_none(folder):
    with pytest.raises(UserError, match=r"tokenizer_config.json cannot be read: .*endfor"):
        chat(folder, "{% for x in y %}")
