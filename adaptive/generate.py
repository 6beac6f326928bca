"""python -m adaptive.generate --workdir RUN [--prompt TEXT]...: continues texts with a trained model.

    --workdir RUN      folder of the run; its newest checkpoint is read, parameters alone
    --step N           the checkpoint of this step instead
    --prompt TEXT      text to continue; several are computed together (default: the recipe's log.sample_prompt)
    --prompt_file F    the same from a file, taken as it is; - is standard input
    --tokens 200       at most so many tokens after each prompt; a row ends before that where the model ends the text
    --temperature 0.8  below 1 favours what is likely; 0 always takes the likeliest
    --top_p 1.0        draws from the likeliest tokens that make up this share of the probability
    --seed 0           of the draws
    --show_chunks      marks where the chunks of an H-Net begin
    --rows N           how many rows the network inside an H-Net decodes together; 0: all, chunk or not (default: 1 for
                       a single text or on a CPU, otherwise 0)

One text is shown as it is made, several when all are done. Ctrl-C ends with what there is.
Exit codes: 0 done, 2 something asked for cannot work, 130 interrupted.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from adaptive import command
from adaptive.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "", "folder of the run", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "the checkpoint of this step", flag_values=FLAGS)
flags.DEFINE_multi_string("prompt", [], "text to continue", flag_values=FLAGS)
flags.DEFINE_multi_string("prompt_file", [], "file with a text to continue", flag_values=FLAGS)
flags.DEFINE_integer("tokens", 200, "at most so many tokens", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.8, "0: the likeliest", lower_bound=0.0, flag_values=FLAGS)
flags.DEFINE_float("top_p", 1.0, "share of the probability", lower_bound=0.0, upper_bound=1.0, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of the draws", flag_values=FLAGS)
flags.DEFINE_bool("show_chunks", False, "mark where chunks begin", flag_values=FLAGS)
flags.DEFINE_integer("rows", None, "rows decoded together", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=FLAGS)

STREAMED = 4  # tokens per call while text is watched: smooth, and not much slower than many


def main(arguments: Sequence[str]) -> int:
    try:
        return command.exit_code(run, arguments, interrupted="interrupted before the first token")
    except BrokenPipeError:  # whoever read the text has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(arguments: Sequence[str]) -> int:
    begin = time.perf_counter()
    check(command.parse(FLAGS, arguments))
    if FLAGS.help:
        print(__doc__)
        return 0
    return generate(begin)


def check(rest: Sequence[str]) -> None:
    """Raises UserError for words that are no options, and for options without sense."""
    if rest:
        raise UserError(f"'{rest[0]}' is no option (--help shows all); a text to continue is --prompt '{rest[0]}'")
    if not FLAGS.help and not FLAGS.workdir:
        raise UserError("which run? --workdir RUN, the folder that training named")
    if FLAGS.top_p == 0:
        raise UserError("--top_p=0 leaves nothing to draw from: above 0, or --temperature 0 for the likeliest token")


def generate(begin: float) -> int:
    prompts = read_prompts()
    import jax

    from adaptive.inference.sampling import Sampler, marker_of, prompt_tokens
    from adaptive.inference.show import Show, tell
    from adaptive.runs.load import find, load
    from adaptive.runs.platform import keep_compilations

    found = find(FLAGS.workdir, FLAGS.step)
    texts = prompts or [found.recipe.log.sample_prompt]
    stages = len(found.recipe.model.facts().chunking)
    if not stages and (FLAGS.rows is not None or FLAGS.show_chunks):
        name = "show_chunks" if FLAGS.show_chunks else "rows"
        raise UserError(f"--{name} is for H-Nets that chunk, and {found.recipe.name} does not")
    keep_compilations()
    trained = load(found)
    if trained.refuse_generation:
        raise UserError(f"{found.recipe.name} cannot generate: {trained.refuse_generation}")
    ids = [prompt_tokens(trained.tokenizer, text) for text in texts]
    longest, trained_on = max(map(len, ids)) + FLAGS.tokens, found.recipe.data.seq_len
    tell(f"{found.recipe.name}, step {trained.step}, on {jax.local_devices()[0].device_kind}")
    if longest > trained_on:
        tell(f"note: up to {longest} tokens, but it was trained on sequences of {trained_on}")
    sampler = Sampler(
        trained.graphdef,
        trained.state,
        temperature=FLAGS.temperature,
        top_p=FLAGS.top_p,
        vocab=trained.tokenizer.vocab_size,
        end=trained.tokenizer.eos_id,
        rows=rows_at_once(stages, len(ids)) if FLAGS.rows is None else FLAGS.rows,
        marker=marker_of(found.recipe, trained.tokenizer),
    )
    at_once = STREAMED if len(ids) == 1 and sys.stdout.isatty() else 32
    pieces = sampler(ids, FLAGS.tokens, jax.random.key(FLAGS.seed), at_once=at_once)
    show = Show(trained, len(ids), begin, marks=FLAGS.show_chunks)
    return command.INTERRUPTED if show.all(pieces) else 0


def rows_at_once(stages: int, texts: int) -> int:
    """How many rows an H-Net decodes together by default: one on a CPU, where that is fastest; all on an accelerator.

    0 stands for all.
    """
    import jax

    return int(stages > 0 and (texts == 1 or jax.local_devices()[0].platform == "cpu"))


def read_prompts() -> list[str]:
    """Those of --prompt, then those of --prompt_file. Raises UserError for a file that cannot be read as text."""
    texts = list(FLAGS.prompt)
    for name in FLAGS.prompt_file:
        try:
            content = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
            texts.append(content.decode("utf-8"))
        except OSError as error:
            raise UserError(f"--prompt_file {name}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt_file {name} is not UTF-8 text: byte {error.start} cannot be read") from None
    return texts


if __name__ == "__main__":
    sys.exit(command.start(main))
