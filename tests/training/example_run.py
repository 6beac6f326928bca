"""Workdirs of made-up but realistic runs, for tests of the report and for looking at it."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import shapes

from adaptive.account import recursion_capacities
from adaptive.data.token_kinds import classes_of
from adaptive.data.tokenizers import Bytes
from adaptive.layers import stack
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import expert_choice, token_choice
from adaptive.models.bodies import plain
from adaptive.models.facts import Experts, Facts
from adaptive.models.language_model import Settings
from adaptive.recipe import Recipe
from adaptive.training.config import TrainConfig
from adaptive.training.log import MetricsLog
from adaptive.training.metrics import Meter, StepCost
from adaptive.training.parts import PartSums
from adaptive.training.report.collect import RoutingCounter, passage_tokens, plan_costs
from adaptive.training.report.schema import PlanRecord, SampleRecord, TokenRecord, save_record

SHAPE = {"width": 128, "hidden": 352, "heads": 4, "head_dim": 32}


def mixture(router: str) -> Settings:
    """A model whose layers but the first have experts."""
    few = experts.Settings(token_choice.Settings(capacity_factor=1.25))
    many = experts.Settings(expert_choice.Settings(experts_per_token=4), experts=64)
    dense, routed = shapes.block(), shapes.block(feed_forward={"few": few, "many": many}[router], repeat=10)
    return shapes.wrapped(plain.Settings(stack.Settings((dense, routed))), width=128)


MODELS = {
    "vanilla": shapes.plain(11, **SHAPE),
    "recursive": shapes.recursive(11, 3, **SHAPE),
    "mor": shapes.mor(11, 3, **SHAPE),
    "mor_token": shapes.mor(11, 3, "token_choice", **SHAPE),
    "moe": mixture("few"),
    "moe_many": mixture("many"),
}
PEAK = 4e11
TEXT = """The harbour lay quiet under the first snow of the year. Along the quay the fishing boats were made fast, \
their nets folded and white, and only the lamp above the pilot's door was still burning.

"You came by the northern road," said the old woman, without looking up from her work. "Nobody takes it in November."

