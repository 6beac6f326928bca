"""Answers to completions and chats: what OpenAI's clients read, whole and as it comes."""

from pathlib import Path

import numpy as np
import pytest
from serving_cases import Client, Engine

from adaptive.serving.answers import LEAST

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client():
    return Client()


def test_a_completion(client):
    status, answer = client.json(TEXTS, {"prompt": "The", "max_tokens": 20, "model": "made"})
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "made"
    assert answer["choices"] == [{"index": 0, "text": " word", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}  # the end token is one
    (ticket,) = client.engine.taken
    assert ticket.request.prompt.tolist() == list(b"The") and ticket.request.tokens == 20
    assert ticket.request.end == 256 and ticket.request.seconds == 5.0


def test_lengths_and_ends(client):
    _, answer = client.json(TEXTS, {"prompt": "The", "max_tokens": 3})
    assert answer["choices"][0]["text"] == " wo" and answer["choices"][0]["finish_reason"] == "length"
    client.json(TEXTS, {"prompt": "The", "ignore_eos": True})
    client.json(CHATS, {"messages": HELLO})
    client.json(CHATS, {"messages": HELLO, "max_tokens": 4})
    client.json(CHATS, {"messages": HELLO, "max_completion_tokens": 5, "max_tokens": 4})
    asked = [ticket.request for ticket in client.engine.taken[1:]]
    assert asked[0].end is None and asked[0].tokens == 16
    assert [each.tokens for each in asked[1:]] == [64 - len(asked[1].prompt), 4, 5]


def test_several_prompts_and_choices(client):
    _, answer = client.json(TEXTS, {"prompt": ["a", "bc"], "n": 2, "seed": 5, "echo": True})
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "a word"), (1, "a word"), (2, "bc word"), (3, "bc word"),
    ]  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == 3 and answer["usage"]["completion_tokens"] == 24
    assert [(t.request.seed, t.request.stream) for t in client.engine.taken] == [(5, 0), (5, 1)] * 2
    for prompt, ids in (([7, 8], [[7, 8]]), ([[1], [2, 3]], [[1], [2, 3]])):
        client.engine.taken.clear()
        client.json(TEXTS, {"prompt": prompt})
        assert [ticket.request.prompt.tolist() for ticket in client.engine.taken] == ids
    assert client.engine.taken[0].request.prompt.dtype == np.int32


def test_seeds(client):
    for seed in (7, -1, 2**40 + 3, None):
        client.json(TEXTS, {"prompt": "The", "seed": seed})
    assert [ticket.request.seed for ticket in client.engine.taken[:3]] == [7, 2**32 - 1, 3]
    client.json(TEXTS, {"prompt": "The"})
    drawn = {ticket.request.seed for ticket in client.engine.taken[3:]}
    assert len(drawn) == 2 and all(0 <= seed < 2**32 for seed in drawn)


