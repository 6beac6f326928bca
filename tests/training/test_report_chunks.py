"""The report of an H-Net: passage, histograms and curves of its chunks, and nothing of them elsewhere."""

import dataclasses
import io
import re

import numpy as np
import pytest
import shapes
from training.test_report import Page

from adaptive.data.tokenizers import load_tokenizer
from adaptive.recipe import Recipe
from adaptive.training.log import MetricsLog
from adaptive.training.progress import evaluation_line, plain_line
from adaptive.training.report.bars import histogram
from adaptive.training.report.chunks import bytes_per_chunk, chunks
from adaptive.training.report.collect import ChunkCounter, RoutingCounter, passage_tokens
from adaptive.training.report.page import write_report
from adaptive.training.report.passage import chunk_sizes, chunks_html, print_chunks
from adaptive.training.report.runs import load_run
from adaptive.training.report.schema import MOST_BYTES, PlanRecord, RoutingRecord, load_record, save_record

TEXT = "Der Fluß steigt, und die Brücke hält.\n"
TWO = shapes.hnet(("m1", ("m1", ("T1",), "m1"), "m1"))


def stages_of_text(ids):
    """(mask, probability) of two stages: at blanks, and at every second of them."""
    blank = np.array([i == 0 or token == ord(" ") for i, token in enumerate(ids)])
    second = blank & (np.cumsum(blank) % 2 == 1)
    return [(blank, np.where(blank, 0.9, 0.05)), (second, np.where(blank, 0.4, np.nan))]


@pytest.fixture(scope="module")
def passage():
    tokenizer = load_tokenizer("hnet-bytes")
    ids = np.array([254, *TEXT.encode()])
    loss = [None, *np.linspace(0.1, 5.0, len(ids) - 1)]
    return passage_tokens(tokenizer, ids, np.ones(len(ids), int), loss, stages_of_text(ids))


def write_run(folder, passage, model=TWO):
    recipe = dataclasses.replace(Recipe(name="made").with_("data.tokenizer=hnet-bytes"), model=model)
    folder.mkdir()
    (folder / "recipe.json").write_text(recipe.to_json())
    log = MetricsLog.open(folder, 0)
    for step in range(10, 200, 10):
        far = {"step": step, "tokens": step * 100, "flops": step * 1e6, "seconds": step / 10}
        columns = {"bytes_per_chunk": 6.0}
        for s in range(2):
            columns |= {f"kept_{s}": 0.4, f"probability_{s}": 0.42}
            columns |= {f"near_half_{s}": 0.1, f"overflow_{s}": 0.02, f"probability_std_{s}": 0.2}
            columns |= {f"ratio_loss_global_{s}": 1.02, f"ratio_loss_device_{s}": 1.02 + 1e-3 * s}
        logged = {f"routing/{name}": value for name, value in columns.items()}
        log.write(far | {"loss": 2.0, "bits_per_byte": 2.5, "aux/ratio_loss_0": 1.02} | logged)
        if step % 50 == 0:
            log.write(far | {"eval/loss": 2.0, "eval/bits_per_byte": 2.6} | {f"eval/{n}": v for n, v in logged.items()})
    log.close()
    save_record(PlanRecord(name="made", steps=200, flops_per_step=1.0, dense_flops_per_step=3.0), folder)
    counter = RoutingCounter("none", 1)
    ids = np.array([[254, *TEXT.encode()]] * 3)
    masks = [np.stack([mask] * 3) for mask, _ in stages_of_text(ids[0])]
    counter.add(np.ones(ids.shape, int), (), np.ones(ids.shape, bool), masks)
    save_record(counter.record(190, "topk", passage), folder)
    return folder


def test_lengths_are_counted_in_bytes_without_the_chunk_that_the_row_cuts_off():
    counter = ChunkCounter()
    begins = np.zeros((2, 100), bool)
    begins[0, [0, 2, 5, 95]] = True  # lengths 2, 3 and 90
    begins[1, [0, 3, 50]] = True  # 3; what begins at 50 is no text
    present = np.ones((2, 100), bool)
    present[1, 40:] = False
    counter.add([begins, np.zeros((2, 100), bool)], present)
    counter.add([begins, np.zeros((2, 100), bool)], present)
    first, second = counter.records()
    assert first.lengths[1] == 2 and first.lengths[2] == 4 and first.lengths[MOST_BYTES - 1] == 2
    assert sum(first.lengths) == 8 and first.mean == pytest.approx((2 + 3 + 90 + 3) / 4)
    assert len(first.lengths) == MOST_BYTES and sum(second.lengths) == 0


def test_the_passage_knows_its_chunks_and_survives_its_file(tmp_path, passage):
    kept = load_record(RoutingRecord, _saved(tmp_path, passage)).passage
    assert kept == passage
    begins = [token for token in passage if token.begins]
    assert [token.begins for token in begins] == [2, 1, 2, 1, 2, 1, 2]
    assert begins[1].probabilities == (0.9, 0.4) and passage[2].probabilities == (0.05,)
    assert chunk_sizes(passage, 0)[0] == 4 and chunk_sizes(passage, 1)[0] == 4 + len(" Fluß".encode())
    assert sum({i: n for i, n in enumerate(chunk_sizes(passage, 0)) if passage[i].begins}.values()) == len(passage)


