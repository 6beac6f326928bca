"""A token-choice run as an expert-choice one: which settings it gets, that no parameter moves, and what is reported."""

import json

import jax
import numpy as np
import pytest
import shapes
from flax import nnx

from adaptive import convert
from adaptive.errors import RecipeError
from adaptive.interop.retrofit import Retrofitted, routers
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import expert_choice, token_choice, top_p
from adaptive.parallel import mesh
from adaptive.recipe import Recipe
from adaptive.runs.load import find, load
from adaptive.training.log import MetricsLog, read_rows
from adaptive.training.report.page import page
from adaptive.training.report.runs import load_run

AT = "model.body.stack.blocks.0.feed_forward.router"


def model(router):
    routed = experts.Settings(router, experts=4, expert_size=8)
    return shapes.plain(1, width=16, hidden=24, heads=2, vocab_size=320, feed_forward=routed)


@pytest.mark.parametrize(
    ("own", "score"),
    [
        ({}, "selected"),
        ({"score": "logits", "capacity_factor": 1.25, "bias": True}, "selected"),
        ({"normalise": False, "route_scale": 4.0}, "softmax"),
        ({"score": "sigmoid", "z_coefficient": 0.001}, "sigmoid"),
    ],
)
def test_weights_are_those_of_the_experts_that_remain(own, score):
    before = model(token_choice.Settings(**own))
    made = Recipe("one", model=before).with_values(routers(before, causal=False)).model
    kept = {name: own[name] for name in ("route_scale", "z_coefficient") if name in own}
    router = expert_choice.Settings(experts_per_token=2.0, score=score, decode="refuse", **kept)
    assert made.body.stack.blocks[0].feed_forward.router == router
    assert routers(before, causal=True)[f"{AT}.decode"] == "threshold"


@pytest.mark.parametrize(
    ("router", "told"),
    [
        (token_choice.Settings(score="cosine"), "score=cosine, weights that no expert choice has"),
        (token_choice.Settings(score="sigmoid", normalise=False), "score=sigmoid and normalise=false"),
        (top_p.Settings(), "routed by top_p"),
        (None, "its model has no experts"),
    ],
)
def test_what_has_no_expert_choice_is_refused(router, told):
    with pytest.raises(RecipeError, match=told):
        routers(model(router) if router else shapes.plain(2), causal=False)


@pytest.mark.compiles
def test_the_command_replaces_the_router_alone(tmp_path, capsys, monkeypatch):
    make = mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda config: make(config, jax.devices()[:1]))
    before, after = tmp_path / "before", tmp_path / "after"
    settings = model(token_choice.Settings(bias=True))
    flat = dict(nnx.to_flat_state(nnx.state(settings.build(jax.random.key(3)))))
    small = ("data=embedded", "data.seq_len=16", "train.batch_size=2", "eval.rows=2", "eval.selection=topk")
    convert.save(Recipe("plain", "", settings).with_(*small), Retrofitted(settings, flat), before)
    asked = ["--to_expert_choice", str(before), "--workdir", str(after), "train.steps=7"]
    assert convert.main(asked) == 0
    said = capsys.readouterr().out
    found = find(after)
    assert found.recipe.name == "plain_ec" and found.recipe.train.steps == 7
    own = dict(nnx.to_flat_state(load(found).state))
    names = lambda flat: {path for path, leaf in flat.items() if isinstance(leaf, nnx.Param)}  # noqa: E731
    assert names(own) == names(flat)
    for path in names(flat):
        np.testing.assert_array_equal(own[path][...], flat[path][...])
    assert [path[-1] for path in set(own) - set(flat)] and not [path for path in own if path[-1] == "bias"]

    told = json.loads((after / "retrofit.json").read_text())
    losses = told["before"]["eval/loss"], told["after"]["eval/loss"]
    assert f"before    {losses[0]:.4f} nats per token, with token choice: plain at step 0" in said
    assert losses[0] != losses[1] and all(5 < loss < 7 for loss in losses)
    assert told["after"]["eval/experts/load_max_over_mean"] == 1
    assert read_rows(after)[0]["eval/loss"] == losses[1]

    log = MetricsLog.open(after, 0)  # as training does
    log.write({"step": 5, "tokens": 5, "seconds": 1.0, "eval/loss": 4.25, "eval/experts/without_expert": 0.125})
    log.close()
    shown = page(load_run(after))
    assert "From token choice to expert choice" in shown and "Held-out loss along the continuation" in shown
    for cell in (f"{losses[0]:.4f}", f"{losses[1]:.4f}", "after 5 more steps", "4.2500", "0.1250"):
        assert f"<td>{cell}</td>" in shown
    assert convert.main(asked) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert convert.main([*asked, "--kind", "llama"]) == 2
    assert "takes --workdir, --step and settings alone" in capsys.readouterr().err
