"""Which alarms a model has, and what a single row gives reason to say."""

import pytest
import shapes

from adaptive.layers import stack
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import expert_choice, token_choice
from adaptive.models.bodies import plain
from adaptive.training.alarms import alarms, health_warnings
from adaptive.training.chunk_alarm import ChunkAlarm
from adaptive.training.expert_alarm import ExpertAlarm


def test_a_model_has_one_alarm_for_each_kind_of_experts_and_one_for_its_chunks():
    kinds = lambda model: [type(alarm) for alarm in alarms(model.facts())]  # noqa: E731
    assert kinds(shapes.plain()) == [] and kinds(shapes.hnet()) == [ChunkAlarm]
    assert kinds(shapes.recursive(feed_forward=experts.Settings())) == [ExpertAlarm]
    routed = [experts.Settings(router.Settings()) for router in (token_choice, expert_choice, token_choice)]
    inside = plain.Settings(stack.Settings(tuple(shapes.block(feed_forward=moe) for moe in routed)))
    assert kinds(shapes.hnet(("m1", inside, "m1"), widths=32)) == [ExpertAlarm, ExpertAlarm, ChunkAlarm]


@pytest.mark.parametrize(
    ("row", "progress", "expected"),
    [
        ({"routing/accuracy": 0.94}, 1.0, "sampling accuracy 94.0%"),
        ({"routing/accuracy": 0.94}, 1.0, "raise model.body.inner.depth.aux_coefficient"),
        ({"eval/routing/accuracy": 0.5}, 0.6, "sampling accuracy"),
        ({"routing/accuracy": 0.94}, 0.2, ""),
        ({"routing/accuracy": 0.96}, 1.0, ""),
        ({"routing/max_vio": 1.2}, 0.1, "MaxVio 1.20"),
        ({"routing/max_vio": 1.2}, 0.1, "raise model.body.inner.depth.balance_coefficient"),
        ({"routing/max_vio": 0.9}, 1.0, ""),
        ({"eval/dead_token_ratio": 0.3}, 1.0, "30.0% of positions"),
        ({"eval/dead_token_ratio": 0.3, "eval/dead_token_ratio_by_chance": 0.29}, 1.0, ""),
        ({"data_wait_ms": 10.0, "step_ms": 100.0}, 1.0, "waits 10.0 ms"),
        ({"data_wait_ms": 2.0, "step_ms": 100.0}, 1.0, ""),
        ({"skipped": 2}, 1.0, "2 step(s) skipped"),
        ({"skipped": 0, "routing/accuracy": None}, 1.0, ""),
    ],
)
def test_health_warnings(row, progress, expected):
    found = health_warnings(row, "model.body.inner", progress)
    assert len(found) == bool(expected)
    assert expected in "".join(found.values())
