"""Headline numbers, learning curves and the recipe of a run, as HTML; "" where there is nothing to show."""

import html
from typing import Any, Literal, NamedTuple

from adaptive.runs.origin import starts
from adaptive.training.report.charts import Series, line_chart
from adaptive.training.report.chunks import size_tile, stages_of
from adaptive.training.report.layout import grid, section, smooth, table
from adaptive.training.report.numbers import compact, duration, percent
from adaptive.training.report.runs import Run
from adaptive.training.report.svg import element

_SELECTIONS = {"topk": "top-k", "threshold": "causal"}


def tiles(run: Run) -> str:
    """The headline numbers."""
    plan, last, final = run.plan, run.last, run.last_evaluation
    entries: list[tuple[str, str, str]] = []
    held_out = run.points("eval/bits_per_byte", "step")
    if held_out:
        causal = final.get("eval/threshold/bits_per_byte")
        how = "as generated" if stages_of(run) else "causal routing"
        detail = f"{how}: {causal:.3f}" if causal is not None else f"at first {held_out[0][1]:.2f}"
        entries.append(("held-out bits per byte", f"{held_out[-1][1]:.3f}", detail))
    elif last.get("bits_per_byte") is not None:
        entries.append(("training bits per byte", f"{last['bits_per_byte']:.3f}", "no evaluation yet"))
    if (size := size_tile(run)) is not None:
        entries.append(size)
    if plan.unique_parameters:
        detail = f"{plan.unique_layers} layers"
        if plan.effective_parameters > plan.unique_parameters:
            detail += f", used as {plan.effective_layers} ({compact(plan.effective_parameters)})"
        entries.append(("parameters", compact(plan.unique_parameters), detail))
    if last.get("tokens"):
        speed = run.typical("tokens_per_s")
        entries.append(("training tokens", compact(last["tokens"]), f"{compact(speed)} per second" if speed else ""))
    if run.flops_saved is not None:
        spent = f"{compact(plan.flops_per_step * run.step, 'FLOP')} spent"
        if run.flops_saved > 5e-4:
            what = "FLOPs saved" if stages_of(run) else "FLOPs saved by routing"
            entries.append((what, percent(run.flops_saved), spent))
        elif plan.flops_per_step:
            entries.append(("training compute", compact(plan.flops_per_step * run.step, "FLOP"), _work(run)))
    if run.seconds is not None:
        mfu = run.typical("mfu_active")
        detail = f"MFU {percent(mfu)}" if mfu is not None else plan.device_kind
        entries.append(("wall time", duration(run.seconds), detail))
    return element("div", "".join(_tile(*entry) for entry in entries), kind="tiles") if entries else ""


def _work(run: Run) -> str:
    kinds = dict.fromkeys((one.settings.router.per_token(), one.settings.experts) for one in run.experts)
    return ", ".join(f"{taken:g} of {experts} experts a token" for taken, experts in kinds) or "nothing routed"


def _tile(name: str, value: str, detail: str) -> str:
    parts = (("span", name, "name"), ("strong", value, "value"), ("span", detail, "detail"))
    return element("div", "".join(element(tag, html.escape(text), kind=kind) for tag, text, kind in parts), kind="tile")


class _Axis(NamedTuple):
    """What curves are drawn over: a column of the rows, and how its values are written."""

    name: str  # in the page's style sheet
    column: str
    title: str
    scale: float = 1.0


def learning(run: Run) -> str:
    axes = [_Axis("tokens", "tokens", "tokens"), _Axis("steps", "step", "steps"), _Axis("time", "seconds", *_time(run))]
    charts = [(axis, _learned(run, axis)) for axis in axes]
    if not charts[0][1]:
        return ""
    button = lambda by: element("button", by, data_by=by, aria_pressed=str(by == "tokens").lower(), type="button")  # noqa: E731
    toggle = element("span", "".join(button(axis.name) for axis, _ in charts), kind="toggle")
    shown = "".join(element("div", drawn, kind=f"x-{axis.name}") for axis, drawn in charts)
    return section(
        "Learning",
        element("div", "over" + toggle, kind="controls by-tokens"),
        element("div", shown, kind="axes by-tokens"),
        grid(_over_compute(run, "full"), columns="one") if _gap(run, axes[0]) else "",
        lead="Cross entropy on training text (thin line: each logged row) and on held-out text.",
    )


def _over_compute(run: Run, size: Literal["half", "full"]) -> str:
    flops = _curves(run, "ce", "loss", "flops")
    x: dict[str, Any] = {"x": "training compute", "x_unit": "FLOP"}
    return line_chart("Loss over compute (log)", flops, **x, y="nats per token", log=True, size=size)


