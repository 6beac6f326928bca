"""What routers did, and the passage that shows it, as HTML; "" where there is nothing to show."""

import html
import math

from adaptive.training.report.bars import bar_chart, mirrored_histogram
from adaptive.training.report.charts import COLOURS, Series, line_chart
from adaptive.training.report.layout import grid, section, smooth
from adaptive.training.report.numbers import percent
from adaptive.training.report.passage import level, passage_html
from adaptive.training.report.runs import Run
from adaptive.training.report.svg import element

_SELECTIONS = {"topk": "by top-k, as in training", "threshold": "causally, by threshold"}


def routing(run: Run) -> str:
    record = run.routing
    over_time = _routing_curves(run)
    expert = not record.stops
    histograms = [
        mirrored_histogram(
            f"Recursion {r.recursion}",
            r.selected,
            r.unselected,
            names=("selected", "passed over") if expert else ("stopped here", "did not"),
            note=_agreement(r.accuracy, sum(r.unselected)),
        )
        for r in record.recursions
    ]
    heading = "Decision scores on held-out text" if any(histograms) else ""
    lead = (
        "How likely each candidate was to be chosen: up, those that top-k selected; down, those it passed over. Two "
        "spikes, near 1 and near 0, mean that a fixed threshold takes the same decisions without seeing the future."
    )
    return section(
        "Routing",
        grid(*over_time),
        element("h3", heading) + element("p", lead if expert else "", kind="lead") if heading else "",
        grid(*histograms, columns="three"),
    )


def deep_tokens(run: Run) -> str:
    """The passage and the continuation."""
    record = run.routing
    parts, shown = [], bool(record.passage) and (record.router != "none" or not record.chunks)
    if shown:
        deepest = max(run.plan.recursions, len(record.depth_counts) - 1, *(t.depth for t in record.passage))
        losses = sorted(t.loss for t in record.passage if t.loss is not None)
        high = losses[int(0.95 * (len(losses) - 1))] if losses else 1.0
        routed = record.router != "none"
        text = passage_html(record.passage, deepest, max(high, 1e-6))
        parts.append(_passage_controls(routed, deepest, bool(losses), high))
        parts.append(element("div", text, kind=f"passage by-{'depth' if routed else 'loss'}"))
    parts.append(grid(_depths(run), _by_position(run), *_by_kind(run)))
    if record.sample:
        prompt = element("b", html.escape(record.sample.prompt))
        heading = element("h3", "The model goes on writing") if shown else ""
        parts.append(heading + element("p", "The prompt is bold.", kind="lead"))
        parts.append(element("div", prompt + html.escape(record.sample.text), kind="passage sample"))
    title = "Which tokens went deep" if record.recursions else "A held-out passage"
    if not shown:
        return section("The model goes on writing", *parts)
    how = f"; depth chosen {_SELECTIONS[record.selection]}" if record.recursions else ""
    lead = f"Held-out text at step {record.step:,}{how}."
    return section(title, *parts, lead=lead)


def _depths(run: Run) -> str:
    counts = run.routing.depth_counts
    total = sum(counts)
    if not run.routing.recursions or not total:
        return ""
    name = lambda d: _passes(d) if d or not run.routing.chunks else "no chunk"  # noqa: E731
    bars = [(name(d), n / total, percent(n / total)) for d, n in enumerate(counts) if d or n]
    mean = sum(d * n for d, n in enumerate(counts)) / total
    return bar_chart("Depth of tokens", bars, note=f"{mean:.2f} passes on average, over all held-out text")


def _by_kind(run: Run) -> list[str]:
    """Mean depth of each kind of token, a chart for each way to divide them."""
    kinds = run.routing.kinds if run.plan.recursions > 1 or run.routing.recursions else ()
    total = sum(kind.tokens for kind in kinds if kind.by == kinds[0].by) if kinds else 0
    charts = []
    for by in dict.fromkeys(kind.by for kind in kinds):
        own = [kind for kind in kinds if kind.by == by]
        bars = [(f"{kind.name}", kind.depth, f"{kind.depth:.2f} ({percent(kind.tokens / total)})") for kind in own]
        charts.append(bar_chart(f"Depth by {by}", bars, note="mean passes (share of held-out tokens)"))
    return charts


