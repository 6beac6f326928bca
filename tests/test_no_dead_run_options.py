"""Every setting of a run besides its model's does something: another value is seen where it should be.

What is looked at: the batches read, the optimizer's program, the train step on a mesh of emulated devices, what the
loop asks of its parts, and which checkpoints stay. Nothing is compiled but sums of a small state.
"""

import contextlib
import dataclasses
import functools
import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx

from adaptive import settings
from adaptive.data import pipeline
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import NonFiniteError, UserError
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import token_choice
from adaptive.optim.build import make_optimizer
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import Recipe, setting_kinds
from adaptive.runs import initial
from adaptive.runs.checkpoint import Checkpoints
from adaptive.runs.state import TrainState
from adaptive.training import continuation as continuations
from adaptive.training import loop as loops
from adaptive.training import program as programs
from adaptive.training import tracking as dashboards
from adaptive.training.evaluation import Evaluator
from adaptive.training.loop import Loop
from adaptive.training.report.schema import PlanRecord
from adaptive.training.step import make_train_step
from adaptive.training.stopping import Agreed
from adaptive.training.stragglers import Stragglers
from kernels_pallas.choice import active_target

pytestmark = pytest.mark.compiles

SEQ, ROWS, STEPS = 32, 8, 12
BLOCK = "model.body.stack.blocks.0.feed_forward"

# Settings that a setting needs beside it. FOLDER is the test's.
SPREAD = ["mesh.expert=4", "mesh.expert_parallel.strategy=expert"]
WORDS = ["data.tokenizer=FOLDER/tokenizer.json", "data.source=files", "data.paths=FOLDER/documents.jsonl"]
NEEDS = {
    "data.weights": ["data.paths=english,python"],
    "data.text_key": ["data.source=files", "data.paths=FOLDER/documents.jsonl"],
    "data.bos": WORDS,
    "data.eos": WORDS,
    "data.prompt_key": ["data.source=files", "data.paths=FOLDER/documents.jsonl"],
    "data.token_dtype": ["data.source=tokens", "data.paths=FOLDER/tokens.bin"],
    "data.boundaries": ["data.tokenizer=hnet-bytes"],
    "mesh.expert_parallel.strategy": ["mesh.expert=4"],
    "mesh.expert_parallel.exchange": [*SPREAD, "mesh.expert_parallel.nodes=2", f"{BLOCK}.execution=capacity"],
    "mesh.expert_parallel.nodes": [
        "mesh.expert=8", "mesh.expert_parallel.strategy=expert", "mesh.expert_parallel.nodes=2",
        "mesh.expert_parallel.exchange=hierarchical", f"{BLOCK}.execution=capacity",
    ],
    "mesh.context_schedule": ["mesh.context=4"],
    "mesh.stage_groups": ["mesh.stage=2", "model.body.stack.repeats=4"],
    "mesh.expert_parallel.overlap": SPREAD,
    "mesh.expert_parallel.buffer_factor": [*SPREAD, f"{BLOCK}.execution=ragged"],
    "eval.draws": ["objective=masked_diffusion"],
    "train.device_batch_size": ["train.batch_size=16"],
    "train.auxiliary_over": ["train.batch_size=16", "train.device_batch_size=1"],
    "log.profile_start": ["log.profile_steps=2"],
    "init.step": ["init.run=other"],
    "init.optimizer": ["init.run=other"],
    "init.fresh": ["init.run=other"],
    **{f"optimizer.{name}": ["optimizer=muon"] for name in ("momentum", "rms")},
}  # fmt: skip

