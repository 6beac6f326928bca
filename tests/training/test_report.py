"""The report: what it shows, of whole and of broken runs, and that it needs nothing from outside."""

import dataclasses
import html.parser
import io
import json
import re

import numpy as np
import pytest
import shapes
from training.example_run import MODELS, recipe_of, routed, write_example

from adaptive.data.tokenizers import Bytes
from adaptive.errors import UserError
from adaptive.layers.feed_forwards import experts
from adaptive.report import main
from adaptive.training.report.bars import bar_chart, mirrored_histogram
from adaptive.training.report.charts import Series, line_chart, smoothed, thinned
from adaptive.training.report.collect import RoutingCounter, passage_tokens, plan_costs
from adaptive.training.report.experts import layer_names
from adaptive.training.report.heat import heat_map
from adaptive.training.report.numbers import clock, compact, duration
from adaptive.training.report.page import write_report
from adaptive.training.report.passage import (
    passage_digits,
    passage_html,
    passage_shaded,
    print_chunks,
    print_passage,
)
from adaptive.training.report.runs import load_run
from adaptive.training.report.schema import (
    END_MARK,
    PlanRecord,
    RoutingRecord,
    TokenRecord,
    load_record,
    save_record,
)
from adaptive.training.report.svg import decimals_for, element, log_ticks, short, ticks


class Page(html.parser.HTMLParser):
    """Text by tag, ids, classes; fails on elements that are not closed in order."""

    VOID = ("meta", "link", "br")

    def __init__(self, text: str):
        super().__init__()
        self.text, self.titles, self.open, self.count = text, [], [], {}
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open[-1:] and self.open[-1] in ("h1", "h2", "h3", "b"):
            self.titles.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {kind: write_example(root / kind, kind, steps=200) for kind in MODELS}


def report(workdir, *compare) -> Page:
    return Page(write_report(workdir, compare).read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", MODELS)
def test_the_page_is_whole_small_and_needs_nothing_from_outside(runs, kind):
    page = report(runs[kind])
    assert len(page.text.encode()) < 1_000_000
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|\bsrc=", page.text)
    assert "nan" not in re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page.text, flags=re.S).lower()
    assert "None" not in page.text
    for title in ("Learning", "Bits per byte", "Compute", "Throughput", "Recipe"):
        assert title in page.titles
    for text in re.findall(r'<script type="application/json">(.*?)</script>', page.text):
        assert json.loads(text)["series"]


def test_a_routed_run_shows_its_routing(runs):
    page = report(runs["mor"])
    for title in (
        "Sampling accuracy",
        "Depth by what it is",
        "Dead positions",
        "Recursion 3",
        "Depth of tokens",
        "Which tokens went deep",
    ):
        assert title in page.titles
    assert len(re.findall(r'<span class="t[ "]', page.text)) == len(load_record(RoutingRecord, runs["mor"]).passage)
    assert "There is &lt;no&gt; light" in page.text, "text of the model is text, never markup"
    saved = load_run(runs["mor"]).flops_saved
    assert f"{100 * saved:.1f}%" in page.text and 0.1 < saved < 0.6


def test_a_token_choice_run_shows_its_balance(runs):
    page = report(runs["mor_token"])
    assert {"Share of tokens per depth", "Imbalance", "Depth of tokens"} <= set(page.titles)
    assert "Selection accuracy" not in page.titles


@pytest.mark.parametrize("kind", ["vanilla", "recursive"])
def test_a_run_without_a_router_shows_loss_instead(runs, kind):
    page = report(runs[kind])
    assert "A held-out passage" in page.titles and 'class="passage by-loss"' in page.text
    assert not {"Routing", "Depth of tokens", "Which tokens went deep"} & set(page.titles)
    assert "dense equivalent</th>" not in page.text


