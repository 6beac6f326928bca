"""Several runs against each other, as HTML."""

from collections.abc import Callable, Sequence
from typing import Any

from adaptive.training.report.charts import COLOURS, Point, Series, line_chart
from adaptive.training.report.layout import grid, section, smooth, table
from adaptive.training.report.numbers import compact, duration, percent
from adaptive.training.report.runs import Run


def comparison(runs: Sequence[Run]) -> str:
    """Curves over tokens, compute and time, and a table; ratios are to the first run."""
    names = _names(runs)
    held_out = any(len(run.points("eval/bits_per_byte", "tokens")) > 1 for run in runs)
    measure = "eval/bits_per_byte" if held_out else "bits_per_byte"
    which = "Held-out" if held_out else "Training"

    def curves(x: str, scale: float = 1.0) -> list[Series]:
        line: Callable[[list[Point]], list[Point]] = list if held_out else smooth
        return [
            Series(
                name,
                [(at * scale, value) for at, value in line(run.points(measure, x))],
                1 + i % COLOURS,
                "dots" if held_out else "line",
            )
            for i, (name, run) in enumerate(zip(names, runs, strict=True))
        ]

    hours = max(run.seconds or 0.0 for run in runs) > 6 * 3600
    scale, clock = (1 / 3600, "hours") if hours else (1 / 60, "minutes")
    compute: dict[str, Any] = {"x": "training compute", "x_unit": "FLOP"}
    y = "bits per byte of text"
    return section(
        "Comparison",
        table([("", *names), *_rows(runs)], kind="compare"),
        line_chart(f"{which} loss over compute", curves("flops"), **compute, y=y, size="full"),
        grid(
            line_chart(f"{which} loss over tokens", curves("tokens"), x="tokens", y=y),
            line_chart(f"{which} loss over time", curves("seconds", scale), x=f"wall time in {clock}", y=y),
        ),
        lead="FLOPs are what the account says; step time is what the clock says. Where the second does not follow the "
        "first, gathers, padding or waiting ate the difference.",
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """Names of the runs, told apart by their folders where they share one."""
    names = [run.name for run in runs]
    return [n if names.count(n) == 1 else f"{n} ({run.path.name})" for n, run in zip(names, runs, strict=True)]


def _rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    first = runs[0]
    plain: list[tuple[str, Callable[[Run], str]]] = [
        ("held-out bits per byte", lambda r: _number(r.last_evaluation.get("eval/bits_per_byte"))),
        ("with causal routing", lambda r: _number(r.last_evaluation.get("eval/threshold/bits_per_byte"))),
        ("held-out loss", lambda r: _number(r.last_evaluation.get("eval/loss"))),
        ("bytes per chunk", lambda r: _number(r.last_evaluation.get("eval/routing/bytes_per_chunk"), 2)),
        ("parameters", lambda r: compact(r.plan.unique_parameters or None)),
        ("layers stored / effective", lambda r: f"{r.plan.unique_layers} / {r.plan.effective_layers}"),
        ("tokens", lambda r: compact(r.last.get("tokens"))),
        ("FLOPs spent", lambda r: compact(r.plan.flops_per_step * r.step or None, "FLOP")),
        ("FLOPs per token", lambda r: _against(_per_token(r), _per_token(first), "FLOP")),
        ("time per token", lambda r: _against(_seconds_per_token(r), _seconds_per_token(first), "s")),
        ("tokens per second", lambda r: compact(r.typical("tokens_per_s"))),
        ("MFU, active", lambda r: percent(r.typical("mfu_active"))),
        ("max / mean load of experts", lambda r: _number(r.last.get("experts/load_max_over_mean"), 2)),
        ("experts per token", lambda r: _number(r.last.get("experts/per_token"), 2)),
        ("tokens without an expert", lambda r: percent(r.last.get("experts/without_expert"))),
        ("pairs dropped", lambda r: percent(r.last.get("experts/dropped_fraction"))),
        ("wall time", lambda r: duration(r.seconds)),
    ]
    rows = [(name, *(cell(run) for run in runs)) for name, cell in plain]
    return [row for row in rows if any(cell not in ("—", "0 / 0") for cell in row[1:])]


def _per_token(run: Run) -> float | None:
    return run.plan.flops_per_step / run.plan.tokens_per_step if run.plan.tokens_per_step else None


def _seconds_per_token(run: Run) -> float | None:
    speed = run.typical("tokens_per_s")
    return 1 / speed if speed else None


def _against(value: float | None, base: float | None, unit: str) -> str:
    if value is None:
        return "—"
    shown = f"{value * 1e6:.3g} µs" if unit == "s" else compact(value, unit)
    return f"{shown} ({value / base:.2f}\u00d7)" if base else shown


def _number(value: float | None, decimals: int = 4) -> str:
    return "—" if value is None else f"{value:.{decimals}f}"
