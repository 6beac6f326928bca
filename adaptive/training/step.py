"""One pure train step, and one evaluation step, for every model and objective."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from adaptive.data.batch import Batch
from adaptive.data.tokenizers import ByteCounts
from adaptive.objectives import Inputs, Objective, asked, next_token
from adaptive.parallel.micro_batches import dealt
from adaptive.parallel.rules import constrain_state
from adaptive.routing.stages import StageView, at_bytes
from adaptive.routing.types import AuxLosses, Output, Told
from adaptive.runs.state import TrainState
from adaptive.training.config import AuxiliaryOver
from adaptive.training.pipelined import Pipeline, Task, computed

Metrics = dict[str, jax.Array]


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    *,
    objective: Objective | None = None,
    accumulation: int = 1,
    auxiliary_over: AuxiliaryOver = "batch",
    frozen: Any = None,
    ema: float = 0.0,
    loss_chunk: int = 0,
    warmup: bool = False,
    segmented: bool = True,
    pipeline: Pipeline | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function (state, batch) -> (state, metrics); jit it with the state donated. Metrics are f32[], but for
    "told/PATH:NAME" f32[calls, ...], the sums of every call of the part at that path (`told_metrics`).

    objective     what is minimised; None: next-token prediction
    accumulation  micro-batches that the batch is computed in, one after another
    auxiliary_over  over what auxiliary losses are formed, where there are several micro-batches; see TrainConfig
    frozen        tree of bool like the parameters: those that a step leaves as they are; None: none
    ema           decay of the state's running average of the parameters; 0: it has none
    loss_chunk    positions whose logits exist at once; 0: chosen from the vocabulary and the device
    warmup        the program for steps within a router's warm-up
    segmented     False: each row is one document, whatever the batch says (attention needs no document mask)
    pipeline      how layers are split over stages, whose micro-batches are those of `accumulation`; None: not at all

    The loss is the sum over all targets divided by their number, and auxiliary losses are formed of sums over the whole
    batch, so that accumulation and packing do not change them. A step whose loss or gradient is not finite leaves
    parameters, buffers and optimizer bit-identical.
    """
    aim = next_token.Settings() if objective is None else objective

    def through(params: Any, buffers: Any, batch: Batch, step: jax.Array, key: jax.Array) -> tuple[Any, Inputs, Output]:
        model, inputs = nnx.merge(graphdef, params, buffers), aim.inputs(batch, key)
        given = step if warmup else None
        return model, inputs, _through(model, aim, inputs, batch, segmented, deterministic=False, step=given, key=key)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        count, positions = aim.count(batch), _present(batch)
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        keys = jax.random.split(step_key, accumulation)

        def minimised(params: Any, micro: Batch, key: jax.Array, others: AuxLosses | None) -> Any:
            model, inputs, out = through(params, state.buffers, micro, state.step, key)
            loss = aim.loss(model, out, inputs, loss_chunk)
            share = _present(micro) / jnp.maximum(positions, 1)
            apart = {f"readout/{name}": value / count for name, value in loss.apart.items()}
            scalars = {"ce": loss.main / count, **apart, **_scaled(_routing(out), share)}
            # With what the others add, every micro-batch has the batch's losses, whose derivative by its own sums is
            # the whole share of its gradient.
            aux = _scaled_losses(out.aux, 1 / accumulation) if others is None else _plus(out.aux, others)
            total = loss.total / count
            return total + aux.total() + aux.separate_total(), (total, out.aux, scalars, out.trace.sums())

        def grads_of(micro: Batch, key: jax.Array, others: AuxLosses | None) -> Any:
            (_, extra), grads = jax.value_and_grad(minimised, has_aux=True)(state.params, micro, key, others)
            return constrain_state(grads), *extra

        def sums_of(micro: Batch, key: jax.Array) -> AuxLosses:
            return through(state.params, state.buffers, micro, state.step, key)[2].aux

        joint = auxiliary_over == "batch"
        if pipeline is None:
            grads, loss, aux, scalars, sums = _accumulated(grads_of, sums_of if joint else None, batch, keys)
        else:
            micro = jax.tree.map(lambda a: dealt(a, accumulation), batch)
            options = {"step": state.step if warmup else None}
            given = graphdef, state.params, state.buffers, aim, micro, keys, count, options, segmented, loss_chunk
            grads, loss, aux, scalars, sums = computed(pipeline, Task(*given, joint))
        loss, grads = loss + aux.total(), _moving(grads, frozen)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        buffers = nnx.merge(graphdef, state.params, state.buffers).next_buffers(sums)
        after = _after(state, tx, grads, buffers, good, frozen, ema)
        told = told_metrics({path: stats for path, stats in sums.items() if path != "depth"})
        head = {"loss": loss, "grad_norm": norm, "target_tokens": count, "skipped": after.skipped - state.skipped}
        return after, {**head, **scalars, **aux.scalars(), **told}

    return train_step


