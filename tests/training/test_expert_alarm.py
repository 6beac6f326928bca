"""When routing fails it is said, once, with what to change; and what is sound is not."""

import numpy as np
import pytest

from adaptive.training.expert_alarm import PATIENCE, ExpertAlarm

FAIR = [0.25] * 4


def row(load, place="", **columns):
    """A row of two layers."""
    by_layer = {"dropped_fraction": [0.0, 0.0], "lost_fraction": [0.0, 0.0], "per_token": [2.0, 2.0]}
    by_layer |= {"without_expert": [0.0, 0.0]} | columns
    named = {f"{place}experts/by_layer/{name}": value for name, value in by_layer.items()}
    return {"step": 1, f"{place}experts/by_layer/layer": [0, 3], f"{place}experts/load": load, **named}


def shares(low):
    return [low, low, (1 - 2 * low) / 2, (1 - 2 * low) / 2]


def test_an_expert_that_starves_is_told_of_after_some_intervals_and_once():
    alarm = ExpertAlarm("token_choice")
    bad = row([FAIR, shares(0.02)])
    said = [alarm(bad) for _ in range(PATIENCE + 3)]
    assert said[: PATIENCE - 1] == [[]] * (PATIENCE - 1) and said[PATIENCE:] == [[]] * 3
    (message,) = said[PATIENCE - 1]
    assert "experts 0, 1 of layer 3" in message and "layer 0" not in message
    assert "model.moe.balance_coefficient" in message and "bias=true" in message and "expert_choice" in message
    assert alarm.standing() == [message]


def test_a_transient_is_no_reason():
    alarm = ExpertAlarm("token_choice")
    for _ in range(3):
        assert [alarm(row([FAIR, shares(0.02)])) for _ in range(PATIENCE - 1)] == [[]] * (PATIENCE - 1)
        assert alarm(row([FAIR, shares(0.03)])) == []
    assert alarm.standing() == []


def test_it_is_said_again_when_more_starve_and_forgotten_when_they_recover():
    alarm = ExpertAlarm("token_choice")
    for _ in range(PATIENCE):
        alarm(row([FAIR, shares(0.02)]))
    said = [alarm(row([shares(0.0), shares(0.02)])) for _ in range(PATIENCE)]
    assert said[-2] == [] and "experts 0, 1 of layer 0" in said[-1][0] and "layer 3" in said[-1][0]
    assert alarm(row([shares(0.04), shares(0.02)])) == [], "still near the limit"
    assert len(alarm.standing()) == 1
    alarm(row([FAIR, FAIR]))
    assert alarm.standing() == []


def test_an_evaluation_stands_alone():
    alarm = ExpertAlarm("expert_choice")
    both = row([FAIR, FAIR], "eval/") | row([FAIR, shares(0.01)], "eval/threshold/")
    (message,) = alarm(both)
    assert "held-out text under threshold selection" in message and "decode=predictor" in message
    assert alarm(both) == []


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"dropped_fraction": [0.02, 0.12]}, ("dropped", "12% in layer 3", "model.moe.capacity_factor")),
        ({"lost_fraction": [0.2, 0.02]}, ("lost", "20% in layer 0", "buffer_factor")),
        ({"dropped_fraction": [0.02, 0.09]}, ()),
        ({"dropped_fraction": [None, None]}, ()),
    ],
)
def test_dropped_and_lost_pairs_are_told_of_at_once(columns, expected):
    said = ExpertAlarm("token_choice")(row([FAIR, FAIR], **columns))
    assert len(said) == bool(expected) and all(part in said[0] for part in expected)


def test_a_share_of_dropped_pairs_that_stays_near_the_limit_is_said_once():
    alarm = ExpertAlarm("token_choice")
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
    alarm = ExpertAlarm("expert_choice")
    said = [alarm(row([FAIR, FAIR], without_expert=left_out)) for _ in range(PATIENCE)][-1]
    assert len(said) == bool(expected) and expected in "".join(said)
    assert not said or "model.moe.experts_per_token" in said[0]


def test_tokens_without_an_expert_are_no_fault_where_they_may_choose_none_or_pairs_are_dropped():
    for more in ({"experts/zero_share": 0.4}, {"experts/by_layer/dropped_fraction": [0.5, 0.5]}):
        alarm = ExpertAlarm("adamoe")
        said = [alarm(row([FAIR, FAIR], without_expert=[0.9, 0.9]) | more) for _ in range(PATIENCE + 1)]
        assert not [text for messages in said for text in messages if "no expert" in text]


def test_experts_that_are_unlike_by_design_have_no_fair_share():
    for router in ("acm", "duo_llm"):
        alarm = ExpertAlarm(router)
        assert [alarm(row([FAIR, shares(0.01)], without_expert=[0.9, 0.9])) for _ in range(PATIENCE)][-1] == []
    (message,) = ExpertAlarm("blockffn")(row([FAIR, FAIR], dropped_fraction=[0.5, 0.5]))
    assert "bounds in model.moe.options" in message


def test_layers_without_tokens_and_rows_without_experts_are_passed_over():
    alarm = ExpertAlarm("token_choice")
    assert alarm({"step": 1, "ce": 1.0}) == []
    assert [alarm(row([None, FAIR])) for _ in range(PATIENCE)] == [[]] * PATIENCE


def test_a_message_about_many_stays_short():
    alarm, layers = ExpertAlarm("token_choice"), 30
    load = np.zeros((layers, 64))
    load[:, 0] = 1.0
    columns = {name: [0.0] * layers for name in ("dropped_fraction", "lost_fraction", "without_expert")}
    many = row(load.tolist(), **columns, per_token=[1.0] * layers) | {"experts/by_layer/layer": list(range(layers))}
    said = [alarm(many) for _ in range(PATIENCE)][-1]
    assert len(said) == 1 and len(said[0]) < 450 and "and 27 more" in said[0]
    assert "63 of 64 experts of layer 0 (1, 2, 3, 4, 5, 6, and 57 more)" in said[0]


def test_a_collapse_that_goes_on_is_not_news_at_every_row():
    alarm, said = ExpertAlarm("token_choice"), []
    for starving in range(2, 62):
        load = np.full((2, 64), 1 / 64)
        load[1, :starving] = 0.0
        said += alarm(row(load.tolist()))
    assert 5 <= len(said) <= 9 and "experts 0, 1 of layer 3" in said[0]