# Other values, where they are not simply the next.
OTHERS = {
    "data.source": "synthetic", "data.paths": "python", "data.weights": "0.9,0.1", "data.tokenizer": "hnet-bytes",
    "data.bos": "<s>", "data.eos": "<eos>", "data.text_key": "title", "data.prompt_key": "title",
    "data.cache_dir": "FOLDER/other",
    "optimizer": "muon", "optimizer.beta1": "0.8",
    "optimizer.beta2": "0.9", "optimizer.momentum": "0.9",
    "schedule.decay_fraction": "0.5", "schedule.floor": "0.5", "mesh.data": "4", "mesh.fsdp": "2", "mesh.expert": "2",
    "mesh.tensor": "2", "mesh.context": "2", "mesh.stage": "2", "mesh.slices": "3",
    "mesh.context_schedule": "ring",
    "mesh.expert_parallel.strategy": "gather", "mesh.expert_parallel.exchange": "hierarchical",
    "mesh.expert_parallel.nodes": "4", "mesh.expert_parallel.buffer_factor": "1.5", "train.compute_dtype": "bfloat16",
    "train.remat": "layer", "train.kernels": "reference",
    "train.loss_chunk": "8", "train.device_batch_size": "1", "train.batch_size": "16",
    "train.max_bad_steps": "3", "eval.selection": "threshold", "log.profile_steps": "3", "train.frozen": "embedding",
    "train.ema": "0.9", "init.fresh": "head",
}  # fmt: skip


def base() -> Recipe:
    routed = experts.Settings(token_choice.Settings(capacity_factor=1.0), experts=8, expert_size=16)
    model = shapes.plain(2, vocab_size=320, width=32, feed_forward=routed)
    return Recipe(name="base", model=model).with_(
        f"data.seq_len={SEQ}", "data.cache_dir=FOLDER/cache", f"train.batch_size={ROWS}", f"train.steps={STEPS}",
        "train.max_bad_steps=9", "train.compute_dtype=float32", "schedule.warmup_steps=2", "eval.every=4",
        "checkpoint.every=3", "checkpoint.keep_last=2", "log.every=5",
    )  # fmt: skip


PATHS = [path for path in setting_kinds(base()) if not path.startswith(("model", "objective"))]
PATHS += [path for path in NEEDS if path not in PATHS]


# Looks


def batches(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """What is read, how far ahead, by whom, and where it is kept."""
    asked: list[Any] = []
    options = pipeline.grain.ReadOptions
    patch.setattr(pipeline.grain, "ReadOptions", lambda **given: asked.append(given) or options(**given))
    data = pipeline.open_data(recipe.data, batch_size=2, vocab_size=320)
    stream = data.train()
    read = [next(stream), next(stream), *data.validation(2)]
    stream.close()
    arrays = [None if a is None else np.asarray(a).tobytes() for batch in read for a in batch]
    return arrays, asked, type(stream).__name__, sorted(path.name for path in folder.iterdir())


def updates(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """The optimizer's program."""
    tx = make_optimizer(recipe.optimizer, recipe.schedule, recipe.train.steps)
    params = nnx.state(nnx.eval_shape(lambda: recipe.model.build(jax.random.key(0))), nnx.Param)
    return text(jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p))(params))