def test_drawing(client):
    client.json(TEXTS, {"prompt": "The"})
    given = {"temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5}
    client.json(TEXTS, {"prompt": "The", **given})
    usual, how = (ticket.request.how for ticket in client.engine.taken)
    assert (usual.temperature, usual.top_p, usual.top_k) == (1.0, 1.0, 0)
    assert {name: getattr(how, name) for name in given} == given


def test_stop_texts(client):
    _, answer = client.json(TEXTS, {"prompt": "The", "stop": ["zz", "rd"], "logprobs": 0})
    (choice,) = answer["choices"]
    assert choice["text"] == " wo" and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == [" ", "w", "o"] and choice["logprobs"]["top_logprobs"] == [{}] * 3
    assert client.engine.ended.get(timeout=5) in ("cancelled", "end")
    _, answer = client.json(CHATS, {"messages": HELLO, "stop": "o"})
    assert answer["choices"][0]["message"]["content"] == " w"


def test_logprobs_of_completions(client):
    _, answer = client.json(TEXTS, {"prompt": "The", "logprobs": 2, "max_tokens": 2})
    told = answer["choices"][0]["logprobs"]
    assert told["tokens"] == [" ", "w"] and told["token_logprobs"] == [0.0, -0.5] and told["text_offset"] == [0, 1]
    assert told["top_logprobs"] == [{" ": 0.0, "bytes:\\xe2": LEAST}, {"w": -0.5, "bytes:\\xe2": LEAST}]
    assert client.engine.taken[0].request.likeliest == 2


def test_logprobs_of_chats(client):
    _, answer = client.json(CHATS, {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 1})
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    assert entry["token"] == " " and entry["bytes"] == [32] and entry["top_logprobs"][1]["bytes"] == [0xE2]


def test_bytes_that_are_no_text():
    client = Client(Engine(b"a\xff\xe2\x82", end=False))
    _, answer = client.json(TEXTS, {"prompt": "The", "max_tokens": 4, "details": True})
    (choice,) = answer["choices"]
    assert choice["text"] == "a��"
    assert [token["bytes"] for token in choice["details"]] == [[97], [255], [226], [130]]
    assert "".join(token["text"] for token in choice["details"]) == choice["text"]


def test_details(client):
    _, answer = client.json(CHATS, {"messages": HELLO, "details": True, "max_tokens": 2})
    assert answer["choices"][0]["details"][1] == {
        "token": 119, "text": "w", "bytes": [119], "logprob": -0.5, "depth": 2, "begins": [False], "flops": 2e6,
    }  # fmt: skip


@pytest.mark.parametrize("stop", [[], ["r"]], ids=["whole", "stopped"])
def test_parts_are_the_whole(client, stop):
    asked = {"prompt": ["x", "y"], "n": 2, "logprobs": 1, "details": True, "stop": stop, "echo": False}
    _, whole = client.json(TEXTS, asked)
    events = client.events(TEXTS, asked | {"stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"] and len({e["id"] for e in events}) == 1
    for choice in whole["choices"]:
        parts = [each for event in events for each in event["choices"] if each["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part["details"]] == choice["details"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [each for part in parts for each in part["logprobs"][name]] == choice["logprobs"][name]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]


def test_chats_come_in_parts(client):
    events = client.events(CHATS, {"messages": HELLO})
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == " word"
    assert events[-1]["choices"][0]["finish_reason"] == "stop" and "usage" not in events[-1]


def test_an_echo_comes_first(client):
    events = client.events(TEXTS, {"prompt": "The", "echo": True})
    assert "".join(event["choices"][0]["text"] for event in events) == "The word"


def test_other_addresses(client):
    assert client.json("/health") == (200, {"status": "ok"})
    _, models = client.json("/v1/models")
    about = {"step": 7, "context": 64, "passes": 3, "stages": 1, "chat": "plain"}
    assert [(each["id"], each["details"]) for each in models["data"]] == [("made", about)]
    assert client.json("/v1/models/made")[1]["id"] == "made" and client.json("/v1/models/a/b")[0] == 404
    status, headers, page = client.ask("/")
    assert status == 200 and b"</html>" in page and "default-src 'none'" in headers["content-security-policy"]
    assert b"http://" not in page and b"https://" not in page  # nothing from elsewhere


def test_metrics(client):
    client.json(TEXTS, {"prompt": "The"})
    client.json(TEXTS, {"prompt": 5})
    client.ask("/nowhere/" + "x" * 50)
    status, headers, content = client.ask("/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = content.decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['adaptive_responses_total{path="/v1/completions",code="400"}'] == "1"
    assert values['adaptive_responses_total{path="other",code="404"}'] == "1"
    assert values["adaptive_tokens_total"] == "6" and values["adaptive_prompt_tokens_total"] == "3"
    assert values['adaptive_choices_total{ended="end"}'] == "1"
    assert (
        values["adaptive_first_token_seconds_count"] == "1" and values["adaptive_between_tokens_seconds_count"] == "5"
    )
    assert values["adaptive_engine_waiting"] == "0" and values["adaptive_engine_requests_total"] == "1"
    assert int(values["process_resident_memory_bytes"]) > 1e6
    kinds = dict(line.split(" ")[2:] for line in lines if line.startswith("# TYPE"))
    page = PAGE.read_text()
    assert not {name for name in kinds if f"`{name}" not in page and not name.startswith("adaptive_engine")}
    assert kinds["adaptive_engine_waiting"] == "gauge" and kinds["adaptive_engine_requests_total"] == "counter"
