"""Whatever is sent is answered: with text or with what is wrong, and never by a failure of the server's own."""

import copy
import json
import random

import pytest
from serving_cases import Client, Engine

TEXTS = {
    "prompt": "The", "max_tokens": 3, "n": 1, "stream": False, "stop": ["a"], "logprobs": 1, "echo": False, "seed": 1,
    "temperature": 1.0, "top_p": 0.5, "top_k": 2, "min_p": 0.1, "repetition_penalty": 1.1, "details": True,
    "model": "made", "best_of": 1, "user": "x", "suffix": None,
}  # fmt: skip
CHATS = {
    "messages": [
        {"role": "user", "content": "hello"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ],
    "max_completion_tokens": 3, "n": 1, "stream": True, "stop": "a", "logprobs": True, "top_logprobs": 1, "seed": -1,
    "response_format": {"type": "text"}, "stream_options": {"include_usage": True}, "tools": [], "logit_bias": {},
}  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 2**31, 2**63, 10**299, "", "a", "\ud800", "\0", "x" * 500, "a\u0301",
    [], [[]], [[[]]], [None], [0], [0, "a"], [1.5], [True], ["a", "b"], [10**20], {}, {"a": 1}, {"": None}, {"role": 5},
    [{"role": "user", "content": "\ud800"}], [{"type": "text", "text": 5}],
]  # fmt: skip


def places(tree, at=()):
    yield at
    for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(inner, (*at, key))


def changed(tree, draw):
    """The tree with something else somewhere in it."""
    tree = copy.deepcopy(tree)
    *path, last = draw.choice([at for at in places(tree) if at])
    node = tree
    for key in path:
        node = node[key]
    if isinstance(node, dict) and draw.random() < 0.2:
        node[draw.choice(["x", "\ud800", "role", "prompt", "n" * 300])] = draw.choice(VALUES)
    elif draw.random() < 0.1:
        del node[last]
    else:
        node[last] = draw.choice(VALUES)
    return tree


@pytest.mark.parametrize(("path", "good"), [("/v1/completions", TEXTS), ("/v1/chat/completions", CHATS)])
def test_trees(path, good):
    client, draw = Client(Engine(b"\xffb\xe2\x82\xac", most=10**6)), random.Random(15)
    seen = set()
    for _ in range(250):
        tree = changed(good, draw)
        tree = changed(tree, draw) if draw.random() < 0.3 else tree
        status, headers, content = client.ask(path, tree)
        seen.add(status)
        assert status in (200, 400, 404), (tree, content)
        if status != 200:
            error = json.loads(content)["error"]
            assert error["message"] and error["type"] == "invalid_request_error", tree
        elif headers["content-type"] == "application/json":
            json.loads(content)
        else:
            assert content.endswith(b"data: [DONE]\n\n")
    assert {200, 400} <= seen and client.json("/health")[0] == 200


def test_bytes():
    client, draw = Client(), random.Random(15)
    good = json.dumps(TEXTS).encode()
    for _ in range(200):
        body = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(body))
            body[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        headers = {"content-type": draw.choice(["application/json", "application/json; charset=x", "", "text/html"])}
        assert client.ask("/v1/completions", bytes(body), headers=headers.items())[0] in (200, 400, 404, 415)
    for path in ("//", "/v1", "/v1/models/", "/v1/models/%00", "/é", "/" + "x" * 9000, "/v1/completions/"):
        for method in ("GET", "POST", "PUT", "HEAD", "OPTIONS", "FROB"):
            assert client.ask(path, method=method)[0] in (200, 307, 404, 405)
