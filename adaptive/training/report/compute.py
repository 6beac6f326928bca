"""The compute account, speed and machine of a run, as HTML; "" where there is nothing to show."""

import html

from adaptive.training.report.charts import Series, line_chart
from adaptive.training.report.chunks import stages_of
from adaptive.training.report.layout import grid, section, smooth, table
from adaptive.training.report.numbers import compact, duration, percent
from adaptive.training.report.runs import Run
from adaptive.training.report.svg import element


def compute(run: Run) -> str:
    speed = [
        Series("each row", run.points("tokens_per_s", "tokens"), 1, "faint"),
        Series("tokens per second", smooth(run.points("tokens_per_s", "tokens")), 1),
    ]
    times = [
        Series("step", smooth(run.points("step_ms", "tokens")), 1),
        Series("of it waiting for data", smooth(run.points("data_wait_ms", "tokens")), 2),
    ]
    mfu = [
        Series("active", run.points("mfu_active", "tokens"), 1),
        Series("dense equivalent", run.points("mfu_dense_equivalent", "tokens"), 2, "dashed"),
    ]
    utilisation = line_chart("Utilisation", mfu, x="tokens", y="share of peak", y_range=(0, None), percent=True)
    return section(
        "Compute",
        _account(run),
        grid(
            line_chart("Throughput", speed, x="tokens", y="tokens per second", y_range=(0, None)),
            line_chart("Step time", times, x="tokens", y="ms", y_range=(0, None)),
            _column(utilisation, _memory(run)),
            _facts(run),
        ),
    )


def _column(*parts: str) -> str:
    """Parts one above the other, in one cell of a grid."""
    return grid(*parts, columns="one")


def _account(run: Run) -> str:
    """Where the FLOPs of a step go, and where they would if every token took every layer."""
    plan = run.plan
    if not plan.account:
        return ""
    unit = "FLOP"
    lines = [(a.part, a.active, a.dense) for a in plan.account]
    lines.append(("together", sum(a.active for a in plan.account), sum(a.dense for a in plan.account)))
    rows: list[tuple[str, ...]] = [("per training step", "as routed", "dense equivalent", "saved")]
    for part, active, dense in lines:
        saved = percent(1 - active / dense) if active < dense else "—"
        rows.append((part, compact(active, unit), compact(dense, unit), saved))
    if all(active == dense for _, active, dense in lines):  # nothing is routed
        rows = [("per training step", "useful"), *(row[:2] for row in rows[1:])]
    notes = []
    if plan.executed_flops_per_step:
        notes.append(f"As executed, attention over all pairs included: {compact(plan.executed_flops_per_step, unit)}.")
    if plan.paper_flops_per_token:
        per = "byte, at the target ratios" if stages_of(run) else "token"
        notes.append(f"In the published accounting, forward per {per}: {compact(plan.paper_flops_per_token, unit)}.")
    lead = "Useful matrix multiplications, forward and backward; attention counts the pairs that causality allows."
    return (
        element("p", lead, kind="lead") + table(rows, kind="account", last_is_sum=True)
        + "".join(element("p", html.escape(note), kind="note") for note in notes)
    )  # fmt: skip


def _facts(run: Run) -> str:
    plan = run.plan
    if not plan.device_kind:
        return ""
    mesh = " \u00d7 ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    peak = compact(plan.peak_flops_per_s, "FLOP/s") if plan.peak_flops_per_s else "not known, so no MFU"
    computed = ", ".join(map(str, plan.capacities))
    rows = [
        ("device", f"{plan.devices} \u00d7 {plan.device_kind}" if plan.devices else plan.device_kind),
        ("mesh", mesh),
        ("processes", str(plan.processes) if plan.processes > 1 else ""),
        ("compute dtype", plan.compute_dtype),
        ("peak", peak),
        ("achieved", compact(run.typical("flops_per_s"), "FLOP/s")),
        ("compilation", duration(plan.compile_seconds) if plan.compile_seconds is not None else ""),
        ("tokens per recursion", f"{computed} of {plan.seq_len}" if computed else ""),
        *((f"kernel: {op}", which) for op, which in plan.kernels.items()),
        ("versions", ", ".join(f"{name} {version}" for name, version in plan.versions.items())),
    ]
    return table([("machine", ""), *((a, b) for a, b in rows if b)], kind="facts")


def _memory(run: Run) -> str:
    if not run.plan.memory:
        return ""
    rows = [(kind, compact(size, "B")) for kind, size in run.plan.memory.items()]
    total = ("together", compact(sum(run.plan.memory.values()), "B"))
    return table([("memory of a step, per device", ""), *rows, total], kind="facts", last_is_sum=True)
