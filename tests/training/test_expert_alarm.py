"""When routing fails it is said, once, with what to change; and what is sound is not."""

import re

import numpy as np
import pytest

from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.settings import RouterSettings
from adaptive.models.facts import Experts
from adaptive.training.expert_alarm import PATIENCE, ExpertAlarm

FAIR = [0.25] * 4
AT = "model.body.stack.blocks.0.feed_forward"


def alarm_of(router, *others, **options):
    """Of experts with this kind of router in one block, and in further ones at these dotted paths."""
    moe = experts.Settings(RouterSettings.member(router)(**options), experts=4)
    paths = [at.removeprefix("model.body.").replace(".", "/") for at in (AT, *others)]
    return ExpertAlarm([Experts(path, at, moe, (0, 3)) for path, at in zip(paths, (AT, *others), strict=True)])


def row(load, place="", **columns):
    """A row of two layers."""
    by_layer = {"dropped_fraction": [0.0, 0.0], "lost_fraction": [0.0, 0.0], "per_token": [2.0, 2.0]}
    by_layer |= {"without_expert": [0.0, 0.0]} | columns
    named = {f"{place}experts/by_layer/{name}": value for name, value in by_layer.items()}
    return {"step": 1, f"{place}experts/by_layer/layer": [0, 3], f"{place}experts/load": load, **named}


def shares(low):
    return [low, low, (1 - 2 * low) / 2, (1 - 2 * low) / 2]


def test_an_expert_that_starves_is_told_of_after_some_intervals_and_once():
    alarm = alarm_of("token_choice")
    bad = row([FAIR, shares(0.02)])
    said = [alarm(bad) for _ in range(PATIENCE + 3)]
    assert said[: PATIENCE - 1] == [[]] * (PATIENCE - 1) and said[PATIENCE:] == [[]] * 3
    (message,) = said[PATIENCE - 1]
    assert "experts 0, 1 of layer 3" in message and "layer 0" not in message
    assert f"raise {AT}.router.balance_coefficient or use {AT}.router=expert_choice" in message
    assert f"set {AT}.router.bias=true" in message
    assert alarm.standing() == [message]


def test_a_transient_is_no_reason():
    alarm = alarm_of("token_choice")
    for _ in range(3):
        assert [alarm(row([FAIR, shares(0.02)])) for _ in range(PATIENCE - 1)] == [[]] * (PATIENCE - 1)
        assert alarm(row([FAIR, shares(0.03)])) == []
    assert alarm.standing() == []


def test_it_is_said_again_when_more_starve_and_forgotten_when_they_recover():
    alarm = alarm_of("token_choice")
    for _ in range(PATIENCE):
        alarm(row([FAIR, shares(0.02)]))
    said = [alarm(row([shares(0.0), shares(0.02)])) for _ in range(PATIENCE)]
    assert said[-2] == [] and "experts 0, 1 of layer 0" in said[-1][0] and "layer 3" in said[-1][0]
    assert alarm(row([shares(0.04), shares(0.02)])) == [], "still near the limit"
    assert len(alarm.standing()) == 1
    alarm(row([FAIR, FAIR]))
    assert alarm.standing() == []


def test_an_evaluation_stands_alone():
    alarm = alarm_of("expert_choice")
    both = row([FAIR, FAIR], "eval/") | row([FAIR, shares(0.01)], "eval/threshold/")
    (message,) = alarm(both)
    assert "held-out text under threshold selection" in message and f"{AT}.router.decode=predictor" in message
    assert alarm(both) == []


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"dropped_fraction": [0.02, 0.12]}, ("dropped", "12% in layer 3", f"{AT}.router.capacity_factor")),
        ({"lost_fraction": [0.2, 0.02]}, ("lost", "20% in layer 0", "buffer_factor")),
        ({"dropped_fraction": [0.02, 0.09]}, ()),
        ({"dropped_fraction": [None, None]}, ()),
    ],
)
def test_dropped_and_lost_pairs_are_told_of_at_once(columns, expected):
    said = alarm_of("token_choice")(row([FAIR, FAIR], **columns))
    assert len(said) == bool(expected) and all(part in said[0] for part in expected)