@pytest.mark.parametrize("kind", ["moe", "moe_many"])
def test_a_run_with_experts_shows_which_did_the_work(runs, kind):
    page, run = report(runs[kind]), load_run(runs[kind])
    assert {"Which experts did the work", "Load imbalance", "Left out", "Experts of a token"} <= set(page.titles)
    load = run.last["experts/load"]
    tables = re.findall(r'<table class="heat.*?</table>', page.text, re.S)
    assert len(tables) == (2 if kind == "moe_many" else 1), "how experts are chosen when generating is shown beside"
    cells = re.findall(r"<td [^>]*>([\d.]+)</td>", tables[0])
    experts = len(load[0])
    assert [float(c) for c in cells] == pytest.approx([s * experts for row in load for s in row], abs=6e-3)
    assert f'title="layer 1, expert 1: {cells[1]} of its fair share"' in tables[0]
    assert "8 experts, token choice" in page.text if kind == "moe" else "4 of 64 experts a token" in page.text
    assert "nothing routed" not in page.text


@pytest.mark.parametrize(
    ("load", "shade"), [(0.0, 0), (0.09, 0), (0.1, 1), (0.5, 2), (1.0, 3), (1.25, 4), (2.0, 5), (4.0, 6), (40.0, 6)]
)
def test_the_heat_map_shades_by_load_over_the_fair_share(load, shade):
    chart = heat_map("t", [("layer 0", [load, 1.0]), ("layer 1", None)])
    assert re.search(
        rf'<td class="h{shade}" title="layer 0, expert 0: {load:.2f} of[^>]*>{load:.{2 - (load > 9) * 2}f}<', chart
    )
    assert re.search(r'<td colspan="2" class="none">no tokens</td>', chart)
    assert heat_map("t", []) == heat_map("t", [("layer 0", None)]) == ""


def test_a_heat_map_of_very_many_experts_stays_small():
    chart = heat_map("t", [(f"layer {i}", [1.0] * 256) for i in range(61)])
    assert len(chart) < 600_000 and 'class="heat dense"' in chart


def test_layers_of_a_recursion_are_named_with_it(tmp_path):
    model = shapes.mor(11, 3, feed_forward=experts.Settings())
    (tmp_path / "recipe.json").write_text(dataclasses.replace(recipe_of("mor"), model=model).to_json())
    parts = [one.path for one in model.facts().experts for _ in one.layers]
    row = {"experts/by_layer/layer": list(range(11)), "experts/by_layer/part": parts}
    names = layer_names(load_run(tmp_path), row)
    assert names[0] == "layer 0" and names[10] == "layer 10"
    assert names[1] == "layer 1, recursion 1" and names[4] == "layer 4, recursion 2"
    assert names[9] == "layer 9, recursion 3"


def test_a_collapse_is_on_the_page(tmp_path):
    path = write_example(tmp_path / "run", "moe", steps=20)
    row = load_run(path).last
    starving = [[0.0, *[1 / 7] * 7], *row["experts/load"][1:]]
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({**row, "step": 20 + i, "experts/load": starving}) + "\n" for i in range(5))
    page = report(path)
    assert "Worth a look" in page.titles and "expert 0 of layer 1" in page.text


