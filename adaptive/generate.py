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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

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
INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    begin = time.perf_counter()
    try:
        parse(argv)
        if FLAGS.help:
            print(__doc__)
            return 0
        return run(begin)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted before the first token", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the text has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse(argv: Sequence[str]) -> None:
    """Sets FLAGS from the command line. Raises UserError for what is no option and for options without sense."""
    FLAGS.unparse_flags()
    FLAGS.set_gnu_getopt(True)
    try:
        rest = FLAGS(list(argv))[1:]
    except flags.Error as error:
        raise UserError(f"{error} (--help shows all options)") from None
    if rest:
        raise UserError(f"'{rest[0]}' is no option (--help shows all); a text to continue is --prompt '{rest[0]}'")
    if not FLAGS.help and not FLAGS.workdir:
        raise UserError("which run? --workdir RUN, the folder that training named")
    if FLAGS.top_p == 0:
        raise UserError("--top_p=0 leaves nothing to draw from: above 0, or --temperature 0 for the likeliest token")


def run(begin: float) -> int:
    prompts = read_prompts()
    import jax

    from adaptive.inference.sampling import Sampler, marker_of, prompt_tokens
    from adaptive.runs.load import find, load
    from adaptive.runs.platform import keep_compilations

    found = find(FLAGS.workdir, FLAGS.step)
    texts = prompts or [found.recipe.log.sample_prompt]
    stages = found.recipe.model.hnet.stages
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
    return Show(trained, len(ids), begin).all(pieces)


def rows_at_once(stages: int, texts: int) -> int:
    """Of H-Nets: on a CPU one row after another is fastest; an accelerator would wait for each of many."""
    import jax

    return int(stages > 0 and (texts == 1 or jax.local_devices()[0].platform == "cpu"))


class Show:
    """Prints what comes and tells at the end what it took."""

    def __init__(self, trained: Any, rows: int, begin: float):
        from adaptive.inference.marks import Writer

        self._trained, self._begin = trained, begin
        self._stages = trained.recipe.model.hnet.stages
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._writers = [Writer(trained.tokenizer, marks=FLAGS.show_chunks, colour=self._colour) for _ in range(rows)]
        self._texts = [""] * rows
        self._made: list[tuple[float, int]] = []  # when a piece came, and its tokens

    def all(self, pieces: Iterator[Any]) -> int:
        code = 0
        if FLAGS.show_chunks:
            from adaptive.inference.marks import legend

            print(legend(self._stages, self._colour) + "\n", flush=True)
        try:
            for piece in pieces:
                self._add(piece)
        except KeyboardInterrupt:
            code = INTERRUPTED
        for r, writer in enumerate(self._writers):
            self._put(r, writer.finish())
        if len(self._writers) == 1:
            print(flush=True)
        else:
            print("\n\n".join(f"--- {r + 1} of {len(self._texts)}\n{t}" for r, t in enumerate(self._texts)), flush=True)
        self._report(interrupted=code != 0)
        return code

    def _add(self, piece: Any) -> None:
        if not piece.prompt:
            self._made.append((time.perf_counter(), int(piece.valid.sum())))
        for r, writer in enumerate(self._writers):
            there = piece.valid[r]
            self._put(r, writer.push(piece.tokens[r, there], piece.boundaries[:, r, there]))

    def _put(self, row: int, text: str) -> None:
        if len(self._writers) == 1:
            print(text, end="", flush=True)
        else:
            self._texts[row] += text

    def _report(self, interrupted: bool) -> None:
        first = self._made[0][0] if self._made else time.perf_counter()
        line = f"{sum(n for _, n in self._made)} tokens, the first after {first - self._begin:.1f} s"
        later, seconds = sum(n for _, n in self._made[1:]), self._made[-1][0] - first if self._made else 0.0
        if later and seconds > 0:
            line += f", then {later / seconds:.0f} per second"
            if len(self._writers) > 1:
                line += f" over {len(self._writers)} rows"
        tell(("interrupted: " if interrupted else "") + line)
        if self._stages:
            self._report_chunks()

    def _report_chunks(self) -> None:
        from adaptive.account import account, dense_equivalent
        from adaptive.inference.marks import together

        total = together([writer.tally() for writer in self._writers])
        if not total.bytes or not all(total.chunks):
            return
        sizes = ", ".join(f"stage {s} {total.bytes / n:.2f}" for s, n in enumerate(total.chunks))
        model, length = self._trained.recipe.model, total.bytes / len(self._writers)
        taken = [n / len(self._writers) for n in total.chunks]
        cost = account(model, round(length), taken).forward_flops_per_token
        whole = dense_equivalent(model, round(length)).forward_flops_per_token
        tell(f"bytes per chunk: {sizes}; {cost / 1e6:.3g} MFLOP per byte, {cost / whole:.0%} of a chunk at every byte")


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


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(main(sys.argv))