He put the sealed letter on the table between them. It had travelled eleven hundred miles, through two wars and a \
flood, and the wax bore the mark of a house that no longer existed.
"""


def recipe_of(kind: str, steps: int = 600) -> Recipe:
    train = TrainConfig(steps=steps, batch_size=8)
    return Recipe(name=kind, description="An example, made up.", model=MODELS[kind], train=train)


def write_example(workdir: Path, kind: str = "mor", steps: int = 600, until: int | None = None, seed: int = 0) -> Path:
    """A workdir as a run of `steps` steps leaves it after `until` of them."""
    workdir.mkdir(parents=True, exist_ok=True)
    recipe, rng = recipe_of(kind, steps), np.random.default_rng(seed)
    (workdir / "recipe.json").write_text(recipe.to_json())
    plan = write_plan(workdir, recipe)
    write_rows(workdir, recipe, plan, until or steps, rng)
    write_routing(workdir, recipe, until or steps, rng)
    return workdir


def write_plan(workdir: Path, recipe: Recipe) -> PlanRecord:
    costs = plan_costs(recipe.model, recipe.data.seq_len, recipe.train.batch_size)
    plan = PlanRecord(
        name=recipe.name,
        steps=recipe.train.steps,
        bytes_per_token=1.0,
        device_kind="cpu",
        devices=1,
        mesh={"data": 1, "fsdp": 1, "expert": 1, "tensor": 1},
        compute_dtype="bfloat16",
        peak_flops_per_s=PEAK,
        compile_seconds=23.4,
        memory={"arguments": 41_000_000, "temporaries": 310_000_000, "outputs": 41_000_000, "code": 2_400_000},
        kernels={"attention": "reference in XLA: there is no kernel yet"},
        versions={"jax": "0.10.2", "flax": "0.12.8"},
        **costs,
    )
    save_record(plan, workdir)
    return plan


def write_rows(workdir: Path, recipe: Recipe, plan: PlanRecord, until: int, rng: np.random.Generator) -> None:
    now, facts = [0.0], recipe.model.facts()
    meter = Meter(
        StepCost(plan.tokens_per_step, plan.flops_per_step, plan.dense_flops_per_step, 1.0, plan.peak_flops_per_s),
        clock=lambda: now[0],
        experts=facts.experts,
    )
    log = MetricsLog.open(workdir, 0)
    for step in range(1, until + 1):
        progress = step / recipe.train.steps
        ce = 1.35 + 4.2 * (1 + step / 6) ** -0.75 - 0.12 * max(0, progress - 0.8) + rng.normal(0, 0.035)
        warm = min(1.0, step / 30) * min(1.0, (1 - progress) / 0.2)
        norm = 0.4 + 3 / (1 + step / 8) + rng.exponential(0.06)
        metrics = {"loss": ce + 0.001, "ce": ce, "grad_norm": norm, "skipped": 0}
        settled = 1 - np.exp(-6 * progress)
        if facts.depth == "expert_choice":
            for r, end in enumerate((1.0, 0.984, 0.991)):
                metrics[f"routing/accuracy_{r + 1}"] = min(1.0, 0.55 + (end - 0.55) * settled + rng.normal(0, 0.004))
            metrics["routing/accuracy"] = np.mean([metrics[f"routing/accuracy_{r}"] for r in (1, 2, 3)])
            metrics |= {f"routing/gate_{r}": 0.05 + 0.03 * settled + 0.004 * r for r in (1, 2, 3)}
            metrics["aux/aux_loss"] = 2.0 * (1 - settled) + 0.14 + rng.normal(0, 0.01)
        if facts.depth == "token_choice":
            metrics |= {f"routing/load_{r}": x for r, x in ((1, 0.36), (2, 0.33), (3, 0.31))}
            metrics |= {"routing/max_vio": 0.8 - 0.5 * settled, "aux/balancing_loss": 1.02}
        metrics |= expert_sums(rng, facts.experts, plan.tokens_per_step, skew=1.2 - 0.9 * settled)
        now[0] += plan.flops_per_step / (0.37 * PEAK) * (1 + rng.exponential(0.03))
        meter.waited(0.001)
        meter.add(metrics)
        if step % 5 == 0:
            log.write(meter.row(step, learning_rate=3e-3 * warm))
        if step % 100 == 0 or step == recipe.train.steps:
            bits = (ce + 0.04) / np.log(2)
            row = {"eval/loss": ce + 0.04, "eval/bits_per_byte": bits}
            if facts.depth != "none":
                row |= {"eval/threshold/loss": ce + 0.05, "eval/threshold/bits_per_byte": bits + 0.012}
                row |= {"eval/dead_token_ratio": 0.02 * (1 - settled), "eval/dead_token_ratio_by_chance": 0.0}
            row |= evaluated_experts(rng, facts.experts, plan.tokens_per_step)
            log.write({**meter.position(step), **row})
    log.close()


def expert_sums(rng: np.random.Generator, routed: Sequence[Experts], tokens: int, skew: float) -> dict[str, np.ndarray]:
    """What a step returns of routed layers whose loads differ by about the factor exp(skew)."""
    if not routed:
        return {}
    (one,) = routed
    moe, calls, k = one.settings, len(one.layers), one.settings.router.per_token()
    ranks = isinstance(moe.router, expert_choice.Settings)
    taste = np.random.default_rng(7).normal(size=(calls, moe.experts))  # every step has the same favourites
    taste[-1, 1] = -4.0
    share = np.exp(skew * taste + rng.normal(0, 0.05, taste.shape))
    share /= share.sum(-1, keepdims=True)
    claimed = np.round(tokens * k * share)
    slots = getattr(moe.router, "capacity_factor", 0.0) / moe.experts or 1.0
    kept = np.minimum(claimed, slots * claimed.sum(-1, keepdims=True))
    per_token = np.zeros((calls, 17))
    for n in range(9):
        per_token[:, n] = k**n * math.exp(-k) / math.factorial(n) if ranks else float(n == k)
    full = np.full(calls, float(tokens))
    sums = {
        "calls": np.ones(calls),
        "tokens": full,
        "claimed": claimed,
        "kept": kept,
        "experts_per_token": tokens * per_token / per_token.sum(-1, keepdims=True),
        "dropped": claimed.sum(-1) - kept.sum(-1),
        "lost": np.zeros(calls),
        "z": full * (5.0 - skew),
        "entropy": full * (1.0 + skew / 2),
        "top": full * (0.6 - 0.2 * skew),
    }
    return {f"told/{one.path}:{name}": value for name, value in sums.items()}


def evaluated_experts(rng: np.random.Generator, routed: Sequence[Experts], tokens: int) -> dict[str, object]:
    """Columns of an evaluation's row: as trained, and where experts choose also causally."""
    ranks = any(isinstance(one.settings.router, expert_choice.Settings) for one in routed)
    row, places = {}, {"eval/": 0.2} | ({"eval/threshold/": 0.6} if ranks else {})
    for place, skew in places.items():
        sums = PartSums(routed)
        sums.add(expert_sums(rng, routed, tokens, skew))
        row |= {f"{place}{name}": value for name, value in sums.columns().items()}
    return row


