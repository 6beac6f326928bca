"""Continues texts with a trained model: adaptive generate --workdir RUN [--prompt TEXT]...

One text is shown as it is made, several when all are done. Ctrl-C ends with what there is. Diffusion models fill in
many tokens at once, as --steps, --block and --policy say (docs/diffusion.md).
Exit codes: 0 done, 2 something asked for cannot work, 130 interrupted, 141 nobody reads the output any more.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.generate"))

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from adaptive import command
from adaptive.command import number
from adaptive.errors import UserError
from adaptive.paths import local_path

if TYPE_CHECKING:
    import numpy as np

    from adaptive.inference.drawing import Drawing
    from adaptive.inference.sampling import Piece, Sampler
    from adaptive.recipe import Recipe
    from adaptive.runs.load import Trained

STREAMED = 4  # tokens per call while text is watched: smooth, and not much slower than many
MOST_TOKENS = 1_000_000
LARGEST = 1e4  # temperature and penalty, and their inverses: far beyond use, and no logit overflows


def options() -> command.Options:
    made = command.Options("generate", __doc__ or "")
    add = made.add_argument
    add("--workdir", default="", help="folder of the run; its newest checkpoint is read, parameters alone")
    add("--step", type=number(int, least=0), help="the checkpoint of this step instead")
    add(
        "--ema", action="store_true", help="with the running average of the parameters, of a run with train.ema above 0"
    )
    add("--prompt", action="append", default=[], metavar="TEXT",
        help="text to continue; several are computed together (default: the recipe's log.sample_prompt)")  # fmt: skip
    add("--prompt_file", action="append", default=[], metavar="FILE",
        help="the same from a file, taken as it is; - is standard input")  # fmt: skip
    add("--tokens", type=number(int, least=1, most=MOST_TOKENS), default=200,
        help="at most so many after each prompt (default 200)")  # fmt: skip
    add("--stop", action="append", default=[], metavar="TEXT",
        help="ends a continuation before this text; may be given several times")  # fmt: skip
    add("--ignore_end", action="store_true", help="goes on where the model ends the text")
    add("--temperature", type=number(float, least=0, most=LARGEST),
        help="below 1 favours what is likely; 0 always takes the likeliest (default 0.8; diffusion: 0)")  # fmt: skip
    add("--top_k", type=number(int, least=0), default=0,
        help="draws from the K likeliest tokens (default 0: from all)")  # fmt: skip
    add("--top_p", type=number(float, above=0, most=1), default=1.0,
        help="draws from the likeliest tokens that make up this share of the probability (default 1)")  # fmt: skip
    add("--min_p", type=number(float, least=0, most=1), default=0.0,
        help="draws from tokens with at least this share of the likeliest one's probability (default 0)")  # fmt: skip
    add("--repetition_penalty", type=number(float, least=1 / LARGEST, most=LARGEST), default=1.0,
        help="above 1: tokens that the text has already become less likely (default 1)")  # fmt: skip
    add("--seed", type=number(int, least=0, most=2**31 - 1), default=0, help="of the draws (default 0)")
    add("--json", action="store_true",
        help="prints one line of JSON per prompt: its text, token ids and their log-probabilities")  # fmt: skip
    add("--show_chunks", action="store_true", help="marks where the chunks of an H-Net begin")
    add("--show_depth", action="store_true", help="shows how many passes each token took, where tokens choose it")
    add("--show_experts", action="store_true",
        help="shows the strongest expert of each token; with --json those of every layer")  # fmt: skip
    add("--interactive", action="store_true",
        help="asks for one text after another, and continues each; Ctrl-D ends")  # fmt: skip
    add("--rows", type=number(int, least=0), help="how many rows the network inside an H-Net decodes together, or a "
        "pass of a recursion; 0: all (default: 1 in an H-Net for one text or on a CPU, otherwise 0)")  # fmt: skip
    add("--draft", type=number(int, least=1, most=64), default=0, metavar="N",
        help="up to N tokens are drafted by the first pass of a recursion and checked together by all: the same text, "
        "sooner where reading parameters takes the time")  # fmt: skip
    add("--draft_fixed", action="store_true", help="drafts N tokens always, however many of them are right")
    add("--cache", default="", metavar="POLICY",
        help="what a recursion keeps of its passes: per_pass, active_only, last, cycle(2), shared (default: as the "
        "recipe has it, model.body.cache); what a diffusion model keeps between calls: none, block, prefix, dual, "
        "delayed, greedy, window (default: block after block diffusion, else none)")  # fmt: skip
    add("--steps", type=number(int, least=1), help="diffusion: calls of the model for all tokens (default: one each)")
    add("--block", type=number(int, least=1), help="diffusion: tokens of a block, written in any order, blocks from "
        "left to right (default: as trained, else the largest divisor of --tokens up to 32)")  # fmt: skip
    add("--policy", default="", metavar="NAME(VALUES)", help="diffusion: what is written at a call: confidence, "
        "random, threshold(0.9), factor, editing, propagation, learned(FILE) (default: confidence)")  # fmt: skip
    add("--guidance", type=number(float, least=0, most=LARGEST),
        help="diffusion: how far to move away from the model without the prompt (default 0)")  # fmt: skip
    add("--show_steps", action="store_true", help="diffusion: shows which call wrote each token")
    add("words", nargs="*", help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments, interrupted="interrupted before the first token")


def run(arguments: Sequence[str]) -> int:
    begin = time.perf_counter()
    given = options().read(arguments)
    if given.words:
        word = given.words[0]
        raise UserError(f"'{word}' is no option (--help shows all); a text to continue is --prompt '{word}'")
    if not given.workdir:
        raise UserError("which run? --workdir RUN, the folder that training named")
    if given.temperature and given.temperature < 1 / LARGEST:
        raise UserError(f"--temperature {given.temperature} is too small: 0 takes the likeliest token")
    if "" in given.stop:
        raise UserError("--stop is empty: give the text before which a continuation ends")
    marks = [f"--{name}" for name in ("show_chunks", "show_depth", "show_steps") if getattr(given, name)]
    if given.json and marks:
        raise UserError(f"--json has no marks: leave out {' and '.join(marks)}")
    if given.interactive and (given.prompt or given.prompt_file):
        raise UserError("--interactive asks for the texts: leave out --prompt and --prompt_file")
    return generate(given, begin)


def generate(given: argparse.Namespace, begin: float) -> int:
    prompts = read_prompts(given)
    import jax

    from adaptive.inference.caching import inexact, with_cache
    from adaptive.inference.sampling import prompt_tokens
    from adaptive.inference.show import tell
    from adaptive.runs.load import find, load
    from adaptive.runs.platform import keep_compilations, start_backend

    found = find(given.workdir, given.step)
    check_marks(given, found.recipe)
    fills = fills_in(given, found.recipe)
    if given.cache and not fills:
        found = found._replace(recipe=with_cache(found.recipe, given.cache, "--cache"))
    start_backend()
    keep_compilations()
    trained = load(found, ema=given.ema)
    if trained.refuse_generation and not fills:
        raise UserError(f"{found.recipe.name} cannot generate: {trained.refuse_generation}")
    texts = [] if given.interactive else prompts or [found.recipe.log.sample_prompt]
    encoded = [(text, prompt_tokens(trained.tokenizer, text)) for text in texts]
    tell(f"{found.recipe.name}, step {trained.step}, on {jax.local_devices()[0].device_kind}")
    if fills:
        return filled_in(given, trained, encoded, begin)
    if name := inexact(found.recipe):
        tell(f"note: with cache={name} the text is not what the model computes without a cache; what that costs: "
             f"adaptive evaluate --caches {name}")  # fmt: skip
    sampler = sampler_of(given, trained, len(texts) or 1)
    if not given.interactive:
        return command.INTERRUPTED if continued(given, trained, sampler, encoded, begin) else 0
    tell("a text in each line; Ctrl-C ends a continuation, Ctrl-D all of it")
    for turn, text in enumerate(asked()):
        begin = time.perf_counter()
        continued(given, trained, sampler, [(text, prompt_tokens(trained.tokenizer, text))], begin, turn)
    return 0


def fills_in(given: argparse.Namespace, recipe: "Recipe") -> bool:
    """Whether the run's model fills in hidden tokens, rather than to predict the next one. Raises UserError for options
    of the other kind."""
    filling = [f"--{name}" for name in ("steps", "block", "policy", "guidance", "show_steps") if getattr(given, name)]
    aim = recipe.objective
    fills = aim.fills_in or (bool(filling) and aim.denoising() is not None)
    if filling and not fills:
        raise UserError(
            f"{filling[0]} is for diffusion models, and {recipe.name} was trained with objective={aim.kind()}: it "
            "continues texts token by token"
        )
    drawing = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    if fills and (other := [f"--{name}" for name, usual in drawing.items() if getattr(given, name) != usual]):
        raise UserError(
            f"{other[0]} is for models that predict the next token, and {recipe.name} was trained with "
            f"objective={aim.kind()}: it fills in many at once; --temperature and --policy say how"
        )
    return fills


def filled_in(
    given: argparse.Namespace, trained: "Trained", encoded: Sequence[tuple[str, "np.ndarray"]], begin: float
) -> int:
    """Writes and shows texts with a diffusion model."""
    import jax

    from adaptive.inference.diffusion.texts import Asked, Shown, decoder_of, remarks
    from adaptive.inference.sampling import prompt_tokens
    from adaptive.inference.show import tell

    end = None if given.ignore_end else trained.tokenizer.eos_id
    options = given.steps, given.block, given.policy, given.cache, given.guidance or 0.0, given.temperature or 0.0
    decoder = decoder_of(Asked(given.tokens, *options, end=end), trained)

    def write(encoded: Sequence[tuple[str, "np.ndarray"]], key: jax.Array, begin: float) -> bool:
        texts, ids = zip(*encoded, strict=True)
        for note in remarks(decoder, trained, max(map(len, ids)) + given.tokens):
            tell(note)
        shown = Shown(trained, texts, begin, steps=given.show_steps, stops=given.stop, as_json=given.json)
        return shown.all(decoder, ids, key)

    key = jax.random.key(given.seed)
    if not given.interactive:
        return command.INTERRUPTED if write(encoded, key, begin) else 0
    tell("a text in each line; Ctrl-C ends a continuation, Ctrl-D all of it")
    for turn, text in enumerate(asked()):
        start = time.perf_counter()
        write([(text, prompt_tokens(trained.tokenizer, text))], jax.random.fold_in(key, turn), start)
    return 0


def check_marks(given: argparse.Namespace, recipe: "Recipe") -> None:
    """Raises UserError for options of models that the run's is none of."""
    facts = recipe.model.facts()
    if not facts.chunking and given.show_chunks:
        raise UserError(f"--show_chunks is for H-Nets that chunk, and {recipe.name} does not")
    if not facts.chunking and facts.depth == "none" and given.rows is not None:
        raise UserError(f"--rows is for H-Nets that chunk and for tokens that choose their depth, not {recipe.name}")
    if given.show_experts and not facts.experts:
        raise UserError(f"--show_experts is for models with experts, and {recipe.name} has none")
    if given.show_experts and given.rows:
        raise UserError("--show_experts is told of all rows together: leave out --rows")
    if given.draft or given.draft_fixed:
        check_draft(given, recipe)
    if given.show_depth and facts.depth == "none":
        raise UserError(f"--show_depth is for models whose tokens choose it, and those of {recipe.name} do not")