def test_warnings_are_on_the_page(runs, tmp_path):
    path = write_example(tmp_path / "run", "mor", steps=100)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 100, "ce": 1.0, "tokens": 1, "routing/accuracy": 0.9, "skipped": 3}) + "\n")
    page = report(path)
    assert "Worth a look" in page.titles and "sampling accuracy 90.0%" in page.text and "3 step(s) skipped" in page.text
    assert "Worth a look" not in report(runs["mor"]).titles


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.json", "plan.json", "routing.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "newer"])
def test_runs_that_crashed_have_a_report_that_says_what_is_missing(tmp_path, name, damage):
    path = write_example(tmp_path / "run", "mor", steps=200, until=50)
    file = path / name
    text = file.read_text()
    match damage:
        case "missing":
            file.unlink()
        case "empty":
            file.write_text("")
        case "torn":
            file.write_text(text[: len(text) // 2])
        case "newer":
            if name == "metrics.jsonl":
                return
            tree = json.loads(text)
            file.write_text(json.dumps({**tree, "version": 99, "format_version": 99}))
    page = report(path)
    assert "not complete" in page.text
    if (name, damage) != ("metrics.jsonl", "torn"):
        assert "Not here" in page.titles and name in page.text


def test_a_run_before_its_first_row(tmp_path):
    (tmp_path / "recipe.json").write_text(recipe_of("mor").to_json())
    page = report(tmp_path)
    assert "Recipe" in page.titles and "before its first logged step" in page.text


def test_the_settings_that_differ_from_the_recipe_file_are_listed(tmp_path, monkeypatch):
    path = write_example(tmp_path / "run", "mor", steps=20)
    monkeypatch.setattr("adaptive.training.report.runs.load", lambda name: recipe_of("mor", steps=600))
    assert "train.steps: 600 -&gt; 20" in report(path).text


def test_where_a_run_came_from_is_told(tmp_path):
    (tmp_path / "recipe.json").write_text(recipe_of("mor").to_json())
    assert "Origin" not in report(tmp_path).titles
    code = {"package": {"commit": "0123456789abcdef", "changed": True}, "working_folder": None}
    start = {
        "time": "2026-11-29T12:00:00+00:00",
        "host": "here",
        "command": "adaptive train <b>",
        "adaptive": "1",
        **code,
    }
    (tmp_path / "starts.jsonl").write_text(f'{json.dumps(start)}\n{{"host": 3}}\n')
    page = report(tmp_path)
    assert "Origin" in page.titles and "2 starts" in page.text
    assert "adaptive train &lt;b&gt;" in page.text and "adaptive 1, 0123456789ab+<" in page.text


def test_text_of_a_passage_steers_no_terminal():
    out = io.StringIO()
    print_chunks([TokenRecord("a\x1b[31m\nb", 1, 1.0, 1, (0.5,))], 1, out)
    assert "\x1b" not in out.getvalue() and "a␛[31m↵\nb" in out.getvalue()
    assert "\x1b" not in str(passage_shaded([TokenRecord("\x1b[2J", 1, 1.0, 1, (0.5,))], 3))


def test_several_runs_are_compared(runs):
    page = report(runs["mor"], runs["vanilla"], runs["recursive"])
    assert "Comparison" in page.titles
    row = re.search(r"<tr><td>FLOPs per token</td>(.*?)</tr>", page.text)[1]
    ratios = [float(x) for x in re.findall(r"\(([\d.]+)\u00d7\)", row)]
    mor, vanilla = (load_record(PlanRecord, runs[kind]).flops_per_step for kind in ("mor", "vanilla"))
    assert ratios == [1.0, round(vanilla / mor, 2), round(vanilla / mor, 2)]


def test_experts_are_compared(runs):
    page = report(runs["moe"], runs["mor"])
    row = re.search(r"<tr><td>max / mean load of experts</td>(.*?)</tr>", page.text)[1]
    assert re.findall(r"<td>(.*?)</td>", row) == [
        f"{load_run(runs['moe']).last['experts/load_max_over_mean']:.2f}",
        "—",
    ]
    assert "max / mean load" not in report(runs["mor"], runs["vanilla"]).text


def test_the_command(runs, tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main([str(runs["mor"]), "--open", "--compare", str(runs["vanilla"])]) == 0
    out = capsys.readouterr().out.strip()
    assert out == str(runs["mor"] / "report.html") and opened[0].startswith("file:///")
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main([str(tmp_path / "absent")]) == 2
    assert "not a folder" in capsys.readouterr().err


# Records


def test_records_round_trip_and_newer_ones_are_refused(runs, tmp_path):
    for kind in (PlanRecord, RoutingRecord):
        record = load_record(kind, runs["mor"])
        save_record(record, tmp_path)
        assert load_record(kind, tmp_path) == record
    (tmp_path / "plan.json").write_text('{"name": "x", "unknown": 1}')
    assert load_record(PlanRecord, tmp_path) == PlanRecord(name="x")
    (tmp_path / "plan.json").write_text('{"version": 2}')
    with pytest.raises(UserError, match="newer"):
        load_record(PlanRecord, tmp_path)
    assert load_record(PlanRecord, tmp_path / "absent") is None


def test_counts_of_routing_equal_a_direct_count():
    model = recipe_of("mor").model
    rng = np.random.default_rng(1)
    counter, batches = RoutingCounter("expert_choice", 3), []
    for _ in range(2):
        depth, scores = routed(rng, 4, 48, model)
        present = np.ones_like(depth, bool)
        present[:, 40:] = False
        counter.add(depth, scores, present)
        batches.append((depth[:, :40], [s[:, :40] for s in scores]))
    record = counter.record(5, "topk")
    depths = np.concatenate([d for d, _ in batches])
    assert record.rows == 8 and record.depth_counts == tuple(int((depths == d).sum()) for d in range(4))
    for r, one in enumerate(record.recursions):
        score = np.concatenate([s[r] for _, s in batches])
        taken = (depths > r)[np.isfinite(score)]
        score = score[np.isfinite(score)]
        assert (sum(one.selected), sum(one.unselected)) == (taken.sum(), (~taken).sum())
        assert one.selected == tuple(np.histogram(score[taken], 20, (0, 1))[0])
        assert one.accuracy == pytest.approx(np.mean((score >= 0.5) == taken))
    assert record.last_recursion_rate[:40] == pytest.approx((depths == 3).mean(0), abs=1e-4)
    assert record.dead_token_ratio == np.mean(~(depths == 3).any(0))
    assert counter.scalars()["eval/dead_token_ratio"] == record.dead_token_ratio


def test_positional_collapse_is_told_from_few_rows():
    depth = np.tile(np.repeat([1, 2, 3], 10), (64, 1))
    counter = RoutingCounter("expert_choice", 3)
    counter.add(depth, [np.ones(depth.shape)] * 3, np.ones(depth.shape, bool))
    scalars = counter.scalars()
    assert scalars["eval/dead_token_ratio"] == pytest.approx(2 / 3)
    assert scalars["eval/dead_token_ratio_by_chance"] < 1e-6
    one = RoutingCounter("expert_choice", 3)
    one.add(depth[:1], [np.ones((1, 30))] * 3, np.ones((1, 30), bool))
    assert one.scalars()["eval/dead_token_ratio_by_chance"] == pytest.approx(2 / 3)


def test_without_a_router_there_is_nothing_to_count():
    counter = RoutingCounter("none", 1)
    counter.add(np.ones((2, 8), int), (), np.ones((2, 8), bool))
    record = counter.record(1, "topk")
    assert counter.scalars() == {} and record.recursions == () and record.dead_token_ratio is None
    assert RoutingCounter("expert_choice", 2).record(0, "topk").recursions == ()


def test_passages_of_bytes_keep_characters_whole():
    ids = [*Bytes().encode("é\n"), Bytes.eos_id]
    tokens = passage_tokens(Bytes(), ids, [1, 2, 3, 1], [None, 0.5, 1.0, 2.0])
    assert [t.text for t in tokens] == ["", "é", "\n", END_MARK]
    assert [t.depth for t in tokens] == [1, 2, 3, 1] and tokens[0].loss is None


def test_the_account_of_a_plan_adds_up():
    costs = plan_costs(recipe_of("mor").model, 256, 8)
    assert sum(a.active for a in costs["account"]) == pytest.approx(costs["flops_per_step"])
    assert sum(a.dense for a in costs["account"]) == pytest.approx(costs["dense_flops_per_step"])
    assert costs["capacities"] == (256, 170, 85) and costs["tokens_per_step"] == 2048
    plan_fields = {field.name for field in dataclasses.fields(PlanRecord)}
    assert set(costs) <= plan_fields


# Pictures


def test_a_passage_without_colour_has_its_depths_below():
    passage = [TokenRecord("ab", 2), TokenRecord("c\n", 3), TokenRecord("", 1), TokenRecord("漢", 1)]
    assert passage_digits(passage, 80) == ["abc↵", "2·3·", "漢", "1 "]
    assert passage_digits([TokenRecord("abcdef", 1)], 4) == ["abcd", "1···", "ef", "··"]
    stream = io.StringIO()
    print_passage(passage, 3, stream)
    assert "\x1b" not in stream.getvalue() and "2·3·" in stream.getvalue()


def test_a_passage_on_a_terminal_is_shaded(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    passage = [TokenRecord("a", 1), TokenRecord("b", 3)]
    stream = Terminal()
    print_passage(passage, 3, stream)
    shades = re.findall(r"\x1b\[([\d;]+)m([ab])", stream.getvalue())
    assert [letter for _, letter in shades] == ["a", "b"] and shades[0][0] != shades[1][0]
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    print_passage(passage, 3, stream)
    assert not re.search(r"\x1b\[[\d;]*[34]8;", stream.getvalue()) and "13" in stream.getvalue()


def test_passage_markup_is_escaped_and_shaded_by_depth():
    markup = passage_html([TokenRecord("<&", 1, 0.5), TokenRecord("x", 3, 9.0)], 3, 2.0)
    assert "&lt;&amp;" in markup
    assert re.findall(r"--d:([\d.]+);--l:([\d.]+)", markup) == [("0.00", "0.25"), ("1.00", "1.00")]


def test_lines_stay_inside_their_frame():
    rng = np.random.default_rng(0)
    points = [(float(i), float(y)) for i, y in enumerate(np.cumsum(rng.normal(size=2000)))]
    for more in ({}, {"y_range": (0, 3)}, {"log": True}, {"size": "full"}):
        chart = line_chart("t", [Series("a", points), Series("b", points, 2, "dots")], x="x", y="y", **more)
        width, height = map(int, re.search(r"0 0 (\d+) (\d+)", chart).groups())
        for text in re.findall(r'polyline class="line c1" points="([^"]+)"', chart):
            places = np.array([[float(v) for v in pair.split(",")] for pair in text.split()])
            assert (places >= 0).all() and (places <= (width, height)).all() and len(places) <= 300


def test_charts_of_nothing_are_nothing():
    assert line_chart("t", [Series("a", [])], x="x", y="y") == ""
    assert line_chart("t", [Series("a", [(1.0, float("nan")), (2.0, 1.0)])], x="x", y="y") == ""
    assert mirrored_histogram("t", (0, 0), (0, 0), names=("a", "b")) == "" and bar_chart("t", []) == ""
    assert "<circle" in line_chart("t", [Series("a", [(1.0, 1.0)], style="dots")], x="x", y="y")


def test_thinning_keeps_spikes_and_ends():
    points = [(float(i), 0.0) for i in range(5000)]
    points[1234] = (1234.0, 50.0)
    kept = thinned(points, 100)
    assert len(kept) <= 100 and points[1234] in kept and kept[0] == points[0] and kept[-1] == points[-1]


def test_smoothing_keeps_ends_and_straight_lines():
    line = [(float(i), 2.0 * i) for i in range(50)]
    np.testing.assert_allclose(smoothed(line, 5), line)
    noisy = [(float(i), float(i % 2)) for i in range(50)]
    assert abs(smoothed(noisy, 5)[25][1] - 0.5) < 0.06


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (1e-5, 3e-5), (2.1, 2.2), (0, 123456)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 6 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9 * abs(high)
    texts = [decimals_for(found)(v) for v in found]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("low", "high"), [(1.3, 5.0), (1e9, 3e12), (2.0, 2.4), (0.01, 100)])
def test_log_ticks_are_inside_and_few(low, high):
    found = log_ticks(low, high, 6)
    assert 1 <= len(found) <= 8 and all(low * 0.99 <= v <= high * 1.01 for v in found)


def test_numbers_as_people_read_them():
    assert [compact(v) for v in (0, 7, 12_345, 999_999, 1.23e9)] == ["0", "7", "12.3k", "1.00M", "1.23B"]
    assert compact(4.2e9, "FLOP/s") == "4.20 GFLOP/s" and compact(None) == compact(float("nan")) == "—"
    assert [short(v) for v in (1e6, 1.2e6, 0, 250)] == ["1M", "1.2M", "0", "250"]
    assert short(2e11, "FLOP") == "200G"
    assert [duration(s) for s in (42, 200, 7500, 273_600)] == ["42 s", "3 min 20 s", "2 h 05 min", "3 d 4 h"]
    assert [clock(s) for s in (65, 7389, -3)] == ["1:05", "2:03:09", "0:00"]
    assert element("a", "b", kind='x"<', data_q=1.25) == '<a class="x&quot;&lt;" data-q="1.2">b</a>'