def _learned(run: Run, axis: _Axis) -> str:
    """The curves of learning over one axis."""

    def over(series: list[Series]) -> list[Series]:
        return [s._replace(points=[(at * axis.scale, value) for at, value in s.points]) for s in series]

    points = run.points("grad_norm", axis.column)
    norm = [Series("each row", points, 4, "faint"), Series("gradient norm", smooth(points), 4)]
    rate = [Series("learning rate", run.points("learning_rate", axis.column), 3)]
    bits, loss = _curves(run, "bits_per_byte", "bits_per_byte", axis.column), _curves(run, "ce", "loss", axis.column)
    x: dict[str, Any] = {"x": axis.title}
    return line_chart("Bits per byte", over(bits), **x, y="bits per byte of text", size="full") + grid(
        line_chart("Loss", over(loss), **x, y="nats per token"),
        _gap(run, axis) or _over_compute(run, "half"),
        line_chart("Gradient norm", over(norm), **x, y="before clipping", y_range=(0, None)),
        line_chart("Learning rate", over(rate), **x, y="per step", y_range=(0, None)),
    )


def _time(run: Run) -> tuple[str, float]:
    """(title, hours, minutes or seconds per second) for the run's length."""
    longest = run.seconds or 0.0
    return next(
        (f"wall time ({name})", 1 / unit)
        for name, unit in (("hours", 3600), ("minutes", 60), ("seconds", 1))
        if longest >= 2 * unit or unit == 1
    )


def _gap(run: Run, axis: _Axis) -> str:
    """What deciding from the past alone costs."""
    names = (axis.column, "eval/threshold/loss", "eval/loss")
    known = ([row[name] for name in names] for row in run.evaluations if all(row.get(n) is not None for n in names))
    gap = [(at * axis.scale, causal - own) for at, causal, own in known]
    how = "as it generates" if stages_of(run) else "with causal routing"
    return line_chart(
        "What causal decisions cost", [Series("gap", gap, 3, "dots")], x=axis.title, y="nats per token",
        note=f"held-out loss {how} minus that as trained",
    )  # fmt: skip


def _curves(run: Run, trained: str, held_out: str, x: str) -> list[Series]:
    points = run.points(trained, x)
    training = [Series("each row", points, 1, "faint"), Series("training", smooth(points), 1)]
    return [*training, *_held_out(run, held_out, x)]


def _held_out(run: Run, measure: str, x: str) -> list[Series]:
    """Held-out curves: as trained, then under other ways to select."""
    others = {
        name.split("/")[1]: name
        for row in run.evaluations
        for name in row
        if name.count("/") == 2 and name.endswith(f"/{measure}")
    }
    found = [Series("held-out", run.points(f"eval/{measure}", x), 2, "dots")]
    for i, (selection, name) in enumerate(others.items()):
        how = "as generated" if stages_of(run) else _SELECTIONS.get(selection, selection)
        found.append(Series(f"held-out, {how}", run.points(name, x), 3 + i, "dashed"))
    return found


def recipe(run: Run) -> str:
    settings = run.settings()
    if not settings:
        return ""
    changed = run.changed()
    listed = "".join(element("li", element("code", html.escape(line))) for line in changed)
    lead = f"Differs from the recipe file in {len(changed)} setting{'s' * (len(changed) != 1)}:" if changed else ""
    rows = [("setting", "value"), *settings]
    return section(
        "Recipe",
        element("p", lead, kind="lead") + element("ul", listed, kind="changes") if changed else "",
        element(
            "details", element("summary", f"All {len(settings)} settings, as resolved") + table(rows, kind="settings")
        ),
    )


def origin(run: Run) -> str:
    """Every start of the run: when, where, by which command, from which code."""
    found = starts(run.path)
    if not found:
        return ""
    shown = [
        [_told(start, name) for name in ("time", "host", "devices", "command")] + [_code(start)] for start in found
    ]
    rows = [("time", "host", "devices", "command", "code"), *shown]
    count = f"{len(found)} start{'s' * (len(found) != 1)}"
    return section("Origin", element("details", element("summary", count) + table(rows, kind="settings")))


def _told(start: dict[str, Any], name: str) -> str:
    return str(start.get(name) or "")


def _code(start: dict[str, Any]) -> str:
    """Version of the package, and commits, with a plus where files had changed."""
    told = [f"adaptive {_told(start, 'adaptive')}"]
    for name in ("package", "working_folder"):
        if isinstance(found := start.get(name), dict):
            commit = f"{str(found.get('commit'))[:12]}{'+' * bool(found.get('changed'))}"
            told.append(commit if name == "package" else f"working folder {commit}")
    return ", ".join(told)
