"""Continues texts with a trained model: adaptive generate --workdir RUN [--prompt TEXT]...

One text is shown as it is made, several when all are done. Ctrl-C ends with what there is.
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

    from adaptive.inference.sampling import Sampler
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
    add("--temperature", type=number(float, least=0, most=LARGEST), default=0.8,
        help="below 1 favours what is likely; 0 always takes the likeliest (default 0.8)")  # fmt: skip
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
    add("--interactive", action="store_true",
        help="asks for one text after another, and continues each; Ctrl-D ends")  # fmt: skip
    add("--rows", type=number(int, least=0), help="how many rows the network inside an H-Net decodes together; 0: all, "
        "chunk or not (default: 1 for a single text or on a CPU, otherwise 0)")  # fmt: skip
    add("--cache", default="", metavar="POLICY",
        help="what a recursion keeps of its passes: per_pass, active_only, last, cycle(2), shared (default: as the "
        "recipe has it, model.body.cache)")  # fmt: skip
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
    if 0 < given.temperature < 1 / LARGEST:
        raise UserError(f"--temperature {given.temperature} is too small: 0 takes the likeliest token")
    if "" in given.stop:
        raise UserError("--stop is empty: give the text before which a continuation ends")
    marks = [f"--{name}" for name in ("show_chunks", "show_depth") if getattr(given, name)]
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
    if given.cache:
        found = found._replace(recipe=with_cache(found.recipe, given.cache, "--cache"))
    start_backend()
    keep_compilations()
    trained = load(found, ema=given.ema)
    if trained.refuse_generation:
        raise UserError(f"{found.recipe.name} cannot generate: {trained.refuse_generation}")
    texts = [] if given.interactive else prompts or [found.recipe.log.sample_prompt]
    encoded = [(text, prompt_tokens(trained.tokenizer, text)) for text in texts]
    tell(f"{found.recipe.name}, step {trained.step}, on {jax.local_devices()[0].device_kind}")
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


def check_marks(given: argparse.Namespace, recipe: "Recipe") -> None:
    """Raises UserError for options of models that the run's is none of."""
    facts = recipe.model.facts()
    if not facts.chunking and (given.rows is not None or given.show_chunks):
        name = "show_chunks" if given.show_chunks else "rows"
        raise UserError(f"--{name} is for H-Nets that chunk, and {recipe.name} does not")
    if given.show_depth and facts.depth == "none":
        raise UserError(f"--show_depth is for models whose tokens choose it, and those of {recipe.name} do not")


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
    pieces = sampler(ids, given.tokens, key, at_once=at_once)
    marks = {"marks": given.show_chunks, "depths": given.show_depth}
    return Show(trained, texts, begin, **marks, stops=given.stop, as_json=given.json).all(pieces)


def sampler_of(given: argparse.Namespace, trained: "Trained", texts: int) -> "Sampler":
    from adaptive.inference.drawing import Drawing
    from adaptive.inference.sampling import Sampler, marker_of

    stages = len(trained.recipe.model.facts().chunking)
    return Sampler(
        trained.graphdef,
        trained.state,
        how=Drawing(given.temperature, given.top_k, given.top_p, given.min_p, given.repetition_penalty),
        vocab=trained.tokenizer.vocab_size,
        end=None if given.ignore_end else trained.tokenizer.eos_id,
        rows=rows_at_once(stages, texts) if given.rows is None else given.rows,
        marker=marker_of(trained.recipe, trained.tokenizer),
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
