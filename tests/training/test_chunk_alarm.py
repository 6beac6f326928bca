"""When chunking fails it is said, once, with what to change; and what is sound is not."""

import pytest
import shapes

from adaptive.training.chunk_alarm import EVALUATIONS, INTERVALS, ChunkAlarm


def alarm_of(*layout, **options):
    """Of an H-Net with this layout, by default one stage."""
    return ChunkAlarm(shapes.hnet(layout or ("m1", ("T1",), "m1"), **{"target": 6.0} | options).facts().chunking)


def one():
    return alarm_of()


def two():
    return alarm_of("m1", ("m1", ("T1",), "m1"), "m1", target=3.0)


def row(place, *kept, step=1, overflow=0.0, also=()):
    columns = {f"{place}routing/kept_{s}": share for s, share in enumerate(kept)}
    columns |= {f"{place}routing/overflow_{s}": overflow for s in range(len(kept))}
    return {"step": step, **columns, **dict(also)}


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (0.99, ["99.0%", "nothing is compressed"]),
        (0.004, ["0.4%", "250 positions per chunk", "chunker.target (now 6)"]),
    ],
)
def test_a_chunker_that_keeps_all_or_nothing_is_told_of_after_some_evaluations_and_once(kept, says):
    alarm = one()
    said = [alarm(row("eval/", kept)) for _ in range(EVALUATIONS + 3)]
    assert said[: EVALUATIONS - 1] == [[]] * (EVALUATIONS - 1) and said[EVALUATIONS:] == [[]] * 3
    (message,) = said[EVALUATIONS - 1]
    for text in ("stage 0", "model.body.chunker.ratio_coefficient (now 0.03)", "model.body.rate", *says):
        assert text in message
    assert alarm.standing() == [message]


def test_what_published_models_do_is_sound():
    for alarm, kept in ((one(), (1 / 4.8,)), (two(), (0.4, 0.37)), (two(), (0.5, 0.25))):
        for step in range(20):
            assert alarm(row("", *kept, step=step)) == [] and alarm(row("eval/", *kept, step=step)) == []


def test_a_transient_is_no_reason_and_it_is_said_again_after_recovery_alone():
    alarm = two()
    calls = lambda *kept: [alarm(row("eval/", *kept)) for _ in range(EVALUATIONS)]  # noqa: E731
    alarm(row("eval/", 0.3, 1.0))
    assert alarm(row("eval/", 0.3, 0.3)) == []
    assert "stage 1" in calls(0.3, 1.0)[-1][0]
    assert alarm(row("eval/", 0.3, 0.94)) == [] and alarm.standing() == []
    assert calls(0.3, 1.0)[-1] == [], "it never was far from the limit"
    alarm(row("eval/", 0.3, 0.4))
    assert "stage 1" in calls(0.3, 1.0)[-1][0]


def test_chunks_of_many_times_the_target_are_too_long():
    alarm = two()
    said = [alarm(row("eval/", 1 / 25, 0.3)) for _ in range(EVALUATIONS)]
    assert "25 positions per chunk" in said[-1][0]
    alarm = alarm_of(target=60.0)
    assert [alarm(row("eval/", 1 / 70)) for _ in range(EVALUATIONS)] == [[]] * EVALUATIONS


def test_what_is_wanted_counts_where_capacities_hide_it():
    alarm = one()
    capped = row("eval/", 0.3, overflow=0.7)
    assert "100.0%" in [alarm(capped) for _ in range(EVALUATIONS)][-1][0]
    alarm = one()
    both = row("eval/", 0.3) | row("eval/threshold/", 0.99)
    assert "99.0%" in [alarm(both) for _ in range(EVALUATIONS)][-1][0]


def test_rules_may_cut_as_they_like():
    alarm = alarm_of(chunker="none")
    assert [alarm(row("eval/", 1.0)) for _ in range(5)] == [[]] * 5


def test_slots_that_run_out_are_told_of_once_capacities_have_shrunk():
    model = shapes.with_body(shapes.hnet(), capacities=(1.0, 0.25), capacity_steps=(100,))
    alarm = ChunkAlarm(model.facts().chunking)
    before = [alarm(row("", 0.2, step=step, overflow=0.3)) for step in range(10, 100, 10)]
    after = [alarm(row("", 0.2, step=step, overflow=0.3)) for step in range(110, 210, 10)]
    assert before == [[]] * 9 and [len(said) for said in after] == [0] * (INTERVALS - 1) + [1] + [0] * (10 - INTERVALS)
    message = after[INTERVALS - 1][0]
    assert "30%" in message and "model.body.capacities (now 0.25)" in message
    assert [ChunkAlarm(model.facts().chunking)(row("", 0.2, step=999, overflow=0.05)) for _ in range(9)] == [[]] * 9


def test_held_out_text_that_is_cut_otherwise_is_told_of():
    alarm = one()
    said = []
    for step in range(EVALUATIONS):
        alarm(row("", 0.2, step=step))
        said.append(alarm(row("eval/", 0.35, step=step)))
    (message,) = said[-1]
    assert said[:-1] == [[]] * (EVALUATIONS - 1) and "2.86" in message and "5.00" in message and "data.paths" in message


def test_columns_that_are_not_finite_or_missing_are_passed_over():
    alarm = two()
    for _ in range(5):
        assert alarm({"step": 1, "eval/routing/kept_0": None, "eval/loss": 1.0}) == []
        assert alarm({"step": 1, "loss": 1.0}) == []


def test_settings_are_those_of_the_stage_and_of_its_chunker():
    alarm = alarm_of("m1", ("m1", ("T1",), "m1"), "m1", chunker=("stride", "similarity"))
    said = [alarm(row("eval/", 0.3, 1.0)) for _ in range(EVALUATIONS)][-1]
    assert "stage 1" in said[0] and "model.body.inner.chunker.ratio_coefficient" in said[0]
    alarm(row("", 0.3, 0.3))
    said = [alarm(row("eval/", 0.3, 0.6)) for _ in range(EVALUATIONS)][-1]
    assert "model.body.inner.chunker.flip_temperature" in said[0]
