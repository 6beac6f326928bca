"""The arithmetic of `bench engine`, and what it refuses. No assertion is about time."""

import argparse

import numpy as np
import pytest
from rich.console import Console

from adaptive.account import layer_counts
from adaptive.benchmarks import engine
from adaptive.errors import UserError

GIVEN = argparse.Namespace(
    width=512, layers=14, recursions=3, batch=8, tokens=32, vocab=1024, repeats=1, own=(0.5, 0.25, 0.25)
)


def test_depths_are_replayed_in_the_shares_that_are_given():
    shares = engine.distributions(GIVEN)
    assert shares["all passes"] == (0, 0, 1) and shares["geometric"] == pytest.approx((4 / 7, 2 / 7, 1 / 7))
    for share in shares.values():
        depths = engine.replayed(share)
        assert np.bincount(depths, minlength=4)[1:] / len(depths) == pytest.approx(share, abs=1e-3)
        assert (depths == engine.replayed(share)).all()
    assert engine.replayed(shares["geometric"]).mean() <= 1.7


def test_both_models_have_as_many_layers_unrolled():
    vanilla, looped = engine.models(GIVEN)
    assert layer_counts(vanilla) == (14, 14) and layer_counts(looped) == (6, 14)


def test_what_is_saved_and_the_floor_follow_depth():
    vanilla, looped = engine.models(GIVEN)
    full = engine.Found("engine, all passes", 3.0, 100.0, 1.0, ideal=0.008)
    half = engine.Found("engine, geometric", 1.5, 150.0, 1.0, ideal=0.005)
    assert half.share == pytest.approx(0.75)
    (own,) = engine.saved(GIVEN, looped, {"turn": 1.0, "pass": 2.0}, {f.name: f for f in (full, half)})
    assert own["time"] == pytest.approx(1 / 3) and own["launches"] == pytest.approx(3 / 8)
    assert own["compiler"] == pytest.approx(3 / 7) and 0.3 < own["account"] < 0.5
    floors = [engine.floor_rate(GIVEN, vanilla, looped, "", depth, 1e9) for depth in (None, 3.0, 1.5)]
    assert floors[0] == floors[1] < floors[2]
    report = {
        "ways": [vars(full) | {"share": full.share, "first": (1.0, 2.0), "between": (0.1, 0.2)}],
        "cache_bytes_per_token": {full.name: 4.0},
        "saved": [own],
        "alone": [{"name": full.name, "rate": 1.0, "floor": 2.0}],
    }
    console = Console(record=True, width=140)
    for table in engine.tables(report):
        console.print(table)
    text = console.export_text()
    assert "80.0%" in text and "1000 / 2000" in text and "50.0%" in text


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["--layers", "12"], "equal passes: 8, 14"), (["--own", "0.5,0.5"], "2 shares for 3 passes")],
)
def test_shapes_that_do_not_fit_are_refused(words, problem):
    with pytest.raises(UserError, match=problem):
        engine.main(words)