def _routing_curves(run: Run) -> list[str]:
    """Charts of what routers logged over the run."""
    names = {name for row in run.training for name in row}
    colours = range(1, COLOURS + 1)
    accuracy = [
        Series(f"recursion {n}", smooth(run.points(f"routing/accuracy_{n}", "tokens")), n)
        for n in colours
        if f"routing/accuracy_{n}" in names
    ]
    gates = [
        Series(f"recursion {n}", smooth(run.points(f"routing/gate_{n}", "tokens")), n)
        for n in colours
        if f"routing/gate_{n}" in names
    ]
    shares = [
        Series(_passes(n), smooth(run.points(f"routing/load_{n}", "tokens")), n)
        for n in colours
        if f"routing/load_{n}" in names
    ]
    aux = [
        Series(name.removeprefix("aux/").replace("_", " "), smooth(run.points(name, "tokens")), 1 + i % COLOURS)
        for i, name in enumerate(sorted(n for n in names if n.startswith("aux/") and "ratio_loss" not in n))
    ]
    dead = [
        Series("dead positions", run.points("eval/dead_token_ratio", "tokens"), 2, "dots"),
        Series("expected by chance", run.points("eval/dead_token_ratio_by_chance", "tokens"), 6, "dashed"),
    ]
    return [
        line_chart(
            "Sampling accuracy", accuracy, x="tokens", y="share of candidates", y_range=(None, 1.0), percent=True,
            note="where the causal decision agrees with top-k; good above 99%",
        ),
        line_chart("Share of tokens per depth", shares, x="tokens", y="share", y_range=(0, None), percent=True),
        line_chart("Imbalance", [Series("MaxVio", smooth(run.points("routing/max_vio", "tokens")), 2)], x="tokens",
                   y="MaxVio", y_range=(0, None), note="(largest load - mean load) / mean load; good below 0.5"),
        line_chart("Gates", gates, x="tokens", y="mean weight of what a recursion adds", y_range=(0, None)),
        line_chart("Auxiliary losses", aux, x="tokens", y="before coefficient", y_range=(0, None)),
        line_chart(
            "Dead positions", dead, x="tokens", y="share of positions", y_range=(0, None), percent=True,
            note="that no held-out row takes to the last recursion; good below 0.4% above chance",
        ),
    ]  # fmt: skip


def _agreement(accuracy: float | None, passed_over: int) -> str:
    if accuracy is None:
        return ""
    if not passed_over:
        return "every candidate is taken"
    return f"threshold and top-k agree on {percent(accuracy)}"


def _passes(depth: int) -> str:
    return f"{depth} pass{'es' * (depth != 1)}"


def _by_position(run: Run) -> str:
    rates = run.routing.last_recursion_rate
    if len(rates) < 2:
        return ""
    width = max(1, math.ceil(len(rates) / 64))
    binned = [rates[i : i + width] for i in range(0, len(rates), width)]
    points = [(i * width + (len(b) - 1) / 2, sum(b) / len(b)) for i, b in enumerate(binned)]
    note = f"share of {run.routing.rows} held-out rows that take a position to the last recursion"
    return line_chart("Who reaches the last recursion", [Series("rate", points, 1)], x="position in the sequence",
                      y="share of rows", y_range=(0, None), percent=True, note=note)  # fmt: skip


def _passage_controls(routed: bool, deepest: int, losses: bool, high: float) -> str:
    swatch = lambda kind, share, text: element(  # noqa: E731
        "span", element("i", kind=f"swatch {kind}", style=f"--s:{share:.2f}") + text
    )
    depth = "".join(swatch("depth", level(d, deepest), _passes(d)) for d in range(1, deepest + 1))
    loss = "".join(swatch("loss", s, f"{s * high:.1f}") for s in (0.0, 0.5, 1.0)) + " nats"
    legends = element("span", depth, kind="legend for-depth") if routed else ""
    legends += element("span", loss, kind="legend for-loss") if losses else ""
    button = lambda by, on: element("button", by, data_by=by, aria_pressed=on, type="button")  # noqa: E731
    toggle = element("span", button("depth", "true") + button("loss", "false"), kind="toggle")
    buttons = toggle if routed and losses else ""
    return element("div", buttons + legends, kind=f"controls by-{'depth' if routed else 'loss'}")
