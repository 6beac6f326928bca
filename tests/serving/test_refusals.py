"""What is answered in place of text: every bad field by its name, and a server that has no room, no time or no key."""

import json
import threading

import pytest
from serving_cases import Client, Engine

from adaptive.serving import app

TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
GOOD = {"prompt": "The"}
TALK = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def client():
    return Client()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "is missing"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": [[]]}, "prompt.0", "is empty"),
        ({"prompt": ["a", ""]}, "prompt.1", "the prompt is empty"),
        ({"prompt": 5}, "prompt", "a text or a list of token ids"),
        ({"prompt": [5, "a"]}, "prompt", "a text or a list of token ids"),
        ({"prompt": [True]}, "prompt.0", "a text or a list of token ids"),
        ({"prompt": [5, 320]}, "prompt", "each is from 0 to 319"),
        ({"prompt": [-1]}, "prompt", "each is from 0 to 319"),
        ({"prompt": ["a"] * 129}, "prompt", "128 texts at most, not 129"),
        ({"prompt": "a" * 64}, "prompt", "the context of this model is 64 tokens; 64 of the prompt"),
        ({"prompt": "a" * 40, "max_tokens": 25}, "max_tokens", "40 of the prompt and 25 to write are more"),
        ({"prompt": "a" * 13}, None, "bad luck"),
        ({"max_tokens": 0}, "max_tokens", "must be from 1"),
        ({"max_tokens": 1.5}, "max_tokens", "a whole number"),
        ({"max_tokens": "5"}, "max_tokens", "a whole number, not a text"),
        ({"max_tokens": 10**30}, "max_tokens", "must be from 1 to"),
        ({"temperature": -0.1}, "temperature", "must be from 0 to 2, not -0.1"),
        ({"temperature": 2.1}, "temperature", "must be from 0 to 2"),
        ({"temperature": 1e-9}, "temperature", "must be 0, which takes the likeliest"),
        ({"temperature": "hot"}, "temperature", "a number, not a text"),
        ({"temperature": True}, "temperature", "a number, not true or false"),
        ({"top_p": 0}, "top_p", "above 0 and to 1, not 0"),
        ({"top_p": 1.01}, "top_p", "above 0"),
        ({"top_k": -1}, "top_k", "must be from 0"),
        ({"min_p": 2}, "min_p", "from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "from 0.0001 to 10000"),
        ({"n": 0}, "n", "from 1 to 128"),
        ({"n": 65, "prompt": ["a", "b"]}, "n", "65 for each of 2 prompts; 128"),
        ({"best_of": 3}, "best_of", "must be n"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"logprobs": True}, "logprobs", "a whole number"),
        ({"logprobs": 1, "echo": True}, "echo", "cannot be had with logprobs"),
        ({"seed": 2**63}, "seed", "must be from"),
        ({"stop": ""}, "stop", "must not be empty"),
        ({"stop": ["a"] * 17}, "stop", "16 texts at most"),
        ({"stop": [5]}, "stop", "a text or a list of texts"),
        ({"stream": 1}, "stream", "true or false, not a number"),
        ({"stream_options": {}}, "stream_options", "needs stream=true"),
        ({"stream": True, "stream_options": []}, "stream_options", "an object, not a list"),
        (
            {"stream": True, "stream_options": {"include_usge": 1}},
            "stream_options.include_usge",
            "did you mean include_usage?",
        ),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported"),
        ({"suffix": "x"}, "suffix", "from left to right alone"),
        ({"model": "gpt"}, "model", "there is no model 'gpt' here; there is 'made'"),
        ({"model": 5}, "model", "must be a text"),
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"messages": []}, "messages", "is no field of this request"),
    ],
)
def test_fields_of_completions(client, fields, param, message):
    status, answer = client.json(TEXTS, GOOD | fields)
    assert status == (404 if message.startswith("there is no model") else 400)
    assert answer["error"]["param"] == param and message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["code"]


def said(**message):
    return {"messages": [TALK["messages"][0], message]}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": None}, "messages", "is missing"),
        ({"messages": []}, "messages", "one at least"),
        ({"messages": "hi"}, "messages", "a list of messages"),
        ({"messages": ["hi"]}, "messages.0", "an object with role and content"),
        (said(content="x"), "messages.1.role", "one of system, developer, user, assistant"),
        (said(role="tool", content="x"), "messages.1.role", "must be one of"),
        (said(role="user"), "messages.1.content", "must be a text"),
        (said(role="user", content=[{"type": "image_url"}]), "messages.1.content.0", "of type text"),
        (said(role="user", content="x", colour=1), "messages.1.colour", "is no field"),
        (said(role="assistant", content="x", tool_calls=[1]), "messages.1.tool_calls", "is not supported"),
        (said(role="user", content="x" * 60), "prompt", "the context of this model is 64"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs=true"),
        ({"logprobs": 3}, "logprobs", "true or false"),
        ({"tools": [{}]}, "tools", "is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "text is all there is"),
        ({"modalities": ["audio"]}, "modalities", "text is all there is"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "must be from 1"),
        ({"prompt": "x"}, "prompt", "is no field of this request"),
    ],
)
def test_fields_of_chats(client, fields, param, message):
    status, answer = client.json(CHATS, TALK | fields)
    assert (status, answer["error"]["param"]) == (400, param) and message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"[1]", "must be a JSON object, not a list"),
        (b'{"prompt": NaN}', "is no number"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "is no number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "\xff"}', "byte 12 cannot be read"),
    ],
    ids=range(6),
)
def test_bodies(client, body, message):
    status, answer = client.json(TEXTS, body)
    assert status == 400 and message in answer["error"]["message"] and answer["error"]["code"] == "invalid_json"


