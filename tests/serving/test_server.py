"""A server on a socket: OpenAI's own client, and an end that loses nothing."""

import concurrent.futures
import http.client
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request

import jax
import pytest
from serving_cases import Engine, while_serving

from adaptive import command, serve
from adaptive.errors import NoRoomError, UserError
from adaptive.serving import server


def post(address, body):
    content, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", content, kind), timeout=20)


def test_openais_client():
    openai = pytest.importorskip("openai")
    engine = Engine(" wörd".encode())

    def ask(address):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="k3y", max_retries=0) as client:
            assert [each.id for each in client.models.list()] == ["made"]
            told = client.completions.create(model="made", prompt="The", logprobs=1, n=2, extra_body={"details": True})
            assert [choice.text for choice in told.choices] == [" wörd"] * 2 and told.usage.completion_tokens == 14
            assert told.choices[0].logprobs.tokens[:2] == [" ", "w"] and told.choices[0].details[0]["depth"] == 1
            chunks = client.completions.create(model="made", prompt="The", stream=True)
            assert "".join(chunk.choices[0].text for chunk in chunks) == " wörd"
            talk = {"model": "made", "messages": [{"role": "user", "content": "hello"}]}
            answer = client.chat.completions.create(**talk, logprobs=True, top_logprobs=2, seed=1, temperature=0)
            assert answer.choices[0].message.content == " wörd" and answer.choices[0].finish_reason == "stop"
            assert answer.choices[0].logprobs.content[0].top_logprobs[1].bytes == [0xE2]
            usage = {"include_usage": True}
            parts = list(client.chat.completions.create(**talk, stream=True, stream_options=usage, stop="r"))
            assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == " wö"
            assert parts[-1].usage.prompt_tokens == len("User: hello\n\nAssistant:")
            with pytest.raises(openai.BadRequestError, match="'temperature' must be from 0 to 2") as error:
                client.completions.create(model="made", prompt="The", temperature=3)
            assert error.value.param == "temperature" and error.value.code == "invalid_value"
            with pytest.raises(openai.NotFoundError, match="no model 'other'"):
                client.chat.completions.create(**talk | {"model": "other"})
            engine.most = 0
            with pytest.raises(openai.RateLimitError) as error:
                client.completions.create(model="made", prompt="The")
            assert error.value.response.headers["retry-after"] == "3"
        other = openai.OpenAI(base_url=f"{address}/v1", api_key="other", max_retries=0)
        with other, pytest.raises(openai.AuthenticationError, match="not the server's"):
            other.models.list()
        return True

    assert while_serving(ask, engine, key="k3y") == (True, True)


def test_it_ends_when_all_that_it_took_on_is_done():
    engine = Engine()

    def ask(address):
        engine.go.clear()  # nothing is computed yet
        with concurrent.futures.ThreadPoolExecutor() as threads:
            texts = [threads.submit(lambda: json.load(post(address, {"prompt": "The"}))) for _ in range(3)]
            texts += [threads.submit(lambda: post(address, {"prompt": "The", "stream": True}).read())]
            while len(engine.taken) < 4:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            refused = 0
            for _ in range(200):  # it takes no more
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    time.sleep(0.02)
                except OSError:
                    refused += 1
                    break
            engine.go.set()
            return refused, [each.result(timeout=20) for each in texts]

    (refused, answers), finished = while_serving(ask, engine, ends=True)
    assert refused and finished
    assert [answer["choices"][0]["text"] for answer in answers[:3]] == [" word"] * 3
    assert answers[3].endswith(b"data: [DONE]\n\n")


def test_a_second_interrupt_gives_up(capsys):
    engine = Engine(end=False)
    engine.hang = True

    def ask(address):
        answer = post(address, {"prompt": "The", "stream": True})
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        with pytest.raises(http.client.IncompleteRead):
            answer.read()

    assert while_serving(ask, engine, ends=True)[1] is False
    assert "finishes 1 requests; Ctrl-C gives them up" in capsys.readouterr().err
    assert engine.ended.get(timeout=5) == "cancelled"


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which checkpoint? --checkpoint RUN"),
        (["--checkpoint", "gone", "words"], "'words' is no option"),
        (["--checkpoint", "gone", "--port", "0"], "there is no such folder"),
        (["--checkpoint", "gone", "--port", "70000"], "at most 65535"),
        (["--checkpoint", "gone", "--host", "0.0.0.0", "--port", "0"], "can be reached by others: give a --key"),
        (["--checkpoint", "gone", "--host", "::", "--port", "0"], "can be reached by others"),
        (["--checkpoint", "gone", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: "),
        (["--checkpoint", "gone", "--host", "no such name"], "--host no such name --port 8000: "),
        (["--checkpoint", "gone", "--key", "two words"], "without blanks"),
        (["--checkpoint", "gone", "--timeout", "0"], "at least 0.1"),
    ],
)
def test_what_cannot_be_served_is_refused(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADAPTIVE_SERVE_KEY", raising=False)
    if "::" in arguments and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    assert serve.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main(["--checkpoint", "gone", "--port", str(port)]) == 2
    assert f"--port {port}: Address already in use" in capsys.readouterr().err


def test_a_key_of_the_environment_opens_it_to_others(monkeypatch):
    monkeypatch.setenv(serve.KEY, "s3cret")
    with pytest.raises(UserError, match="no such folder"):
        serve.run(["--checkpoint", "gone", "--host", "0.0.0.0", "--port", "0"])


def test_caches_that_do_not_fit():
    class Large:
        @classmethod
        def of(cls, trained, **options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")

    with pytest.raises(
        NoRoomError, match="--rows 9 sequences with --context 70 tokens each do not fit the memory of cpu"
    ):
        serve.started(Large, None, rows=9, length=70)


def test_addresses():
    with server.bound("localhost", 0) as made:
        assert server.is_loopback(made) and server.address(made).startswith("http://")
    assert command.INTERRUPTED == 130