def test_a_share_of_dropped_pairs_that_stays_near_the_limit_is_said_once():
    alarm = alarm_of("token_choice")
    said = [alarm(row([FAIR, FAIR], dropped_fraction=[0.0, share])) for share in (0.11, 0.09, 0.12, 0.04, 0.11)]
    assert [len(messages) for messages in said] == [1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        ([0.30, 0.05], ""),  # the first layer leaves out many
        ([0.30, 0.15], ""),  # one in 16 is left out by chance alone
        ([0.30, 0.20], "20% in layer 3"),
        ([0.50, 0.05], "50% in layer 0"),
    ],
)
def test_tokens_that_no_expert_takes_with_allowance_for_the_first_layer_and_for_chance(left_out, expected):
    alarm = alarm_of("expert_choice")
    said = [alarm(row([FAIR, FAIR], without_expert=left_out)) for _ in range(PATIENCE)][-1]
    assert len(said) == bool(expected) and expected in "".join(said)
    assert not said or f"{AT}.router.experts_per_token" in said[0]


def test_tokens_without_an_expert_are_no_fault_where_they_may_choose_none_or_pairs_are_dropped():
    for router, more in (("adamoe", {}), ("token_choice", {"experts/by_layer/dropped_fraction": [0.5, 0.5]})):
        alarm = alarm_of(router)
        said = [alarm(row([FAIR, FAIR], without_expert=[0.9, 0.9]) | more) for _ in range(PATIENCE + 1)]
        assert not [text for messages in said for text in messages if "no expert" in text]


def test_experts_that_are_unlike_by_design_have_no_fair_share():
    for router in ("acm", "duo_llm"):
        alarm = alarm_of(router)
        assert [alarm(row([FAIR, shares(0.01)], without_expert=[0.9, 0.9])) for _ in range(PATIENCE)][-1] == []


@pytest.mark.parametrize("router", RouterSettings.kinds())
def test_what_is_told_to_change_is_there(router):
    """Every setting that a message names is one of the experts' or of a router that it says to use."""
    alarm = alarm_of(router)
    bad = row([FAIR, shares(0.01)], dropped_fraction=[0.0, 0.5], without_expert=[0.9, 0.9])
    said = " ".join(text for _ in range(PATIENCE) for text in alarm(bad))
    moe = experts.Settings(RouterSettings.member(router)())
    for name in re.findall(rf"{AT}\.([\w.]*\w)", said):
        node = moe
        for part in name.split("."):
            assert hasattr(node, part), f"{router} has no {name}"
            node = getattr(node, part)


def test_only_the_calls_of_its_own_experts_count_and_others_alike_are_named():
    other = "model.body.stack.blocks.1.feed_forward"
    alarm = alarm_of("token_choice", other)
    own = AT.removeprefix("model.body.").replace(".", "/")
    bad = row([FAIR, FAIR], dropped_fraction=[0.5, 0.5]) | {
        "experts/by_layer/part": [own, "coda/blocks/0/feed_forward"]
    }
    (message,) = alarm(bad)
    assert "50% in layer 0;" in message and "layer 3" not in message and f"(likewise {other})" in message
    same = bad | {"experts/by_layer/layer": [0, 0]}
    assert "50% in layer 0 of stack;" in alarm_of("token_choice")(same)[0]


def test_layers_without_tokens_and_rows_without_experts_are_passed_over():
    alarm = alarm_of("token_choice")
    assert alarm({"step": 1, "ce": 1.0}) == []
    assert [alarm(row([None, FAIR])) for _ in range(PATIENCE)] == [[]] * PATIENCE


def test_a_message_about_many_stays_short():
    alarm, layers = alarm_of("token_choice"), 30
    load = np.zeros((layers, 64))
    load[:, 0] = 1.0
    columns = {name: [0.0] * layers for name in ("dropped_fraction", "lost_fraction", "without_expert")}
    many = row(load.tolist(), **columns, per_token=[1.0] * layers) | {"experts/by_layer/layer": list(range(layers))}
    said = [alarm(many) for _ in range(PATIENCE)][-1]
    assert len(said) == 1 and len(said[0]) < 500 and "and 27 more" in said[0]
    assert "63 of 64 experts of layer 0 (1, 2, 3, 4, 5, 6, and 57 more)" in said[0]


def test_a_collapse_that_goes_on_is_not_news_at_every_row():
    alarm, said = alarm_of("token_choice"), []
    for starving in range(2, 62):
        load = np.full((2, 64), 1 / 64)
        load[1, :starving] = 0.0
        said += alarm(row(load.tolist()))
    assert 5 <= len(said) <= 9 and "experts 0, 1 of layer 3" in said[0]
