"""Everything compiled of a run: the model's abstract shape, where its state lives, and its steps."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive.account.caches import kept_per_token
from adaptive.data.batch import Batch
from adaptive.data.tokenizers import ByteCounts
from adaptive.errors import MeshError, NoRoomError, RecipeError
from adaptive.objectives import distillation
from adaptive.objectives.distillation import Taught
from adaptive.optim.build import make_optimizer
from adaptive.optim.named import chosen
from adaptive.parallel.cluster import meet, one_compiles
from adaptive.parallel.expert_cost import ExpertLoad, settle
from adaptive.parallel.mesh import batch_sharding, context_parallel, place, share_of_rows
from adaptive.parallel.rules import AxisRules, axis_rules, placement, split
from adaptive.parallel.support import check_support, parts_of
from adaptive.recipe import Recipe
from adaptive.routing.types import AuxLosses, Output
from adaptive.runs.mask_token import with_mask
from adaptive.runs.platform import CacheHits, compute_dtype
from adaptive.runs.state import TrainState, abstract_model, abstract_state, fresh_state
from adaptive.settings import divisors
from adaptive.training.config import Remat
from adaptive.training.pipelined import Pipeline
from adaptive.training.step import Evaluation, Metrics, make_eval_step, make_train_step
from adaptive.training.teacher import Teacher, teacher_of

# Layers up to which a CPU's loops over them are written out. Inside a loop XLA cuts a layer's arrays out of stacks
# again for every number of a fused operation, which costs a twentieth of a step (dense layers) to half of it (experts).
UNROLLED = 12


def accumulation_of(recipe: Recipe, shards: int, stages: int = 1) -> int:
    """Micro-batches per step for a batch that is split over `shards` devices; MeshError where it does not divide.

    stages  of a pipeline that micro-batches go through: without train.device_batch_size there are up to 4 for each
    """
    rows, limit = recipe.train.batch_size, recipe.train.device_batch_size
    if rows % shards:
        near = sorted({max(1, rows // shards) * shards, (rows // shards + 1) * shards})
        raise MeshError(
            f"train.batch_size={rows} does not divide over {shards} devices (mesh.data * mesh.fsdp * mesh.expert); "
            f"nearest that do: {', '.join(map(str, near))}"
        )
    per_device = rows // shards
    if limit == 0 and stages > 1:
        return max(d for d in divisors(per_device) if d <= 4 * stages)
    if limit == 0 or per_device <= limit:
        return 1
    if per_device % limit:
        fits = [d for d in divisors(per_device) if d <= limit]
        raise RecipeError(
            f"train.device_batch_size={limit} does not divide the {per_device} sequences of each device "
            f"(train.batch_size={rows} over {shards}); the largest below it that does is {fits[-1]}"
        )
    return per_device // limit


def in_stages(recipe: Recipe, shards: int, stages: int) -> tuple[int, Pipeline | None, tuple[str, ...]]:
    """(micro-batches of a step, the pipeline where forward and backward go by turns, what there is to say). Raises
    MeshError where the layers do not divide over the stages."""
    body, groups = recipe.model.body, recipe.mesh.stage_groups
    if reason := body.refuse_stages(stages, groups):
        raise MeshError(reason)
    if not body.lines_up() or recipe.model.low_rank is not None:
        return accumulation_of(recipe, shards), None, (f"{stages} stages, forward and backward apart",)
    pipeline = Pipeline(stages, groups, accumulation_of(recipe, shards, stages))
    schedule, n = pipeline.schedule(body.passes), pipeline.micro_batches
    kind = "1F1B" if schedule.rounds == 1 else f"circular, {schedule.rounds} rounds"
    lines = [f"{stages} stages, {kind}, {n} micro-batches: stages are idle for {schedule.idle():.0%} of the time"]
    if n < stages:
        lines.append(f"there are fewer micro-batches than stages: raise train.batch_size to {shards * stages} or more")
    elif schedule.rounds > 1 and n % stages:
        lines.append(f"rounds take {stages} micro-batches at a time, of which the last group has {n % stages}")
    return n, pipeline, tuple(lines)


def check_length(recipe: Recipe, parts: int) -> None:
    """Raises MeshError where sequences, or the positions whose logits exist at once, do not divide over the context
    axis."""
    seq_len, chunk = recipe.data.seq_len, recipe.train.loss_chunk
    if seq_len % parts:
        near = sorted({max(1, seq_len // parts) * parts, (seq_len // parts + 1) * parts})
        raise MeshError(
            f"data.seq_len={seq_len} does not divide over mesh.context={parts}; nearest that do: "
            f"{', '.join(map(str, near))}"
        )
    own = seq_len // parts
    if chunk and own % chunk:
        fits = min(divisors(own), key=lambda d: abs(d - chunk))
        raise MeshError(
            f"train.loss_chunk={chunk} does not divide the {own} positions of a sequence that each device of "
            f"mesh.context={parts} has; nearest that does: {fits}"
        )


def expert_load(recipe: Recipe, mesh: Mesh, tokens: int, itemsize: int) -> ExpertLoad | None:
    """The first kind of the model's experts, for `tokens` tokens on each device, evenly loaded; None without any."""
    found = recipe.model.facts().experts
    if not found:
        return None
    moe, over = found[0].settings, recipe.mesh.expert_parallel.over
    pairs = tokens * moe.router.per_token()
    return ExpertLoad(
        tokens=tokens,
        pairs=pairs,
        rows=pairs * (getattr(moe.router, "capacity_factor", 0.0) or 1.0),
        experts=moe.experts,
        width=recipe.model.width,
        hidden=moe.expert_size,
        devices=split(mesh, over),
        tensor=1 if "tensor" in over else mesh.shape["tensor"],
        matrices=moe.matrices(),
        itemsize=itemsize,
    )


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which share of the batch's rows this process feeds. Processes whose devices hold the same rows,
    because other axes than the batch's run across them, feed the same."""
    return share_of_rows(mesh, AxisRules().batch, jax.process_index())


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled train step and what is known of it. kept: whether it came from the compilation cache;
    platform: that it is for."""

    call: Any
    seconds: float
    kept: bool = False
    platform: str = "cpu"

    def memory(self) -> dict[str, int]:
        """Bytes per device by kind; empty where the backend does not tell."""
        analysis = self.call.memory_analysis()
        if analysis is None:
            return {}
        return {
            "arguments": analysis.argument_size_in_bytes - analysis.alias_size_in_bytes,
            "state, updated in place": analysis.alias_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
            "code": analysis.generated_code_size_in_bytes,
        }

    def needs(self) -> int:
        """Bytes of a device that the step takes, state and batch included; 0 where the backend does not tell.

        Temporaries of a GPU are one block. Those of a TPU share places over time, which its peak alone knows.
        """
        analysis = self.call.memory_analysis()
        if analysis is None:
            return 0
        if self.platform == "tpu":
            return analysis.peak_memory_in_bytes
        results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes


class Program:
    """A recipe's model and steps on a mesh. Making one creates no array; raises MeshError where shapes do not fit.

    facts                  of the model
    ema                    whether its state has a running average of the parameters
    frozen                 tree of bool like its parameters: which are not trained; None: all are
    remat                  what the backward pass recomputes
    unroll                 whether the loops over layers are written out
    pipeline               how layers are split over stages; None: they are not, or forward and backward are apart
    pipeline_lines         the same for people; none with one stage
    experts, expert_lines  how experts are computed on the mesh, the strategy settled, and why; no lines without experts
    experts_described      each kind of routed feed-forward in a few words
    selections             the ways of selecting that the model can evaluate and that differ
    refuse_generation      why the model cannot generate with a cache; empty where it can
    kept                   what a cache of generation keeps of a token, by policy; () where there is none
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, remat: Remat = "none"):
        """remat: what is recomputed where the recipe leaves it to be chosen (`adaptive.training.fitting`)."""
        recipe = with_mask(recipe)
        self.recipe, self.mesh, self.facts = recipe, mesh, recipe.model.facts()
        self.remat: Remat = remat if recipe.train.remat == "auto" else recipe.train.remat
        # Again, now that the size of every axis is known.
        dataclasses.replace(recipe.mesh, **mesh.shape).validate(recipe.expert_layers())
        check_support(mesh.shape, parts_of(recipe.model))
        check_length(recipe, split(mesh, AxisRules().seq))
        self.shards = split(mesh, AxisRules().batch)
        self.pipeline: Pipeline | None = None
        self.pipeline_lines: tuple[str, ...] = ()
        self.accumulation = accumulation_of(recipe, self.shards)
        if (stages := mesh.shape["stage"]) > 1:
            self.accumulation, self.pipeline, self.pipeline_lines = in_stages(recipe, self.shards, stages)
        self.dtype = compute_dtype(recipe)
        on_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
        self.unroll = on_cpu and recipe.model.body.layers <= UNROLLED
        over = ("context", *({"tensor"} & {*recipe.mesh.expert_parallel.over}))  # that split the tokens of experts
        tokens = recipe.train.batch_size // (self.shards * self.accumulation) * recipe.data.seq_len // split(mesh, over)
        load = expert_load(recipe, mesh, tokens, self.dtype.itemsize)
        self.experts, self.expert_lines = settle(recipe.mesh.expert_parallel, load)
        spread = mesh.shape["stage"] * mesh.shape["tensor"]
        fits = recipe.model.vocab_size % spread == 0
        self.rules = axis_rules(self.experts, ("stage", "tensor") if fits else ("tensor",))
        self.tx = make_optimizer(recipe.optimizer, recipe.schedule, recipe.train.steps)
        self.graphdef, shapes = abstract_model(self.build)
        model = nnx.merge(self.graphdef, shapes)
        if reason := model.no_gradient():
            raise RecipeError(reason)
        still, params = recipe.train.frozen, nnx.state(model, nnx.Param)
        self.frozen = chosen(params, still, "train.frozen") if still else None
        routed = model.routed()
        told = (f"{one.settings.router.kind()}: {routed[one.path].describe()}" for one in self.facts.experts)
        self.experts_described = tuple(dict.fromkeys(told))
        self.selections = model.selections() if recipe.objective.causal else ("topk",)
        refused = recipe.objective.refuse_generation()
        self.refuse_generation = refused or model.refuse_generation() or model.refuse_cache()
        self.kept = () if self.refuse_generation else kept_per_token(model)
        self.ema = recipe.train.ema > 0
        self._shapes = abstract_state(self.graphdef, shapes, self.tx, ema=self.ema)
        self.shardings = place(self._shapes, mesh, self.rules)
        self._segmented = not recipe.data.cross_document
        self._teaching = teacher_of(recipe)

    def build(self, key: jax.Array, step: int = -1) -> Any:
        """The model with the settings that hold at a step (-1: at the last)."""
        model = self.recipe.model.at_step(step)
        return model.build(key, dtype=self.dtype, remat=self.remat, unroll=self.unroll)

    def placed(self) -> contextlib.AbstractContextManager[None]:
        """Where the model's code is to be traced."""
        context = context_parallel(self.recipe.mesh, self.mesh)
        return placement(self.mesh, self.rules, self.experts, self.recipe.train.kernels, context)

    def fresh_state(self) -> TrainState:
        key = jax.random.key(self.recipe.train.seed)
        return fresh_state(self.build, self.tx, key, self.mesh, self.rules, self.shardings, ema=self.ema)

    def abstract_state(self) -> TrainState:
        """The state's shapes, each with its sharding."""
        shaped = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
        return jax.tree.map(shaped, self._shapes, self.shardings)

    def abstract_batch(self) -> Batch:
        shape = (self.recipe.train.batch_size, self.recipe.data.seq_len)
        sharding = batch_sharding(self.mesh, self.rules)
        boundaries = None if self.recipe.data.boundaries == "none" else "bool"
        kinds: Any = Batch("int32", "int32", "int32", "int32", "float32", boundaries)  # type: ignore[arg-type]
        batch = jax.tree.map(lambda kind: jax.ShapeDtypeStruct(shape, kind, sharding=sharding), kinds)
        if isinstance(aim := self.recipe.objective, distillation.Settings):
            several = (*shape, aim.kept)
            taught: Any = [jax.ShapeDtypeStruct(several, kind, sharding=sharding) for kind in ("int32", "float32")]
            batch = batch._replace(taught=Taught(*taught))
        return batch

    def to_devices(self, batch: Batch, *, whole: bool = False) -> Batch:
        """Rows as arrays over the mesh: this process's share of them, or all (`whole`)."""
        sharding = batch_sharding(self.mesh, self.rules)
        shares = 1 if whole else data_shard(self.mesh)[1]

        def place(a: np.ndarray) -> jax.Array:
            shape = (a.shape[0] * shares, *a.shape[1:])
            return jax.make_array_from_process_local_data(sharding, np.asarray(a), shape)

        return jax.tree.map(place, batch)

    @functools.cached_property
    def _teacher(self) -> Teacher | None:
        found = self._teaching
        return None if found is None else Teacher(found, self.recipe, self.mesh, self.rules, self.placed)

    def for_training(self, batch: Batch) -> Batch:
        """This process's share of rows as arrays over the mesh, with what the teacher expects where there is one."""
        given = self.to_devices(batch)
        return given if self._teacher is None else given._replace(taught=self._teacher(given))

    def auxiliary(self) -> list[str]:
        """Names of the auxiliary losses that are trained."""

        def losses(params: Any, buffers: Any, batch: Batch) -> AuxLosses:
            key = jax.random.key(0)
            model = nnx.merge(self.graphdef, params, buffers)
            out: Output = model(batch.tokens, boundaries=batch.boundaries, deterministic=False, key=key, logits=False)
            return out.aux

        with self.placed():
            found = jax.eval_shape(losses, self._shapes.params, self._shapes.buffers, self.abstract_batch())
        return [name for name, aux in found.items() if aux.coefficient]

    def compile_train_step(self, at: int = -1) -> Compiled:
        """The train step (state, batch) -> (state, metrics), its state argument donated, as it is at training step `at`
        (from 0); -1: at the last."""
        model, graphdef = self.recipe.model, self.graphdef
        if model.changes():
            graphdef, _ = abstract_model(functools.partial(self.build, step=at))
        step = make_train_step(
            graphdef,
            self.tx,
            objective=self.recipe.objective,
            accumulation=self.accumulation,
            auxiliary_over=self.recipe.train.auxiliary_over,
            frozen=self.frozen,
            ema=self.recipe.train.ema,
            loss_chunk=self.recipe.train.loss_chunk,
            warmup=0 <= at < model.warmup_steps(),
            segmented=self._segmented,
            pipeline=self.pipeline,
        )
        begin = time.perf_counter()
        with self.placed():
            # Every process reads all metrics, so none may be left split over the devices.
            everywhere = NamedSharding(self.mesh, P())
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, everywhere))
            lowered = jitted.lower(self.abstract_state(), self.abstract_batch())
            with CacheHits() as hits:
                call = lowered.compile()
        return Compiled(call, time.perf_counter() - begin, hits.count > 0, self.mesh.devices.flat[0].platform)

    def eval_step(self, byte_counts: ByteCounts, selection: Literal["topk", "threshold"]) -> Callable[..., Evaluation]:
        """(state, batch, its number, number of the draw) -> Evaluation, every array of it on every process; compiled at
        the first call. The objective's noise, if it has any, is that of both numbers."""
        step = make_eval_step(
            self.graphdef,
            jax.tree.map(lambda a: jnp.asarray(_padded(a, self.recipe.model.vocab_size)), byte_counts),
            selection=selection,
            objective=self.recipe.objective,
            loss_chunk=self.recipe.train.loss_chunk,
            segmented=self._segmented,
        )
        jitted = jax.jit(step, out_shardings=NamedSharding(self.mesh, P()))
        compiled: list[Any] = []

        @functools.wraps(step)
        def call(state: TrainState, batch: Batch, number: int = 0, draw: int = 0) -> Evaluation:
            key = jax.random.fold_in(jax.random.key(self.recipe.train.seed), number)
            key = jax.random.fold_in(key, draw) if draw else key
            given = state.params, state.buffers, self.to_devices(batch), key
            if not compiled:
                with self.placed(), one_compiles(f"compiling the evaluation by {selection}"):
                    compiled.append(jitted.lower(*given).compile())
                meet(f"the evaluation by {selection} is compiled")
            return compiled[0](*given)

        return call


