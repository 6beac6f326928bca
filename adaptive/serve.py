"""Answers requests with a trained model over HTTP: adaptive serve --checkpoint RUN [--port 8000]

OpenAI's clients of completions and chat work with it. Its page shows text as it is made, and what each token took.
SIGTERM and Ctrl-C end it when what it has taken on is done.
Exit codes: 0 ended so, 2 something asked for cannot work, 130 ended by a second Ctrl-C with requests given up.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.serve"))

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adaptive import command
from adaptive.command import number
from adaptive.errors import NoRoomError, UserError

if TYPE_CHECKING:
    from adaptive.runs.load import Trained

KEY = "ADAPTIVE_SERVE_KEY"


def options() -> command.Options:
    made = command.Options("serve", __doc__ or "")
    add = made.add_argument
    add("--checkpoint", "--workdir", default="", metavar="RUN",
        help="folder of the run, whose newest checkpoint is read, or RUN/checkpoints/STEP")  # fmt: skip
    add("--step", type=number(int, least=0), help="the checkpoint of this step instead")
    add("--ema", action="store_true", help="the running average of the parameters, of a run with train.ema above 0")
    add("--host", default="127.0.0.1",
        help="address to listen at (default 127.0.0.1, for this machine alone; others need a key)")  # fmt: skip
    add("--port", type=number(int, least=0, most=65535), default=8000, help="to listen at; 0: any (default 8000)")
    add("--key", default="", help=f"what requests must carry as a bearer token (default: ${KEY}, which others on this "
        "machine cannot see)")  # fmt: skip
    add("--rows", type=number(int, least=1, most=4096), default=8,
        help="sequences that are computed at once (default 8)")  # fmt: skip
    add("--context", type=number(int, least=2, most=2**24),
        help="tokens of a prompt and what follows it, at most (default: as it was trained)")  # fmt: skip
    add("--queue", type=number(int, least=1, most=1_000_000), default=256,
        help="sequences that may wait for a row; more are answered 429 (default 256)")  # fmt: skip
    add("--cache", default="", metavar="POLICY",
        help="what a recursion keeps of its passes, as of adaptive generate (default: the recipe)")  # fmt: skip
    add("--prefixes", type=number(int, least=0, most=1_000_000), default=0,
        help="beginnings of prompts whose state is kept for prompts that begin alike (default 0)")  # fmt: skip
    add("--timeout", type=number(float, least=0.1, most=1e6), default=600.0,
        help="seconds in which a request must be done, waiting included (default 600)")  # fmt: skip
    add("words", nargs="*", help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    given = options().read(arguments)
    if given.words:
        raise UserError(f"'{given.words[0]}' is no option (--help shows all)")
    if not given.checkpoint:
        raise UserError("which checkpoint? --checkpoint RUN, the folder that training named")
    return serve(given)


def serve(given: argparse.Namespace) -> int:
    from adaptive.evaluation.opening import locate
    from adaptive.inference.caching import inexact, with_cache
    from adaptive.inference.diffusion.batching import Engine as FillingEngine
    from adaptive.inference.engine import Engine
    from adaptive.runs.load import load
    from adaptive.runs.mirror import place_of
    from adaptive.runs.platform import keep_compilations, start_backend
    from adaptive.serving import server
    from adaptive.serving.served import served_by

    key = checked(given.key or os.environ.get(KEY, ""))
    socket = server.bound(given.host, given.port)
    if not key and not server.is_loopback(socket):
        raise UserError(
            f"--host {given.host} can be reached by others: give a --key (or {KEY}) that requests must carry"
        )
    _, found = locate(place_of(given.checkpoint, "--checkpoint"), given.step)
    if given.cache:
        found = found._replace(recipe=with_cache(found.recipe, given.cache, "--cache"))
    if name := inexact(found.recipe):
        say(f"note: with cache={name} the text is not what the model computes without a cache")
    start_backend()
    keep_compilations()
    trained = load(found, ema=given.ema)
    length = given.context or found.recipe.data.seq_len
    kind = FillingEngine if found.recipe.objective.fills_in else Engine
    if given.prefixes and kind is FillingEngine:
        raise UserError(f"--prefixes is for models that write from left to right, and {found.recipe.name} does not")
    prefixes = {"prefixes": given.prefixes} if given.prefixes else {}
    with started(kind, trained, rows=given.rows, length=length, queue=given.queue, **prefixes) as engine:
        served = served_by(engine, trained, engine.length, given.timeout)
        say(f"{found.recipe.name}, step {found.step}, at {server.address(socket)}")
        finished = server.serve(served, socket, given.host, key)
        engine.close(finish=finished)
    return 0 if finished else command.INTERRUPTED


def started(kind: Any, trained: "Trained", **options: int) -> Any:
    """The engine with its options, its programs compiled. Raises NoRoomError where its caches do not fit the memory."""
    import jax

    try:
        engine = kind.of(trained, **options)
        if hasattr(engine, "warm"):
            engine.warm()
        return engine
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED:" not in str(error):
            raise
        raise NoRoomError(
            f"caches of --rows {options['rows']} sequences with --context {options['length']} tokens each do not fit "
            f"the memory of {jax.local_devices()[0].device_kind}: give less of one"
        ) from None


def checked(key: str) -> str:
    """Raises UserError for what no header can carry."""
    if not all("!" <= char <= "~" for char in key):
        raise UserError(f"--key or {KEY}: letters, digits and signs of ASCII alone, without blanks")
    return key


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