def check_draft(given: argparse.Namespace, recipe: "Recipe") -> None:
    """Raises UserError where nothing can be drafted."""
    from adaptive.inference.engine.speculation import refuse

    if not given.draft:
        raise UserError("--draft_fixed needs --draft N: how many tokens?")
    if given.interactive or given.rows or given.show_experts:
        raise UserError("--draft goes with neither --interactive nor --rows nor --show_experts")
    if reason := refuse(recipe.model):
        raise UserError(f"--draft: {reason}")


def drafted(given: argparse.Namespace, trained: "Trained", ids: Sequence["np.ndarray"]) -> Iterator["Piece"]:
    """What the sampler gives, by an engine whose recursion drafts."""
    from adaptive.inference.engine import Engine
    from adaptive.inference.engine.pieces import pieces
    from adaptive.inference.engine.speculation import Drafting
    from adaptive.inference.requests import Request

    end = None if given.ignore_end else trained.tokenizer.eos_id
    request = Request(ids[0], given.tokens, drawing_of(given), seed=given.seed, end=end)
    drafting = Drafting(given.draft, adapts=not given.draft_fixed)
    length = max(map(len, ids)) + given.tokens
    with Engine.of(trained, rows=len(ids), length=length, queue=len(ids), drafting=drafting) as engine:
        yield from pieces(engine, ids, request)


