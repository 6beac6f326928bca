"""What a run measures: rows of metrics.jsonl, means over a logging interval, honest ratios, alarms.

A row is one flat JSON object. Rows of training steps hold

    step, tokens, flops, seconds     how far: steps taken, their tokens and analytic FLOPs, wall time since the start
    steps                            of the interval: this many up to `step` are in the row
    loss, ce, bits_per_byte          total loss and cross entropy (nats per token), the latter in bits per byte of text
    grad_norm, learning_rate, skipped (steps of the interval that changed nothing: not finite)
    tokens_per_s, step_ms, data_wait_ms, flops_per_s
    data_ready, data_ms/SOURCE       batches made when one was asked for; ms to read a batch's rows of a source
    goodput                          share of the run's wall time that went into steps that count
    mfu_active, mfu_dense_equivalent where the device's peak is known
    aux/NAME, routing/NAME           auxiliary losses before their coefficients; router statistics
    experts/NAME                     what experts did, below
    routing/NAME_S                   what chunking stage S did, below

and rows of evaluations hold step, tokens, flops, seconds and eval/loss, eval/bits_per_byte, eval/dead_token_ratio,
eval/routing/NAME, eval/experts/NAME, eval/told/PATH/NAME, eval/keys_attended, eval/keys/PATH; a second way of
selecting is named in between, as in eval/threshold/loss, and so is the running average of the parameters:
eval/ema/loss. Where the loss is a bound over draws of noise, eval/draws, and eval/loss_error and
eval/bits_per_byte_error, the standard errors of the means over these. Values are means over the steps since the row
before, because a single step may be a transient. What is not finite is null.

Parts of the model tell what they did. PATH is a part's place in the model below its body, such as stack/blocks/0/mixer:

    keys/PATH, keys_attended         keys that a query reads, of an attention's layers and of all; of evaluations alone
    told/PATH/NAME                   any other sum that a part tells: its mean over calls

Models with routed feed-forwards (mixtures of experts) have, summed over all tokens of the interval and then averaged
over the calls of such layers (a layer that several recursions share is called in each of them):

    experts/load_max_over_mean       tokens of the busiest expert over the mean of all (MaxVio is 1 less), and likewise
    experts/load_min_over_mean, experts/load_std_over_mean; of the pairs that the router wanted, before any was dropped
    experts/load_entropy             of the shares of the load, in nats; experts/load_entropy_normalised: in [0, 1]
    experts/empty                    experts without any token; experts/empty_fraction
    experts/dropped_fraction         pairs that found their expert full, of those wanted; experts/lost_fraction: that
                                     found no room in the exchange between devices
    experts/per_token                experts that compute a token; experts/without_expert: share of tokens with none
    experts/router_z                 mean of logsumexp(logits)^2
    experts/router_entropy           of a token's probabilities, in nats; experts/top_probability: the largest of them
    experts/zero_share               of all choices, those of experts that compute nothing, where there are such
    experts/NAME                     a router's own statistics: means per call (least: the smallest score taken), shares
                                     (cls_8: experts that none of 8 neighbouring tokens uses; loops: mean passes)
    experts/by_layer/NAME            each of these as a list over calls, in the order they run
    experts/by_layer/layer           their layers' numbers in the unrolled network, from 0, of the body they are in
    experts/by_layer/part            their PATHs, where there is more than one
    experts/by_layer/experts_per_token   [calls][n]: share of tokens with 0, 1, ... experts (16: 16 or more)
    experts/load                     [calls][experts]: each expert's share of the load; null for a call without tokens

Each chunking stage S, from 0, which sees the bytes, inwards has means over the batch:

    routing/kept_S                   share of its positions that begin a chunk
    routing/chunks_per_byte          chunks of the innermost stage; routing/bytes_per_chunk: one over that
    routing/probability_S            mean boundary probability; routing/probability_std_S: its spread over positions
    routing/near_half_S              share of positions whose probability is within 0.05 of one half
    routing/overflow_S               share of boundaries that found no slot (`capacities` of the stage)
    routing/ratio_loss_global_S      ratio loss over the whole batch; routing/ratio_loss_device_S: mean of each device's
"""

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from adaptive.training.log import Row
from adaptive.training.parts import PREFIX as TOLD
from adaptive.training.parts import PartSums


class Measured(NamedTuple):
    """What a step measured, as numpy, and when it was done."""

    step: int
    metrics: Any
    at: float


