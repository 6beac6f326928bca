"""Calibration, groups, intervals and verdicts, against what they are by definition."""

import json

import numpy as np
import pytest

from adaptive.data.tokenizers import load_tokenizer
from adaptive.evaluation import bootstrap, files
from adaptive.evaluation.curve import verdict
from adaptive.evaluation.predictions import BINS, Predictions, by_context, by_kind, calibration, sums_by

RNG = np.random.default_rng(0)


def predictions(n=400, **given):
    some = {
        "nll": RNG.gamma(2.0, size=n).astype(np.float32),
        "top": RNG.random(n).astype(np.float32),
        "right": RNG.random(n) < 0.4,
        "token": RNG.integers(0, 257, n).astype(np.int32),
        "size": np.ones(n, np.int32),
        "context": RNG.integers(1, 40, n).astype(np.int32),
        "document": np.sort(RNG.integers(0, 9, n)),
        "row": np.arange(n, dtype=np.int32) // 32,
    }
    return Predictions(**(some | given))


def test_calibration_is_the_weighted_gap_of_the_bins():
    said = predictions(
        top=np.array([0.9, 0.95, 0.94, 0.1, 1.0], np.float32), right=np.array([1, 0, 1, 0, 1], bool), n=5
    )
    found = calibration(said)
    # Bins of 1/15: 0.1 alone; 0.9 alone (0.867 to 0.933); 0.95, 0.94 and 1.0 together.
    gaps = [abs(0 - 0.1), abs(1 - 0.9), abs(2 / 3 - (0.95 + 0.94 + 1.0) / 3)]
    assert found["error"] == pytest.approx((gaps[0] + gaps[1] + 3 * gaps[2]) / 5, rel=1e-5)
    assert BINS == 15 and [one["targets"] for one in found["bins"]] == [1, 1, 3]
    sure = predictions(top=np.ones(400, np.float32), right=np.ones(400, bool))
    assert calibration(sure)["error"] == 0


def test_groups_cover_every_target_once():
    said, tokenizer = predictions(), load_tokenizer("bytes")
    for groups in (by_kind(said, tokenizer), by_context(said)):
        assert sum(group["targets"] for group in groups) == 400
        mean = sum(group["targets"] * group["loss"] for group in groups) / 400
        assert mean == pytest.approx(said.nll.astype(np.float64).mean())
    third = next(group for group in by_context(said) if group["from"] == 4)
    inside = (said.context >= 4) & (said.context <= 7)
    assert third["to"] == 7 and third["loss"] == pytest.approx(said.nll[inside].mean(), rel=1e-6)
    digits = next(group for group in by_kind(said, tokenizer) if group["kind"] == "digits")
    assert digits["targets"] == np.isin(said.token, list(b"0123456789")).sum()


def test_markers_count_as_tokens_and_not_as_text():
    said, tokenizer = predictions(token=np.array([65, 256, 66], np.int32), n=3), load_tokenizer("bytes")
    said = said._replace(size=np.array([1, 0, 1], np.int32), document=np.array([0, 0, 1]))
    sums = sums_by(said.document, said, tokenizer)
    assert sums.targets.tolist() == [2, 1] and sums.bytes.tolist() == [1, 1]
    assert sums.text_nats[0] == pytest.approx(said.nll[0]) and sums.loss() == pytest.approx(said.nll.mean())


def test_intervals_are_those_of_a_ratio_of_resampled_sums():
    """Against a bootstrap that draws documents one by one, and paired between two models."""
    said, tokenizer = predictions(4000, document=np.sort(RNG.integers(0, 40, 4000))), load_tokenizer("bytes")
    sums = sums_by(said.document, said, tokenizer)
    drawn = bootstrap.resampled(sums, 0, 2000)
    picks = np.random.default_rng(5).integers(0, 40, (2000, 40))
    plain = sums.nats[picks].sum(1) / sums.targets[picks].sum(1)
    assert bootstrap.interval(drawn.loss) == pytest.approx(bootstrap.interval(plain), abs=0.1 * plain.std())
    worse = bootstrap.resampled(sums._replace(nats=sums.nats + 0.5 * sums.targets), 0, 2000)
    assert bootstrap.interval(worse.loss - drawn.loss) == pytest.approx([0.5, 0.5])
    assert bootstrap.resampled(sums_by(np.zeros(4000), said, tokenizer), 0) is None
    right = RNG.random(150) < 0.6
    low, high = bootstrap.interval(bootstrap.means(right.astype(float), 0))
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.24 / 150), rel=0.15)


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ([3.0, 2.5, 2.2], "falling"),
        ([3.0, 2.2, 2.2001], "falling"),
        ([3.0, 2.2, 2.5], "U"),
        ([2.2, 2.5, 3.0], "rising"),
        ([2.2, 2.2005, 2.201], "flat"),
        ([2.2, 2.2, 2.2], "flat"),
        ([2.2, 2.5, 2.2], "flat"),
        ([57.9], "one depth"),
        ([2.2, np.nan], "not finite"),
    ],
)
def test_a_curve_has_one_verdict(losses, word):
    depths = range(1, len(losses) + 1)
    assert verdict(depths, losses)["verdict"] == word
    exact = np.repeat(np.array(losses)[:, None], 50, axis=1)
    assert verdict(depths, losses, exact)["verdict"] == word


def test_differences_within_chance_are_none():
    losses = [3.0, 2.9, 2.8]
    noisy = np.array(losses)[:, None] + RNG.normal(size=(3, 500))
    assert verdict((1, 2, 4), losses, noisy)["verdict"] == "flat"
    assert "flat from 2 on" in verdict((1, 2, 4), [3.0, 2.2, 2.2001])["says"]


def test_a_model_that_gives_no_numbers_is_evaluated_and_told(tmp_path):
    said = predictions(nll=np.full(400, np.nan, np.float32), top=np.full(400, np.nan, np.float32))
    assert not np.isfinite(calibration(said)["error"])
    files.write(tmp_path / "own.json", {"loss": float("nan"), "sets": [{"loss": float("inf")}]})
    told = files.read_all(tmp_path.parent)
    assert not told and json.loads((tmp_path / "own.json").read_text())["sets"] == [{"loss": None}]