def _after(
    state: TrainState,
    tx: optax.GradientTransformation,
    grads: Any,
    buffers: Any,
    good: jax.Array,
    frozen: Any,
    ema: float,
) -> TrainState:
    """The state after a step; but for its counters as it was where the step is not `good`."""
    updates, opt = tx.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, _moving(updates, frozen))
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)  # noqa: E731
    return TrainState(
        step=state.step + 1,
        skipped=state.skipped + 1 - good.astype(jnp.int32),
        params=keep(params, state.params),
        buffers=keep(buffers, state.buffers),
        opt=keep(opt, state.opt),
        key=state.key,
        ema=keep(_averaged(state, params, ema), state.ema),
    )


def _accumulated(
    grads_of: Callable[[Batch, jax.Array, AuxLosses | None], Any],
    sums_of: Callable[[Batch, jax.Array], AuxLosses] | None,
    batch: Batch,
    keys: jax.Array,
) -> Any:
    """Sums of what `grads_of` gives over as many micro-batches as there are keys. Where auxiliary losses are trained,
    `sums_of` first goes over all of them, forward alone, so that each is given the sums of the others."""
    if len(keys) == 1:
        return grads_of(batch, keys[0], None)
    # Both are used twice: for shapes and in a loop. Under jit they are traced once; inlined, the program is the same.
    grads_of = jax.jit(grads_of, inline=True)
    sums_of = None if sums_of is None else jax.jit(sums_of, inline=True)
    micro = jax.tree.map(lambda a: dealt(a, len(keys)), batch)
    one = jax.tree.map(lambda a: a[0], micro)
    others = None
    if sums_of is not None and any(a.coefficient for a in jax.eval_shape(sums_of, one, keys[0]).values()):
        each = jax.lax.scan(lambda _, args: (None, sums_of(*args)), None, (micro, keys))[1]
        others = jax.tree.map(lambda a: a.sum(0) - a, each)
    mine = None if others is None else jax.tree.map(lambda a: a[0], others)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(grads_of, one, keys[0], mine))
    add = lambda total, args: (jax.tree.map(jnp.add, total, grads_of(*args)), None)  # noqa: E731
    return jax.lax.scan(add, zero, (micro, keys, others))[0]


def _moving(updates: Any, frozen: Any) -> Any:
    """Zero in place of what concerns frozen parameters."""
    if frozen is None:
        return updates
    return jax.tree.map(lambda update, still: jnp.zeros_like(update) if still else update, updates, frozen)


def _averaged(state: TrainState, params: Any, decay: float) -> Any:
    """The running average after a step that gave `params`."""
    if not decay:
        return state.ema
    taken = state.step.astype(jnp.float32)
    own = jnp.minimum(decay, (1 + taken) / (10 + taken))
    return jax.tree.map(lambda average, now: own * average + (1 - own) * now, state.ema, params)


def _plus(own: AuxLosses, others: AuxLosses) -> AuxLosses:
    return jax.tree.map(jnp.add, own, others)


def _scaled_losses(losses: AuxLosses, by: float) -> AuxLosses:
    return AuxLosses({name: aux._replace(coefficient=aux.coefficient * by) for name, aux in losses.items()})


def _present(batch: Batch) -> jax.Array:
    """Positions f32[] that hold a token."""
    return jnp.asarray(batch.segment_ids > 0).sum().astype(jnp.float32)


