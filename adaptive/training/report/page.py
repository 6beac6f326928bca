"""The page: everything in one file that opens without a network, in light and dark."""

import datetime
import html
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from adaptive.data.files import write_text_atomically
from adaptive.training.report.chunks import chunks, stages_of
from adaptive.training.report.compare import comparison
from adaptive.training.report.compute import compute
from adaptive.training.report.evaluations import evaluations
from adaptive.training.report.experts import experts
from adaptive.training.report.overview import learning, origin, recipe, tiles
from adaptive.training.report.parts import parts
from adaptive.training.report.retrofit import retrofit
from adaptive.training.report.routing import deep_tokens, routing
from adaptive.training.report.runs import Run, load_run
from adaptive.training.report.schema import REPORT_FILE
from adaptive.training.report.svg import element
from adaptive.training.report.time import time


def write_report(workdir: str | Path, compare: Sequence[str | Path] = ()) -> Path:
    """Writes WORKDIR/report.html from what the workdir holds, and returns its path.

    compare  workdirs of other runs, shown against this one

    Raises UserError where a workdir holds no run at all; files that are missing are named on the page.
    """
    run, *others = [load_run(path) for path in (workdir, *compare)]
    target = Path(workdir) / REPORT_FILE
    write_text_atomically(target, page(run, others))
    return target


def page(run: Run, others: Sequence[Run] = ()) -> str:
    """The page of a run as HTML, with a comparison if there are others."""
    body = "".join(
        (
            _header(run),
            tiles(run),
            _alerts(run),
            comparison((run, *others)) if others else "",
            retrofit(run),
            learning(run),
            evaluations(run),
            chunks(run),
            deep_tokens(run),
            routing(run),
            experts(run),
            parts(run),
            compute(run),
            time(run),
            recipe(run),
            origin(run),
            element("footer", html.escape(_footer(run))),
        )
    )
    return _TEMPLATE.format(
        title=html.escape(run.name), style=_asset("style.css"), script=_asset("script.js"), body=element("main", body)
    )


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
{body}
<div id="tip" hidden></div>
<script>
{script}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return resources.files("adaptive.training.report").joinpath(name).read_text(encoding="utf-8")


def _header(run: Run) -> str:
    plan = run.plan
    facts = [run.title, _words(plan.router) if plan.router != "none" else ""]
    if stages := stages_of(run):
        facts.append(f"{len(stages)} chunking stage{'s' * (len(stages) > 1)}")
    if plan.recursions > 1:
        facts.append(f"{plan.recursions} recursions")
    kinds = dict.fromkeys((one.settings.experts, one.settings.router.kind()) for one in run.experts)
    facts += [f"{experts} experts, {_words(router)}" for experts, router in kinds]
    facts.append(f"step {run.step:,}" + (f" of {plan.steps:,}" if plan.steps and not run.finished else ""))
    if plan.devices:
        facts.append(f"{plan.devices} \u00d7 {plan.device_kind}")
    state = element(
        "span", "complete" if run.finished else "not complete", kind=f"state {'done' if run.finished else ''}"
    )
    about = run.recipe.description if run.recipe else ""
    line = " · ".join(filter(None, facts))
    return element(
        "header",
        element("h1", html.escape(run.name) + state)
        + (element("p", html.escape(about), kind="about") if about else "")
        + element("p", html.escape(line), kind="facts"),
    )


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _alerts(run: Run) -> str:
    """What to worry about, and what could not be shown."""
    boxes = ""
    for kind, title, lines in (("warning", "Worth a look", run.warnings()), ("missing", "Not here", run.missing)):
        if lines:
            items = "".join(element("li", html.escape(line)) for line in lines)
            boxes += element("aside", element("b", title) + element("ul", items), kind=kind)
    return boxes


def _footer(run: Run) -> str:
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    return f"Made from {run.path.resolve()} on {written}. It can be made again with adaptive report."