def test_requests_of_another_kind(client, monkeypatch):
    assert client.json(TEXTS, GOOD, headers={"content-type": "text/plain"}.items())[0] == 415
    assert client.json(TEXTS, None, method="POST")[0] == 415
    assert client.json(TEXTS)[0] == 405 and client.json("/v1/engines")[0] == 404
    assert client.json("/v1/models/gpt")[1]["error"]["code"] == "model_not_found"
    monkeypatch.setattr(app, "MOST_BYTES", 20)
    status, answer = client.json(TEXTS, GOOD | {"user": "x" * 20})
    assert status == 413 and "longer than 20 bytes" in answer["error"]["message"]
    monkeypatch.setattr(app, "BODY_S", 0.05)
    assert client.json(TEXTS, b"{", stalls=True)[0] == 408


@pytest.mark.parametrize("stream", [False, True])
def test_no_room(stream):
    client = Client(Engine(most=1))
    client.engine.go.clear()
    body = GOOD | {"n": 3, "stream": stream}
    status, headers, content = client.ask(TEXTS, body)
    assert (status, headers["retry-after"]) == (429, "3")
    assert json.loads(content)["error"]["code"] == "rate_limit_exceeded"
    assert [ticket.cancelled.is_set() for ticket in client.engine.taken] == [True]  # the one that had room


@pytest.mark.parametrize("stream", [False, True])
def test_no_time(stream):
    client = Client()
    client.engine.late = True
    status, headers, content = client.ask(TEXTS, GOOD | {"stream": stream})
    assert status == 504 and headers["x-should-retry"] == "false"
    assert "within the 5 s" in json.loads(content)["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails(stream, caplog):
    client = Client()
    client.engine.error = ValueError("of the engine's own")
    status, answer = client.json(TEXTS, GOOD | {"stream": stream})
    assert status == 500 and answer["error"]["code"] == "engine_failed"
    assert "of the engine's own" in caplog.text and "own" not in json.dumps(answer)
    assert client.json("/health") == (503, {"status": "failed"})


def test_an_engine_that_is_closed():
    client = Client()
    client.engine.closed = True
    status, answer = client.json(TEXTS, GOOD)
    assert status == 503 and answer["error"]["code"] == "stopping" and client.json("/health")[0] == 503


def test_an_error_after_the_first_text():
    engine = Engine(b"ab", end=False)
    client = Client(engine)
    engine.hang = True
    timer = threading.Timer(0.2, lambda: (setattr(engine, "late", True), engine.taken[0].cancel()))
    engine.taken.clear()
    timer.start()
    events = client.events(TEXTS, GOOD)
    assert [event["choices"][0]["text"] for event in events[:2]] == ["a", "b"]
    assert events[-1]["error"]["code"] == "stopping"


@pytest.mark.parametrize(("stream", "leaves"), [(False, 0), (True, 0), (True, 2)])
def test_a_client_that_goes_gives_its_room_to_others(stream, leaves):
    client = Client()
    client.engine.hang = True
    if not leaves:
        client.engine.text = b""
        client.engine.end = False
    client.ask(TEXTS, GOOD | {"n": 2, "stream": stream}, leaves=leaves)
    assert [client.engine.ended.get(timeout=5) for _ in range(2)] == ["cancelled"] * 2
    values = client.ask("/metrics")[2].decode()
    assert ('code="200"' if leaves else 'code="499"') in values


def test_keys():
    client = Client(key="s3cret")
    for path in ("/v1/models", "/metrics", TEXTS, "/nowhere"):
        status, headers, content = client.ask(path, GOOD if path == TEXTS else None)
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert json.loads(content)["error"]["code"] == "invalid_api_key"
    assert client.ask("/health")[0] == 200 and client.ask("/")[0] == 200
    for given, status in (("Bearer s3cret", 200), ("bearer s3cret", 200), ("Bearer s3cre", 401), ("Basic s3cret", 401)):
        assert client.ask("/v1/models", headers={"authorization": given}.items())[0] == status


def test_names_of_the_server():
    client = Client(hosts=frozenset({"localhost", "[::1]"}))
    for host, status in (
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("[::1]:80", 200),
        ("evil.example:8000", 403),
        ("", 403),
    ):
        assert client.ask("/health", headers={"host": host}.items())[0] == status