def write_routing(workdir: Path, recipe: Recipe, step: int, rng: np.random.Generator) -> None:
    facts, seq = recipe.model.facts(), recipe.data.seq_len
    counter = RoutingCounter(facts.depth, facts.recursions, stops=facts.stops, classes=classes_of(Bytes()))
    depth, scores = routed(rng, 32, seq, recipe.model)
    text = np.frombuffer((TEXT * (32 * seq // len(TEXT) + 1)).encode(), np.uint8)[: depth.size].reshape(depth.shape)
    nll = rng.exponential(0.5 * depth)
    counter.add(depth, scores, np.ones_like(depth, bool), tokens=text.astype(np.int32), nll=nll)
    shallow = facts.recursions if facts.depth == "none" else 1
    ids = Bytes().encode("Tea ✓ ")
    ends = passage_tokens(Bytes(), [*ids, Bytes.eos_id], [shallow] * (len(ids) + 1), [None, *[1.0] * len(ids)])
    words = re.findall(r"\s*\w{1,5}|\s*[^\w\s]|\s+", TEXT)
    passage = [_token(rng, word, facts) for word in words] + list(ends)
    sample = SampleRecord("The ", "captain was the first to speak.\n“There is <no> light on the water & no wind.”")
    save_record(counter.record(step, "topk", passage, sample), workdir)


def routed(rng: np.random.Generator, rows: int, seq: int, model: Settings) -> tuple[np.ndarray, list[np.ndarray]]:
    """(depth i32[rows, seq], scores) as a trained router might leave them."""
    facts = model.facts()
    n = facts.recursions
    if facts.depth == "none":
        return np.full((rows, seq), n, np.int32), []
    if facts.stops:
        p = rng.dirichlet([1.2] * n, (rows, seq)).astype(np.float32)
        return p.argmax(-1).astype(np.int32) + 1, [p[..., i] for i in range(n)]
    depth, scores = np.zeros((rows, seq), np.int32), []
    for r, k in enumerate(recursion_capacities(model, seq)):
        candidate = depth == r
        wish = rng.random((rows, seq)) < k / candidate.sum(-1, keepdims=True)
        score = np.where(wish | (r == 0), rng.beta(12, 0.7, (rows, seq)), rng.beta(0.7, 12, (rows, seq)))
        score = np.where(candidate, score, np.nan).astype(np.float32)
        order = np.argsort(-np.nan_to_num(score, nan=-1.0), axis=-1)[:, :k]
        np.put_along_axis(depth, order, r + 1, axis=-1)
        scores.append(score)
    return depth, scores


def _token(rng: np.random.Generator, text: str, facts: Facts) -> TokenRecord:
    hard = min(1.0, len(text.strip()) / 6) * (0.4 + 0.6 * rng.random()) + 0.3 * text.strip()[:1].isupper()
    depth = 1 if facts.recursions == 1 else 1 + int(hard > 0.33) + int(hard > 0.66)
    return TokenRecord(text, facts.recursions if facts.depth == "none" else depth, round(4 * hard**2 + 0.1, 3))
