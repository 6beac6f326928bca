"""One pure train step, and one evaluation step, for every model."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from adaptive.data.batch import Batch
from adaptive.models.forward import ROUTED
from adaptive.objectives.cross_entropy import chunk_length, cross_entropy_sum
from adaptive.parallel.rules import batch_shards, constrain, constrain_state, gathered
from adaptive.routing.stages import StageView, at_bytes
from adaptive.routing.types import Output
from adaptive.runs.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    loss_chunk: int = 0,
    warmup: bool = False,
    segmented: bool = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function (state, batch) -> (state, metrics); jit it with the state donated. Metrics are f32[], but for
    "experts/NAME" f32[calls, ...], the sums of every call of a routed feed-forward (`expert_stats`).

    accumulation  micro-batches that the batch is computed in, one after another
    loss_chunk    positions whose logits exist at once; 0: chosen from the vocabulary
    warmup        the program for steps within a router's warm-up
    segmented     False: each row is one document, whatever the batch says (attention needs no document mask)

    The loss is the sum over all target tokens divided by their number, so that accumulation and packing do not change
    it. A step whose loss or gradient is not finite leaves parameters, buffers and optimizer bit-identical.
    """

    def objective(params: Any, buffers: Any, batch: Batch, step: jax.Array, key: jax.Array, count: jax.Array) -> Any:
        model = nnx.merge(graphdef, params, buffers)
        out: Output = model(
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids if segmented else None,
            **given(batch),
            deterministic=False,
            step=step if warmup else None,
            key=key,
            logits=False,
        )
        nll, _ = next_token_loss(model, out, batch, loss_chunk)
        ce = nll / count
        aux = out.aux
        scalars = {"ce": ce, **_scaled({**aux.scalars(), **_routing(out)}, 1 / accumulation)}
        loss = ce + aux.total() / accumulation
        return loss + aux.separate_total() / accumulation, (loss, scalars, out.trace.sums())

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        count = jnp.maximum(batch.mask.sum(), 1.0)
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        keys = jax.random.split(step_key, accumulation)

        def grads_of(micro: Batch, key: jax.Array) -> Any:
            (_, extra), grads = jax.value_and_grad(objective, has_aux=True)(
                state.params, state.buffers, micro, state.step, key, count
            )
            return constrain_state(grads), *extra

        if accumulation == 1:
            grads, loss, scalars, sums = grads_of(batch, keys[0])
        else:
            micro = jax.tree.map(lambda a: _micro_batches(a, accumulation), batch)
            zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(grads_of, jax.tree.map(lambda a: a[0], micro), keys[0]))
            add = lambda total, args: (jax.tree.map(jnp.add, total, grads_of(*args)), None)  # noqa: E731
            (grads, loss, scalars, sums), _ = jax.lax.scan(add, zero, (micro, keys))

        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        buffers = nnx.merge(graphdef, state.params, state.buffers).next_buffers(sums)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)  # noqa: E731
        bad = 1 - good.astype(jnp.int32)
        after = TrainState(
            step=state.step + 1,
            skipped=state.skipped + bad,
            params=keep(params, state.params),
            buffers=keep(buffers, state.buffers),
            opt=keep(opt, state.opt),
            key=state.key,
        )
        experts = expert_stats({part: stats for part, stats in sums.items() if part != "depth"})
        metrics = {"loss": loss, "grad_norm": norm, "target_tokens": count, "skipped": bad, **scalars, **experts}
        return after, metrics

    return train_step


class Evaluation(NamedTuple):
    """Sums over one held-out batch.

    nll f32[], tokens f32[], bytes f32[]; token_nll f32[batch, seq]; depth i32[batch, seq]; scores per recursion
    f32[batch, seq]; scalars means over the batch; experts the sums of routed feed-forwards (`expert_stats`); stages
    where chunks of an H-Net begin
    """

    nll: jax.Array
    tokens: jax.Array
    bytes: jax.Array
    token_nll: jax.Array
    depth: jax.Array
    scores: tuple[jax.Array, ...]
    scalars: Metrics
    experts: Metrics
    stages: tuple[StageView, ...]


def make_eval_step(
    graphdef: nnx.GraphDef,
    byte_lengths: jax.Array,
    *,
    selection: Literal["topk", "threshold"],
    loss_chunk: int = 0,
    segmented: bool = True,
) -> Callable[[Any, Any, Batch], Evaluation]:
    """A pure function (params, buffers, batch) -> Evaluation.

    byte_lengths  i32[vocab]: bytes of text that each token stands for
    selection     how routed models choose; see Transformer
    """

    def eval_step(params: Any, buffers: Any, batch: Batch) -> Evaluation:
        model = nnx.merge(graphdef, params, buffers)
        out: Output = model(
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids if segmented else None,
            **given(batch),
            selection=selection,
            logits=False,
        )
        nll, token_nll = next_token_loss(model, out, batch, loss_chunk)
        text = (byte_lengths[batch.targets] * batch.mask).sum()
        trace = out.trace
        experts = expert_stats({part: calls.stats for part, calls in trace.experts.items()})
        stages = at_bytes(trace.stages, batch.tokens.shape)
        count = batch.mask.sum()
        return Evaluation(nll, count, text, token_nll, trace.depth, trace.scores, _routing(out), experts, stages)

    return eval_step


def given(batch: Batch) -> dict[str, Any]:
    """What only some models take of a batch: the boundaries of chunks, where the data has them."""
    return {} if batch.boundaries is None else {"boundaries": batch.boundaries}


def expert_stats(parts: dict[str, Metrics]) -> Metrics:
    """Sums of routed feed-forwards under the names they are logged by, their calls in the order they ran."""
    ordered = [parts[part] for part in ROUTED if part in parts]
    if not ordered:
        return {}
    # A part's leading axes (recursions, layers) are those of its scalar sums.
    rows = lambda name, stats: stats[name].reshape(-1, *stats[name].shape[stats["tokens"].ndim :])  # noqa: E731
    return {f"experts/{name}": jnp.concatenate([rows(name, s) for s in ordered]) for name in ordered[0]}


def next_token_loss(model: Any, out: Output, batch: Batch, loss_chunk: int) -> tuple[jax.Array, jax.Array]:
    """(summed f32[], per-position f32[batch, seq]) negative log-likelihood in nats of the batch's targets."""
    rows, seq = batch.tokens.shape
    weight = gathered(model.head_weight(), ("vocab", "width"), out.hidden.dtype)
    chunk = loss_chunk or chunk_length(seq, rows // batch_shards(), weight.shape[0])
    return cross_entropy_sum(out.hidden, weight, batch.targets, batch.mask, chunk)


def _routing(out: Output) -> Metrics:
    return {f"routing/{name}": value for name, value in (out.trace.scalars or {}).items()}


def _scaled(scalars: Metrics, by: float) -> Metrics:
    return {name: value * by for name, value in scalars.items()}


def _micro_batches(a: jax.Array, n: int) -> jax.Array:
    """[batch, ...] -> [n, batch / n, ...]; every device's rows are dealt to all micro-batches, so none move."""
    shards = batch_shards()
    parts = a.reshape(shards, n, a.shape[0] // (shards * n), *a.shape[1:]).swapaxes(0, 1)
    parts = parts.reshape(n, -1, *a.shape[1:])
    return constrain(parts, None, "batch", *(None,) * (a.ndim - 1))
