"""The bound of a diffusion model against a loop over draws, what the command says of it, and what it refuses."""

import json
import math

import jax
import numpy as np
import pytest
from evaluation import small_runs
from flax import nnx

from adaptive import convert, evaluate
from adaptive.errors import RecipeError
from adaptive.evaluation import bound
from adaptive.evaluation.sets import open_sets
from adaptive.runs.load import find, load
from adaptive.runs.mask_token import denoising_of

pytestmark = pytest.mark.compiles

SEQ, DRAWS = 32, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dlm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTIVE_CACHE", str(folder / "cache"))
        small_runs.made(folder, small_runs.PLAIN, "objective=masked_diffusion")
        trained = load(find(folder))
        (data,) = open_sets([f"{folder}/texts/own.txt"], trained.recipe, trained.tokenizer)
        yield folder, trained, data


def test_the_bound_is_the_mean_over_draws_and_rows(run):
    """Of every draw, of every row: n over how many are hidden, times their cross entropies."""
    _, trained, data = run
    denoiser = bound.denoiser_of(trained)
    told = bound.measure(denoiser, data, draws=DRAWS).told
    model = jax.jit(
        lambda s, *a: nnx.merge(trained.graphdef, s)(a[0], segment_ids=a[1], positions=a[2], sees="all").logits
    )
    rows = [row.batch for row in data.first(0)]
    totals, size = np.zeros(DRAWS), 0
    for group in range(-(-len(rows) // denoiser.rows)):
        taken = rows[group * denoiser.rows : (group + 1) * denoiser.rows]
        filled = [*taken, *[taken[0]._replace(segment_ids=np.zeros(SEQ, np.int32))] * (denoiser.rows - len(taken))]
        tokens, segments, places = (
            np.stack([getattr(r, f) for r in filled]) for f in ("tokens", "segment_ids", "positions")
        )
        batch = taken[0]._replace(
            tokens=tokens, targets=tokens, positions=places, segment_ids=segments,
            mask=np.stack([r.mask if i < len(taken) else 0 * r.mask for i, r in enumerate(filled)]),
        )  # fmt: skip
        for draw in range(DRAWS):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), draw), group)
            drawn = denoiser.draw(batch, key)
            read = np.where(drawn.weights > 0, 258, tokens)
            logits = np.asarray(model(trained.state, read, segments, places), np.float64)
            nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
            for row in range(len(taken)):
                hidden, n = drawn.weights[row] > 0, drawn.counted[row].sum()
                totals[draw] += nll[row][hidden].sum() * n / hidden.sum()
                size += n * (draw == 0)
    assert told["targets"] == size and told["draws"] == DRAWS
    np.testing.assert_allclose(told["loss"], totals.mean() / size, rtol=1e-5)
    np.testing.assert_allclose(told["loss_error"], totals.std(ddof=1) / math.sqrt(DRAWS) / size, rtol=1e-3)
    assert sum(group["targets"] for group in told["by_kind"]) == size


def test_a_model_that_guesses_has_a_bound_without_an_error(run):
    _, trained, data = run
    blank = trained._replace(state=jax.tree.map(np.zeros_like, trained.state))
    told = bound.measure(bound.denoiser_of(blank), data, draws=2).told
    np.testing.assert_allclose(told["loss"], math.log(320), rtol=1e-6)
    assert told["loss_error"] < 1e-6
    np.testing.assert_allclose([group["loss"] for group in told["by_share"]], math.log(320), rtol=1e-6)


def test_the_command_says_that_it_is_a_bound_and_how_sure(run, capsys):
    folder, *_ = run
    assert evaluate.main(["--checkpoint", str(folder), "--draws", "2", "--resamples", "20"]) == 0
    said = capsys.readouterr().out
    assert "upper bound" in said and "2 draws" in said and "standard error" in said and "hidden share" in said
    (kept,) = (folder / "evaluations").glob("*.json")
    (one,) = json.loads(kept.read_text())["sets"].values()
    assert one["train"]["loss_error"] > 0 and one["train"]["bits_per_byte"] > 0


def test_what_it_has_nothing_for_is_refused(run, capsys, tmp_path, monkeypatch):
    folder, trained, _ = run
    assert evaluate.main(["--checkpoint", str(folder), "--depths", "1,2"]) == 2
    assert "objective=masked_diffusion" in capsys.readouterr().err
    assert denoising_of(trained.recipe).mask_id == 258
    assert "docs/diffusion.md" in trained.refuse_generation
    assert convert.main(["--workdir", str(folder), "--export", str(tmp_path / "out")]) == 2
    assert "cannot be exported" in capsys.readouterr().err
    monkeypatch.setenv("ADAPTIVE_CACHE", str(tmp_path / "cache"))
    causal = small_runs.made(tmp_path / "causal", small_runs.PLAIN)
    assert evaluate.main(["--checkpoint", str(tmp_path / "causal"), "--draws", "2"]) == 2
    assert "--draws" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="adaptive generate"):
        denoising_of(causal)
