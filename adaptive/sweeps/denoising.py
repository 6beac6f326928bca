"""How well a model fills in hidden tokens of what its run holds out, by how many are hidden.

The noise is the same for all runs with the same held-out rows, so that differences between runs are of the same tokens.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.data.pipeline import open_data
from adaptive.evaluation.bootstrap import interval
from adaptive.objectives import asked
from adaptive.runs.load import Trained
from adaptive.sweeps.runs import RESAMPLES, Scored
from adaptive.training.log import is_evaluation, read_rows
from adaptive.training.report.retrofit import RETROFIT_FILE
from kernels_pallas.choice import here

DRAWS, ROWS, BINS = 4, 256, 4
RULE = "train"


def scored(trained: Trained, folder: Path) -> Scored:
    """An upper bound on the nats of a token (`Objective.held_out`), its mean over rows in which from i / BINS to
    (i + 1) / BINS of all tokens are hidden, and what the run's rows of metrics say of its way."""
    nll, count, ratio = _sums(trained)
    own = nll.sum(0) / count.sum(0)  # of each row, the mean of its draws
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), RESAMPLES)
    tokens = count[0]
    drawn = (weights @ (own * tokens)) / (weights @ tokens)
    number = np.minimum((ratio * BINS).astype(int), BINS - 1)
    mean = lambda chosen: float(nll[chosen].sum() / count[chosen].sum()) if chosen.any() else None  # noqa: E731
    told = {
        "loss": float((own * tokens).sum() / tokens.sum()),
        "loss_interval": interval(drawn),
        "rows": len(own),
        "draws": DRAWS,
        "by_ratio": [mean(number == i) for i in range(BINS)],
        **way(folder),
    }
    return Scored(RULE, {RULE: told}, {RULE: drawn})


def way(folder: Path) -> dict[str, Any]:
    """curve: [step, held-out loss] of every evaluation; tokens_per_s: the median of training; experts: means over the
    last half of it; begun: the losses before and right after the routers were replaced, where the run began so."""
    rows = read_rows(folder)
    curve = [[row["step"], row["eval/loss"]] for row in rows if row.get("eval/loss") is not None]
    trained = [row for row in rows if not is_evaluation(row)]
    late = trained[len(trained) // 2 :]
    names = ("load_max_over_mean", "dropped_fraction", "without_expert", "rows_over_average", "rows_deviation")
    found = {name: [row[f"experts/{name}"] for row in late if row.get(f"experts/{name}") is not None] for name in names}
    speeds = [row["tokens_per_s"] for row in trained if row.get("tokens_per_s")]
    told: dict[str, Any] = {"curve": curve, "experts": {name: float(np.mean(a)) for name, a in found.items() if a}}
    told["tokens_per_s"] = float(np.median(speeds)) if speeds else None
    if (replaced := folder / RETROFIT_FILE).exists():
        both = json.loads(replaced.read_text(encoding="utf-8"))
        told["begun"] = [both[name].get("eval/loss") for name in ("before", "after")]
    return told


def _sums(trained: Trained) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f64[draws, rows]: weighted nats of hidden tokens, tokens that may be hidden, and the share of those that are."""
    recipe, aim = trained.recipe, trained.recipe.objective

    def sums(state: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        model, inputs = nnx.merge(trained.graphdef, state), aim.held_out(batch, key)
        out = model(inputs.tokens, **asked(aim, inputs, batch, segmented=not recipe.data.cross_document), logits=False)
        nll = (aim.loss(model, out, inputs, recipe.train.loss_chunk).nll * inputs.weights).sum(-1)
        counted = jnp.asarray(inputs.counted).sum(-1)
        hidden = (inputs.weights > 0).sum(-1) / jnp.maximum(counted, 1)
        return nll, counted, hidden

    data = open_data(recipe.data, batch_size=recipe.train.batch_size, vocab_size=recipe.model.vocab_size)
    step = jax.jit(sums)
    found = []
    with here(recipe.train.kernels):
        for number, batch in enumerate(data.validation(ROWS)):
            keys = [jax.random.fold_in(jax.random.key(draw), number) for draw in range(DRAWS)]
            each = [step(trained.state, batch, key) for key in keys]
            found.append([np.stack([np.asarray(a, np.float64) for a in draws]) for draws in zip(*each, strict=True)])
    nll, count, ratio = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    there = count[0] > 0
    return nll[:, there], count[:, there], ratio[:, there]