class Saved(Protocol):
    """Steps that were compiled before, by the step (from 0) that their phase begins with."""

    def load(self, program: Program, begin: int) -> Compiled | None: ...


class Steps:
    """The train step of each phase of a run: routers may warm up first, and capacities may change, in programs of their
    own. The first is compiled at once, each other when it is due (`prepare`)."""

    def __init__(self, program: Program, saved: Saved | None = None):
        """saved: steps that were compiled before, which are loaded."""
        self._program, self._saved = program, saved
        self._begins = self.phases_of(program)
        self._compiled: dict[int, Compiled] = {}
        self.first = self.prepare(0)

    def due(self, step: int) -> bool:
        """Whether step `step` (from 0) needs a program that is not compiled yet."""
        return self._phase(step) not in self._compiled

    def prepare(self, step: int) -> Compiled:
        """The program of step `step`, compiled if it is not yet."""
        begin = self._phase(step)
        if begin not in self._compiled:
            self._compiled[begin] = self._compile(begin)
        return self._compiled[begin]

    @staticmethod
    def phases_of(program: Program) -> list[int]:
        """The steps (from 0) that phases begin with."""
        model = program.recipe.model
        return sorted({0, model.warmup_steps(), *model.changes()})

    def _compile(self, begin: int) -> Compiled:
        try:
            if self._saved is not None and (found := self._saved.load(self._program, begin)):
                return found
            return self._program.compile_train_step(begin)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            says = " ".join(str(error).split())[:300]
            raise NoRoomError(f"the train step does not fit a device: {says}. {advice(self._program)}") from error

    def __call__(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self.prepare(step).call(state, batch)

    def _phase(self, step: int) -> int:
        """The step that the phase of step `step` begins with."""
        return max(begin for begin in self._begins if begin <= step)


def advice(program: Program) -> str:
    """What makes a step smaller."""
    train = program.recipe.train
    rows = train.batch_size // (program.shards * program.accumulation)
    fewer = [d for d in divisors(rows) if d < rows]
    less = [f"train.device_batch_size={fewer[-1]} (a device computes {rows} rows at once)"] if fewer else []
    if train.remat not in ("auto", "layer"):
        less.append(f"train.remat=layer or auto (it is {train.remat})")
    return f"What makes it smaller: {', '.join([*less, 'mesh.fsdp over more devices'])}"


def _padded(of_tokens: np.ndarray, vocab: int) -> np.ndarray:
    """i32[vocab]: ids that the tokenizer does not use stand for no text."""
    return np.pad(of_tokens, (0, vocab - len(of_tokens))).astype(np.int32)


@contextlib.contextmanager
def profiled(step: int, begin: int, recipe: Recipe, folder: Path) -> Iterator[None]:
    """Starts or stops jax.profiler's trace into `folder` at the steps that the recipe names, or at the first and last
    that an attempt which begins at step `begin` takes of them."""
    log = recipe.log
    end = min(log.profile_start + log.profile_steps, recipe.train.steps)
    if step == max(log.profile_start, begin) and step < end:
        jax.profiler.start_trace(str(folder))
    yield
    if step == end - 1 >= log.profile_start and log.profile_steps:
        jax.profiler.stop_trace()