def drawing_of(given: argparse.Namespace) -> "Drawing":
    from adaptive.inference.drawing import Drawing

    temperature = 0.8 if given.temperature is None else given.temperature
    return Drawing(temperature, given.top_k, given.top_p, given.min_p, given.repetition_penalty)


def continued(
    given: argparse.Namespace,
    trained: "Trained",
    sampler: "Sampler",
    encoded: Sequence[tuple[str, "np.ndarray"]],
    begin: float,
    turn: int = 0,
) -> bool:
    """Continues and shows texts together, each given with its tokens; whether Ctrl-C ended it. turn: of an interactive
    command, whose draws differ."""
    import jax

    from adaptive.inference.show import Show, tell

    texts, ids = zip(*encoded, strict=True)
    longest, trained_on = max(map(len, ids)) + given.tokens, trained.recipe.data.seq_len
    if longest > trained_on:
        tell(f"note: up to {longest} tokens, but it was trained on sequences of {trained_on}")
    at_once = STREAMED if len(ids) == 1 and sys.stdout.isatty() else 32
    key = jax.random.key(given.seed)
    key = jax.random.fold_in(key, turn) if turn else key
    pieces = drafted(given, trained, ids) if given.draft else sampler(ids, given.tokens, key, at_once=at_once)
    marks = {"marks": given.show_chunks, "depths": given.show_depth, "experts": given.show_experts}
    return Show(trained, texts, begin, **marks, stops=given.stop, as_json=given.json).all(pieces)