def step(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    return step_program(recipe)


@functools.lru_cache(maxsize=8)
def step_program(recipe: Recipe) -> Any:
    """The train step's program on the recipe's mesh, and the key that a run begins with."""
    with pytest.MonkeyPatch.context() as patch:
        return traced_step(recipe, patch)


def traced_step(recipe: Recipe, patch: pytest.MonkeyPatch) -> Any:
    made: list[Any] = []

    def make(*arguments: Any, **options: Any) -> Any:
        made.append(make_train_step(*arguments, **options))
        return lambda state, batch: (state, {})  # what is compiled in its place

    patch.setattr(programs, "make_train_step", make)
    patch.setattr(programs, "fresh_state", lambda build, tx, key, *where, ema: jax.random.key_data(key).tolist())
    program = programs.Program(recipe, make_mesh(recipe.mesh, jax.devices()))
    program.compile_train_step()
    with program.placed():
        shown = text(jax.make_jaxpr(made[0])(program.abstract_state(), program.abstract_batch()))
    return shown, program.fresh_state()


def forms(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """Which forms of operations the model's code gets."""
    with programs.Program(recipe, make_mesh(recipe.mesh, jax.devices())).placed():
        return active_target()


def running(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """What the loop does, and when: every step of this run fails."""
    did: list[Any] = []
    patch.setattr(jax.profiler, "start_trace", lambda folder: did.append("profile"))
    patch.setattr(jax.profiler, "stop_trace", lambda: did.append("profiled"))

    @contextlib.contextmanager
    def limit(name: str, seconds: float):
        did.append((name, seconds))
        yield

    bad = jax.tree.map(jnp.asarray, {"skipped": 1, "loss": np.nan, "grad_norm": 1.0})
    clock = iter(range(10**6))
    patch.setattr(loops.time, "monotonic", lambda: next(clock))
    patch.setattr(loops, "repeated", lambda call, *given: did.append("repeated") or call(*given))
    meter = types.SimpleNamespace(
        steps=1,
        waited=lambda s, ready: None,
        add=lambda m, at: None,
        row=lambda n, **columns: (n, columns),
    )
    spent = types.SimpleNamespace(goodput=None)
    account = types.SimpleNamespace(waited=lambda s: None, note=lambda done: None, spent=lambda: spent)
    loop: Any = types.SimpleNamespace(
        recipe=recipe, meter=meter, watchdog=types.SimpleNamespace(limit=limit), late=loops.OneStepLate(),
        folder=types.SimpleNamespace(profile=folder, path=folder), first_row=True, bad_in_row=0, say=lambda line: None,
        steps=lambda number, state, batch: (state, bad), read_s=[], read_before=[],
        program=types.SimpleNamespace(for_training=lambda batch: batch),
        progress=types.SimpleNamespace(step=lambda done: None), account=account, primary=True,
        stragglers=Stragglers(), saved_at=0, settles=True,
        stop=types.SimpleNamespace(agree=lambda *, save: Agreed(False, save), check=None),
        save=lambda done, *rest: did.append(("save", done)), aside=lambda kind: contextlib.nullcontext(),
        evaluate=lambda state, done, go_on: did.append(("evaluate", done)), prepare=lambda *given: None,
        checkpoints=types.SimpleNamespace(rate=lambda done, loss: True), evaluator=types.SimpleNamespace(compiled=True),
        record=lambda row: did.append(row), schedule=lambda number: 0.0,
    )  # fmt: skip
    for name in ("absorb", "not_finite", "evaluation_due", "next_batch", "take", "save_due", "write_row",
                 "evaluate_and_rate"):  # fmt: skip
        setattr(loop, name, types.MethodType(getattr(Loop, name), loop))
    state = types.SimpleNamespace(state=dict)
    try:
        Loop.train(loop, state, 0, Endless())
    except NonFiniteError as error:
        did.append(str(error))
    return did


def limits(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """How long what is no step may take."""
    did: list[Any] = []
    watchdog = types.SimpleNamespace(limit=lambda *given: did.append(given) or contextlib.nullcontext())
    loop: Any = types.SimpleNamespace(
        recipe=recipe, watchdog=watchdog, settles=False, settled=contextlib.nullcontext,
        absorb=lambda *given, row: None, late=loops.OneStepLate(), aside=lambda kind: contextlib.nullcontext(),
        say=lambda line: None,
        steps=types.SimpleNamespace(due=lambda step: True, prepare=lambda step: types.SimpleNamespace(seconds=1.0)),
        run_tracked=lambda: 0, tracker=types.SimpleNamespace(finish=lambda: None),
    )  # fmt: skip
    Loop.prepare(loop, 1, None, None)
    Loop.run(loop)
    return did


class Endless:
    """Batches of nothing."""

    def __next__(self) -> None:
        return None

    def state(self) -> dict:
        return {}


def tracking(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """What the dashboards are started with."""
    asked: list[Any] = []
    patch.setattr(dashboards.weights_and_biases, "start", lambda *given: asked.append(given[:-1]))
    patch.setattr(dashboards.tensorboard, "start", lambda *given: asked.append(given[:-1]))
    known = types.SimpleNamespace(path=folder, run_id="")
    loop: Any = types.SimpleNamespace(recipe=recipe, plan=PlanRecord(), folder=known)
    dashboards.start_tracking(recipe.log, Loop.about(loop, {}, 0), print)
    return asked


def beginning(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """What a new run begins from."""
    asked: list[Any] = []
    found = types.SimpleNamespace(checkpoints=folder, step=0)
    patch.setattr(initial, "find", lambda run, number: asked.append((run, number)) or found)
    names = ["params/head", "params/body/norm", "opt/mu/head"]

    def read_part(folder: Path, number: int, part: Any, leave: Callable[[str], bool]) -> dict:
        asked.append((sorted(part), [leave(name) for name in names]))
        return {}

    patch.setattr(initial, "read_part", read_part)
    params = nnx.State({"head": nnx.Param(jnp.zeros(())), "body": {"norm": nnx.Param(jnp.zeros(()))}})
    zero = jnp.zeros((), jnp.int32)
    initial.begun(recipe.init, TrainState(zero, zero, params, nnx.State({}), {}, zero))
    return asked


def sampling(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """What a continuation is asked for."""
    asked: list[Any] = []
    written = lambda g, s, prompt, count, key, **rest: asked.append((list(prompt), count)) or []  # noqa: E731
    patch.setattr(continuations, "sample", written)
    program: Any = types.SimpleNamespace(recipe=recipe, refuse_generation="", graphdef=None)
    state: Any = types.SimpleNamespace(params=nnx.State({}), buffers=nnx.State({}))
    continuations.continuation(program, load_tokenizer("bytes"), state, print)
    return asked


def evaluating(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """How, and on how many batches, a model is evaluated."""
    asked: list[Any] = []
    program: Any = types.SimpleNamespace(
        recipe=recipe, facts=recipe.model.facts(), mesh=make_mesh(recipe.mesh, jax.devices()),
        selections=("topk", "threshold"), eval_step=lambda lengths, mode: asked.append(mode),
    )  # fmt: skip
    tokenizer = types.SimpleNamespace(byte_counts=lambda: None, vocab_size=0)
    Evaluator(program, types.SimpleNamespace(tokenizer=tokenizer, validation=lambda n: asked.append(n) or []))(
        types.SimpleNamespace(ema=())
    )
    return asked


def kept(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """Which of ten checkpoints stay."""
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, zero, {}, {}, {}, jnp.zeros(2, jnp.uint32))
    name = "-".join(map(str, dataclasses.astuple(recipe.checkpoint)))
    checkpoints = Checkpoints(folder / name, recipe.checkpoint, {}, say=lambda line: None)
    for number in range(1, 9):
        checkpoints.save(number, state, {})
        checkpoints.rate(number, abs(number - 3.0))
    checkpoints.close()
    return checkpoints.steps()


LOOKS: dict[str, tuple[Callable[..., Any], ...]] = {
    "data": (batches, step),
    "optimizer": (updates,),
    "schedule": (updates,),
    "mesh": (step,),
    "train": (updates, running, limits, forms, step),
    "eval": (running, evaluating),
    "checkpoint": (running, kept),
    "init": (beginning,),
    "log": (running, tracking, sampling),
}


def text(program: Any) -> str:
    """The program without addresses, which differ each time."""
    return re.sub(r"0x[0-9a-f]+", "", str(program))


def seen(look: Callable[..., Any], recipe: Recipe, folder: Path) -> Any:
    """What is seen of the recipe; a refusal is something, too."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            return look(recipe, folder, patch)
        except UserError as error:
            return str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with text, with tokens and with a tokenizer."""
    path = tmp_path_factory.mktemp("options")
    lines = [{"text": f"text {i} " * 40, "title": f"title {i} " * 40} for i in range(80)]
    (path / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<eos>": 3, "text": 4}
    words = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": words}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    np.arange(20_000, dtype=np.uint16).__mod__(250).astype(np.uint16).tofile(path / "tokens.bin")
    return path


@pytest.mark.parametrize("path", PATHS)
def test_a_setting_of_a_run_does_something(path, folder):
    here = lambda overrides: [one.replace("FOLDER", str(folder)) for one in overrides]  # noqa: E731
    before = base().with_(f"data.cache_dir={folder}/cache").with_(*here(NEEDS.get(path, [])))
    kind, value = setting_kinds(before)[path], settings.leaf_values(before)[path]
    other = before.with_(*here([f"{path}={OTHERS.get(path) or next_value(kind, value)}"]))
    before.validate()
    assert other != before
    looks = LOOKS[path.partition(".")[0]]
    assert any(seen(look, before, folder) != seen(look, other, folder) for look in looks)


def next_value(kind: Any, value: Any) -> str:
    if kind is bool:
        return str(not value).lower()
    if isinstance(value, int | float):
        return str(value + 1)
    return next((str(v) for v in getattr(kind, "__args__", ()) if v != value), f"{value}x")
