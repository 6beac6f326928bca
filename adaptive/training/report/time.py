"""Where a run's wall time went, as HTML; "" where no account was kept."""

from adaptive.training.goodput import read_attempts, shares, spent
from adaptive.training.report.layout import section, table
from adaptive.training.report.numbers import duration, percent
from adaptive.training.report.runs import Run

WORDS = {
    "start": "starting: imports, joining the others, opening data",
    "compile": "compiling, or reading programs from the cache",
    "restore": "reading a checkpoint, or drawing parameters",
    "data": "waiting for data, with idle devices",
    "step": "training steps that count",
    "evaluation": "evaluation",
    "save": "saving",
    "end": "report and dashboards",
    "lost": "steps that were taken again after a failure",
    "down": "between a failure and the next start",
}


def time(run: Run) -> str:
    found = spent(read_attempts(run.path))
    if found.goodput is None:
        return ""
    rows = [(WORDS.get(kind, kind), duration(seconds), percent(share)) for kind, seconds, share in shares(found)]
    starts = f"{found.attempts} start{'s' * (found.attempts != 1)}"
    failures = f", {found.failures} after a failure" if found.failures else ""
    return section(
        "Time",
        table([("wall time", "", "share"), *rows, ("together", duration(found.total), "100%")], last_is_sum=True),
        lead=f"Goodput {percent(found.goodput)}: the share of the run's wall time, over {starts}{failures}, that went "
        "into training steps that count.",
    )