class Evaluation(NamedTuple):
    """Sums over one held-out batch.

    nll f32[], tokens f32[], bytes f32[]; token_nll f32[batch, seq]; depth i32[batch, seq]; scores per recursion
    f32[batch, seq]; scalars means over the batch; told the sums of the model's parts (`told_metrics`); stages where
    chunks of an H-Net begin; experts by part, i16[calls, batch, seq]: the strongest of each token, -1 without any, of
    parts that see all tokens
    """

    nll: jax.Array
    tokens: jax.Array
    bytes: jax.Array
    token_nll: jax.Array
    depth: jax.Array
    scores: tuple[jax.Array, ...]
    scalars: Metrics
    told: Metrics
    stages: tuple[StageView, ...]
    experts: dict[str, jax.Array]


def make_eval_step(
    graphdef: nnx.GraphDef,
    byte_counts: ByteCounts,
    *,
    selection: Literal["topk", "threshold"],
    objective: Objective | None = None,
    loss_chunk: int = 0,
    segmented: bool = True,
) -> Callable[[Any, Any, Batch, jax.Array], Evaluation]:
    """A pure function (params, buffers, batch, key) -> Evaluation.

    byte_counts   bytes of text that each token stands for
    selection     how routed models choose; see LanguageModel
    objective     what is evaluated; None: next-token prediction
    The key is of the objective's noise, if it has any.
    """
    aim = next_token.Settings() if objective is None else objective

    def eval_step(params: Any, buffers: Any, batch: Batch, key: jax.Array) -> Evaluation:
        model = nnx.merge(graphdef, params, buffers)
        inputs = aim.held_out(batch, key)
        out = _through(model, aim, inputs, batch, segmented, selection=selection)
        loss = aim.loss(model, out, inputs, loss_chunk)
        counted = inputs.weights if inputs.counted is None else inputs.counted
        before = batch.tokens if inputs.before is None else inputs.before
        text = (byte_counts.of(inputs.targets, before) * counted).sum()
        trace, seq = out.trace, inputs.targets.shape[1]
        return Evaluation(
            loss.main,
            counted.sum(),
            text,
            loss.nll,
            trace.depth[:, -seq:],
            tuple(a[:, -seq:] for a in trace.scores),
            _routing(out),
            told_metrics({path: told.stats for path, told in trace.told.items() if told.stats}),
            at_bytes(trace.stages, batch.tokens.shape),
            _strongest(trace.told, inputs.tokens.shape, seq),
        )

    return eval_step


def _through(model: Any, aim: Objective, inputs: Inputs, batch: Batch, segmented: bool, **options: Any) -> Output:
    """The model's pass over what the objective has it read."""
    return model(inputs.tokens, **asked(aim, inputs, batch, segmented=segmented), logits=False, **options)


def told_metrics(parts: dict[str, Metrics]) -> Metrics:
    """Sums that the model's parts told, by path and name, each with one leading axis for the part's calls."""
    out: Metrics = {}
    for path, stats in parts.items():
        # A part's leading axes (passes, layers) are those of any of its sums that is a scalar for each call.
        lead = min(value.ndim for value in stats.values())
        out |= {f"told/{path}:{name}": value.reshape(-1, *value.shape[lead:]) for name, value in stats.items()}
    return out


def _strongest(told: dict[str, Told], shape: tuple[int, ...], seq: int) -> dict[str, jax.Array]:
    """At the last `seq` positions, of parts that see as many positions as the model reads."""
    found = {path: one.per_token["strongest"] for path, one in told.items() if "strongest" in one.per_token}
    whole = {path: a.reshape(-1, *shape) for path, a in found.items() if a.shape[-2:] == shape}
    return {path: a[..., -seq:].astype(jnp.int16) for path, a in whole.items()}


def _routing(out: Output) -> Metrics:
    return {f"routing/{name}": value for name, value in (out.trace.scalars or {}).items()}


def _scaled(scalars: Metrics, by: jax.Array) -> Metrics:
    return {name: value * by for name, value in scalars.items()}