class _Completion:
    """When arrays are there: noted by a thread, as the loop may look at them much later."""

    def __init__(self, arrays: Any, clock: Callable[[], float]):
        self._arrays, self._clock, self._at = arrays, clock, 0.0
        self._thread = threading.Thread(target=self._wait, name="completion", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        with contextlib.suppress(Exception):  # raised again where the arrays are read
            jax.block_until_ready(self._arrays)
        self._at = self._clock()

    def at(self) -> float:
        self._thread.join()
        return self._at

    def known(self) -> float | None:
        """The same where it is known already."""
        return None if self._thread.is_alive() else self._at


class OneStepLate:
    """Hands metrics to the host a step late, so that the device never waits for a print.

    Call `swap` right after dispatching a step: it returns what the step before measured, which has been computed by
    then or soon will be, while the new step runs.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._held: tuple[int, Any, _Completion] | None = None

    def swap(self, step: int, metrics: Any) -> Measured | None:
        """What the step of the previous call measured, None at first; holds these instead."""
        for leaf in jax.tree.leaves(metrics):
            leaf.copy_to_host_async()
        before, self._held = self._held, (step, metrics, _Completion(metrics, self._clock))
        return _measured(before)

    def idle_since(self, begin: float) -> float | None:
        """Since when, from `begin` on, the devices have had nothing to do; None where the step held is not done yet."""
        done = begin if self._held is None else self._held[2].known()
        return None if done is None else max(begin, done)

    def flush(self) -> Measured | None:
        """The same of what is still held, if anything; waits for it."""
        before, self._held = self._held, None
        return _measured(before)


def _measured(held: tuple[int, Any, _Completion] | None) -> Measured | None:
    return None if held is None else Measured(held[0], jax.device_get(held[1]), held[2].at())


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one optimizer step costs, over all devices, by the analytic account.

    tokens          int    positions computed, padding included
    flops           float  useful FLOPs of forward and backward with the capacities that are really computed
    dense_flops     float  the same if every token took every layer of the unrolled model
    bytes_per_token float  UTF-8 bytes a token stands for, on average: makes bits per byte of nats per token
    peak            float  FLOP/s of all devices together (`adaptive.peaks`); None where it is not known
    """

    tokens: int
    flops: float
    dense_flops: float
    bytes_per_token: float
    peak: float | None = None


class Meter:
    """Collects step metrics over a logging interval and makes a row of them.

    steps    of the interval so far
    seconds  continues from an earlier attempt of the run
    clock    returns seconds
    experts  of the model's facts
    """

    def __init__(
        self,
        cost: StepCost,
        seconds: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
        experts: Sequence[Any] = (),
    ):
        self._cost, self._clock = cost, clock
        self._parts = PartSums(experts)
        self._origin = clock() - seconds
        self._idle = 0.0  # of all pauses so far
        self._begin_interval(clock(), 0.0)

    def _begin_interval(self, since: float, idle: float) -> None:
        """since: when the last step of the interval before was done; idle: of all pauses until then."""
        self.steps, self._wait = 0, 0.0
        self._ready: list[int] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._parts.clear()
        self._since = self._until = since
        self._idle_since = self._idle_until = idle

    def add(self, metrics: Mapping[str, Any], at: float | None = None) -> None:
        """The metrics of one step: scalars, and sums named "told/PATH:NAME". at: when it was done; None: now."""
        self.steps += 1
        self._until, self._idle_until = self._clock() if at is None else at, self._idle
        if not metrics.get("skipped"):  # of a step that changed nothing the sums are of no model in use
            self._parts.add(metrics)
        for name, value in metrics.items():
            if name.startswith(TOLD):
                continue
            number = float(value)
            self._counts.setdefault(name, 0)
            if math.isfinite(number):
                self._sums[name] = self._sums.get(name, 0.0) + number
                self._counts[name] += 1

    def waited(self, seconds: float, ready: int | None = None) -> None:
        """Time the loop stood still for want of data, and how many batches were made when it asked for one."""
        self._wait += seconds
        if ready is not None:
            self._ready.append(ready)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training step (evaluation, a checkpoint): it counts as wall time, not as step time."""
        begin = self._clock()
        try:
            yield
        finally:
            self._idle += self._clock() - begin

    def position(self, step: int) -> Row:
        """How far the run is after `step` steps: the columns that rows of every kind begin with."""
        cost = self._cost
        seconds = self._clock() - self._origin
        return {"step": step, "tokens": step * cost.tokens, "flops": step * cost.flops, "seconds": round(seconds, 3)}

    def row(self, step: int, **more: Any) -> Row:
        """The row of the steps added since the last one, `step` being the newest; begins a new interval.

        A mean leaves out steps where the quantity was not finite; if it never was, it is NaN.
        """
        means = {name: self._sums[name] / n if n else math.nan for name, n in self._counts.items()}
        if "skipped" in means:
            means["skipped"] = int(self._sums.get("skipped", 0))
        if "ce" in means:
            means["bits_per_byte"] = bits_per_byte(means["ce"], self._cost.bytes_per_token)
        own = {"steps": self.steps}
        row = {**self.position(step), **own, **means, **chunk_sizes(means), **self._parts.columns(), **more}
        row |= self._rates()
        self._begin_interval(self._until, self._idle_until)
        return row

    def _rates(self) -> Row:
        busy = self._until - self._since - (self._idle_until - self._idle_since)
        if not self.steps or busy <= 0:
            return {}
        cost, per_step = self._cost, busy / self.steps
        rates: Row = {
            "tokens_per_s": cost.tokens / per_step,
            "step_ms": 1e3 * per_step,
            "data_wait_ms": 1e3 * self._wait / self.steps,
            "flops_per_s": cost.flops / per_step,
        }
        if self._ready:
            rates["data_ready"] = sum(self._ready) / len(self._ready)
        if cost.peak:
            rates["mfu_active"] = cost.flops / per_step / cost.peak
            rates["mfu_dense_equivalent"] = cost.dense_flops / per_step / cost.peak
        return rates


def chunk_sizes(means: Mapping[str, float], place: str = "") -> Row:
    """Bytes per innermost chunk, from mean counts: the mean of sizes themselves would be that of the largest."""
    chunks = means.get(f"{place}routing/chunks_per_byte")
    return {} if chunks is None else {f"{place}routing/bytes_per_chunk": 1 / chunks if chunks else math.nan}


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Bits per byte of text; NaN where tokens stand for no text."""
    return nats_per_token / (math.log(2) * bytes_per_token) if bytes_per_token > 0 else math.nan


def finite(row: Mapping[str, Any], name: str) -> float | None:
    """A row's number; None where it has none or one that is not finite."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