def test_bytes_inside_a_chunk_go_as_deep_as_it_does():
    ids = np.array([254, *TEXT.encode()])
    stages = stages_of_text(ids)
    depth = np.where(stages[1][0], 3, 0)
    found = passage_tokens(load_tokenizer("hnet-bytes"), ids, depth, [None] * len(ids), stages)
    assert {token.depth for token in found} == {3}


def _saved(folder, passage):
    save_record(RoutingRecord(passage=passage), folder)
    return folder


def test_the_page_shows_passage_lengths_and_curves(tmp_path, passage):
    page = Page(write_report(write_run(tmp_path / "run", passage)).read_text())
    wanted = (
        "Where chunks begin",
        "Lengths of held-out chunks, stage 0",
        "Bytes per chunk",
        "Positions kept",
        "Mean probability",
    )
    assert {*wanted, "Undecided", "Boundaries without a slot", "Ratio losses"} <= set(page.titles)
    assert "Auxiliary losses" not in page.titles and "A held-out passage" not in page.titles
    assert "None" not in page.text and "nan" not in re.sub(r"<script>.*?</script>", "", page.text, flags=re.S).lower()
    text = page.text
    assert text.count('class="t b2') == 4 and text.count('class="t b1') == 3
    assert "stage 0: begins a chunk of 4 bytes, p 0.90\nstage 1: begins a chunk of 10 bytes, p 0.40" in text
    assert "H-Net" in text and "2 chunking stages" in text and "6.25" in text and "2.50 \u00d7 2.50 by stage" in text
    assert "with the capacities of training" not in text and "target 9" in text
    assert "both are the same" not in text


def test_rules_are_told_and_their_probabilities_are_not(tmp_path, passage):
    rule = shapes.hnet(
        ("m1", ("m1", ("T1",), "m1"), "m1"), chunker=("space", "stride"), target=3.0, capacities=(0.5, 0.5)
    )
    run = load_run(write_run(tmp_path / "run", passage, rule))
    text = chunks(run)
    assert (
        "every 3 positions" in text
        and "a blank or a mark follows a letter" in text
        and "Nothing of that is learned" in text
    )
    assert "begins a chunk of 4 bytes" in text and ", p 0.90" not in text and "target" not in text.lower()
    assert "Mean probability" not in text and "Ratio losses" not in text and "with the capacities of training" in text


def test_other_models_have_no_such_section(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(Recipe(name="made").to_json())
    run = load_run(tmp_path / "run")
    assert chunks(run) == "" and bytes_per_chunk({}, []) == []
    assert "bytes/chunk" not in plain_line({"step": 1, "loss": 1.0}, 10, None)


def test_every_other_innermost_chunk_is_shaded(passage):
    spans = chunks_html(passage, [chunk_sizes(passage, s) for s in range(2)], [True, True], 5.0)
    classes = re.findall(r'class="([^"]*)"[^>]*data-c', spans)
    innermost = np.cumsum([token.begins == 2 for token in passage])
    assert [" o" in f" {kind}" for kind in classes] == [chunk % 2 == 1 for chunk in innermost.tolist()]
    assert sum(" part" in kind for kind in classes) == 3  # the first bytes of three letters


def test_the_terminal_marks_characters_never_within_them(passage, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = io.StringIO()
    print_chunks(passage, 2, stream)
    legend, _, shown = stream.getvalue().partition("\n\n")
    assert "| stage 0, \u2016 stage 1" in legend
    assert shown.strip() == "\u2016\u220eDer| Fluß\u2016 steigt,| und\u2016 die| Brücke\u2016 hält.\u21b5"


def test_progress_tells_the_length_of_chunks():
    row = {
        "step": 3,
        "loss": 2.0,
        "routing/bytes_per_chunk": 4.812,
        "routing/overflow_0": 0.0,
        "routing/overflow_1": 0.07,
    }
    line = plain_line(row, 10, None)
    assert "4.81 bytes/chunk" in line and "overflow 7%" in line
    assert "overflow" not in plain_line({**row, "routing/overflow_1": 0.0}, 10, None)
    assert "5.00 bytes/chunk" in evaluation_line({"step": 3, "eval/loss": 2.0, "eval/routing/bytes_per_chunk": 5.0}, 10)


def test_histograms_group_what_is_too_narrow():
    assert histogram("Lengths", [0, 0], x="bytes") == ""
    few = histogram("Lengths", [3, 0, 1], x="bytes")
    assert few.count('class="bar') == 2 * 2 and "1 bytes: 75.0%" in few
    many = histogram("Lengths", [1] * MOST_BYTES, x="bytes")
    assert many.count('class="bar') == 2 * MOST_BYTES // 2 and f"{MOST_BYTES - 1} or more bytes" in many
