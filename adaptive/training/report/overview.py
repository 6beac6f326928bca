"""Headline numbers, learning curves and the recipe of a run, as HTML; "" where there is nothing to show."""

import html
from typing import Any

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


def learning(run: Run) -> str:
    bits = [*_trained(run, "bits_per_byte", "tokens"), *_held_out(run, "bits_per_byte", "tokens")]
    loss_tokens = [*_trained(run, "ce", "tokens"), *_held_out(run, "loss", "tokens")]
    loss_flops = [*_trained(run, "ce", "flops"), *_held_out(run, "loss", "flops")]
    rate = [Series("learning rate", run.points("learning_rate", "tokens"), 3)]
    norm = [
        Series("each row", run.points("grad_norm", "tokens"), 4, "faint"),
        Series("gradient norm", smooth(run.points("grad_norm", "tokens")), 4),
    ]
    compute: dict[str, Any] = {"x": "training compute", "x_unit": "FLOP"}
    return section(
        "Learning",
        line_chart("Bits per byte", bits, x="tokens", y="bits per byte of text", size="full"),
        grid(
            line_chart("Loss over tokens", loss_tokens, x="tokens", y="nats per token"),
            line_chart("Loss over compute (log)", loss_flops, **compute, y="nats per token", log=True),
            line_chart("Gradient norm", norm, x="tokens", y="before clipping", y_range=(0, None)),
            line_chart("Learning rate", rate, x="tokens", y="per step", y_range=(0, None)),
        ),
        lead="Cross entropy on training text (thin line: each logged row) and on held-out text.",
    )


def _trained(run: Run, name: str, x: str) -> list[Series]:
    points = run.points(name, x)
    return [Series("each row", points, 1, "faint"), Series("training", smooth(points), 1)]


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