def sampler_of(given: argparse.Namespace, trained: "Trained", texts: int) -> "Sampler":
    from adaptive.inference.sampling import Sampler, marker_of

    stages = len(trained.recipe.model.facts().chunking)
    return Sampler(
        trained.graphdef,
        trained.state,
        how=drawing_of(given),
        vocab=trained.tokenizer.vocab_size,
        end=None if given.ignore_end else trained.tokenizer.eos_id,
        rows=rows_at_once(stages, texts) if given.rows is None else given.rows,
        marker=marker_of(trained.recipe, trained.tokenizer),
        record=given.show_experts,
    )


def asked() -> Iterator[str]:
    """Lines of standard input that are not empty; on a terminal it is asked for them."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys in `input`
    while True:
        if terminal:
            print("\n> ", end="", file=sys.stderr, flush=True)
        try:
            line = input()
        except EOFError:
            return
        if line:
            yield line


def rows_at_once(stages: int, texts: int) -> int:
    """How many rows an H-Net decodes together by default: one on a CPU, where that is fastest; all on an accelerator.

    0 stands for all.
    """
    import jax

    return int(stages > 0 and (texts == 1 or jax.local_devices()[0].platform == "cpu"))


def read_prompts(given: argparse.Namespace) -> list[str]:
    """Those of --prompt, then those of --prompt_file. Raises UserError for a file that cannot be read as text."""
    texts = list(given.prompt)
    for name in given.prompt_file:
        path = local_path(name, "--prompt_file")
        try:
            content = sys.stdin.buffer.read() if name == "-" else path.read_bytes()
            texts.append(content.decode("utf-8"))
        except OSError as error:
            raise UserError(f"--prompt_file {name}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt_file {name} is not UTF-8 text: byte {error.start} cannot be read") from None
    return texts
