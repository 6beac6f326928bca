"""An evaluation as people read it on a terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

_RULES = {"train": "as trained", "causal": "causal"}


def lines_of(told: dict[str, Any]) -> Iterator[str]:
    """The lines of an evaluation, tables and what they mean."""
    if "sets" in told:
        yield from _sets(told)
    if "depths" in told:
        yield from _depths(told["depths"])
    if "caches" in told:
        yield from _caches(told["caches"])
    if "tasks" in told:
        yield from _tasks(told)
    if "harness" in told:
        yield ""
        yield from table([("task of lm-evaluation-harness", "measure", "value"), *_harness(told["harness"])])


def _sets(told: dict[str, Any]) -> Iterator[str]:
    several = len(told["rules"]) > 1
    rows = [("set", *(("selection",) if several else ()), "tokens", "nats per token", "bits per byte", "top-1",
             "calibration", "MFLOP (active)")]  # fmt: skip
    for name, rules in told["sets"].items():
        for rule, one in rules.items():
            cost = one["compute"]["mflop_per_token"]
            sure = f"{one['calibration']['error']:.3f}" if "calibration" in one else "—"
            compute = f"{cost['paid']:.3g} ({'?' if cost['active'] is None else format(cost['active'], '.3g')})"
            rows.append(
                (name, *((_RULES[rule],) if several else ()), f"{one['targets']:,}", measured(one, "loss"),
                 measured(one, "bits_per_byte"), f"{one['accuracy']:.1%}", sure, compute)
            )  # fmt: skip
    if len(told["sets"]) > 1:
        for rule, one in told["macro"].items():
            rows.append(
                ("mean of sets", *((_RULES[rule],) if several else ()), "", measured(one, "loss"),
                 measured(one, "bits_per_byte"), "", "", "")
            )  # fmt: skip
    yield from table(rows)
    for name, one in told.get("difference", {}).items():
        yield f"{name}: causal selection costs {signed(one, 'loss')} nats per token against selection as trained"
    yield ""
    units = {one["resampled"] for rules in told["sets"].values() for one in rules.values()}
    yield f"[low, high] hold 95 % of {told['resamples']} bootstraps over {' or '.join(sorted(units))}"
    for name, rules in told["sets"].items():
        if (one := rules[told["rules"][-1]]).get("bound"):
            yield _drawn(name, one)
    for name, rules in told["sets"].items():
        one = rules[told["rules"][-1]]
        yield ""
        yield from table([(name, "tokens", "nats"), *_groups(one["by_kind"], lambda g: g["kind"])])
        yield ""
        if "by_share" in one:
            parts = _groups(one["by_share"], lambda g: f"up to {g['to']:.0%}")
            yield from table([("hidden share", "hidden tokens", "nats of each"), *parts])
            continue
        of = lambda g: f"{g['from']}" + (f" to {g['to']}" if g["to"] > g["from"] else "")  # noqa: E731
        yield from table([("tokens before it", "tokens", "nats"), *_groups(one["by_context"], of)])


def _drawn(name: str, one: dict[str, Any]) -> str:
    """What the bound is, and how far chance moves it."""
    error = one["loss_error"]
    chance = (
        ""
        if error is None
        else f"; the standard error of their mean is {error:.4f} nats per token"
        + ("" if one["bits_per_byte_error"] is None else f", {one['bits_per_byte_error']:.4f} bits per byte")
    )
    return f"{name}: an upper bound on what the model loses, by {one['draws']} draws of what is hidden{chance}"


def compared(evaluations: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Evaluations of several runs side by side: sets by the rule of generation, depths, tasks."""
    cells: dict[str, dict[str, str]] = {}
    for run, told in evaluations.items():
        for what, cell in _cells(told):
            cells.setdefault(what, {})[run] = cell
    yield from table([("", *evaluations), *((what, *(own.get(run, "—") for run in evaluations))
                      for what, own in cells.items())])  # fmt: skip


def _cells(told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "step", f"{told.get('step', '?')}"
    for name, rules in told.get("sets", {}).items():
        one = rules[told["rules"][-1]]
        yield f"{name}, nats per token", measured(one, "loss")
        yield f"{name}, bits per byte", measured(one, "bits_per_byte")
    if len(told.get("sets", {})) > 1:
        yield "mean of sets, bits per byte", measured(told["macro"][told["rules"][-1]], "bits_per_byte")
    for point in told.get("depths", {}).get("points", ()):
        yield f"{point['passes']} passes, nats per token", measured(point, "loss")
    for point in told.get("caches", {}).get("points", ()):
        yield f"cache {point['cache']}, nats per token", measured(point, "loss")
    for name, one in told.get("tasks", {}).items():
        yield f"{name}, right", measured(one, "accuracy")
    if "tasks_mean" in told:
        yield "tasks, above chance", measured(told["tasks_mean"], "centred")


def _groups(groups: Sequence[dict[str, Any]], name: Any) -> list[tuple[str, ...]]:
    return [(name(group), f"{group['targets']:,}", f"{group['loss']:.4f}") for group in groups]


def _depths(told: dict[str, Any]) -> Iterator[str]:
    rows = [("passes", "nats per token", "bits per byte", "MFLOP per token", "mean depth")]
    for point in told["points"]:
        costs = [one["compute"] for one in point["per_set"].values()]
        mean = lambda values: f"{sum(values) / len(values):.4g}"  # noqa: E731
        star = "*" if point["passes"] == told["trained"] else ""
        rows.append(
            (f"{point['passes']}{star}", measured(point, "loss"), measured(point, "bits_per_byte"),
             mean([cost["mflop_per_token"]["paid"] for cost in costs]),
             mean([cost.get("mean_depth", point["passes"]) for cost in costs]))
        )  # fmt: skip
    yield ""
    yield from table(rows)
    yield f"depth ({_RULES[told['rule']]} selection, * as trained): {told['says']}"
    if len(told["per_set"]) > 1:
        yield from (f"  {name}: {one['says']}" for name, one in told["per_set"].items())


def _caches(told: dict[str, Any]) -> Iterator[str]:
    rows = [("cache, token by token", "", "bytes per token", "nats per token", "more than with every pass")]
    for point in told["points"]:
        exact = "exact" if point["exact"] else "inexact"
        rows.append((point["cache"], exact, f"{point['bytes_per_token']:,.0f}", measured(point, "loss"),
                     signed(point["difference"], "loss")))  # fmt: skip
    yield ""
    yield from table(rows)


def _tasks(told: dict[str, Any]) -> Iterator[str]:
    rows = [("task", "kind", "items", "shots", "right", "above chance", "likelihood", "per character", "information")]
    for name, one in told["tasks"].items():
        others = ("likelihood", "per_character", "mutual_information")
        rows.append(
            (name, one["kind"].replace("_", " "), f"{one['items']:,}", str(one["shots"]), measured(one, "accuracy"),
             measured(one, "centred"), *(_share(one[other]) for other in others))
        )  # fmt: skip
    mean = told["tasks_mean"]
    rows.append(("CORE" if mean["core"] else "mean of tasks", "", "", "", "", measured(mean, "centred"), "", "", ""))
    yield ""
    yield from table(rows)
    yield (
        "right: as CORE chooses, by nats per token; likelihood, per character and information: shares of other ways to "
        "choose (acc, acc_norm, acc_mutual_info of lm-evaluation-harness)"
    )
    if told["rules"] == ["train"]:
        yield "this model cannot select causally: by the selection of training a score depends on the end of its text"
    for name, one in told["tasks"].items():
        if one["cut"]:
            yield f"{name}: {one['cut']} of {one['items']} items are longer than a row; their beginnings are left out"


def _harness(told: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for task, one in told.items():
        for name, value in one.items():
            if isinstance(value, float):
                yield task, name.removesuffix(",none"), f"{value:.4f}"


def _share(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def measured(one: dict[str, Any], name: str) -> str:
    """1.2345 [1.2, 1.3] of a measure and its interval."""
    if one[name] is None:
        return "—"
    found = one.get(f"{name}_interval")
    return f"{one[name]:.4f}" + (f" [{found[0]:.3f}, {found[1]:.3f}]" if found else "")


def signed(one: dict[str, Any], name: str) -> str:
    found = one.get(f"{name}_interval")
    return f"{one[name]:+.4f}" + (f" [{found[0]:+.4f}, {found[1]:+.4f}]" if found else "")


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows in columns, the first column to the left and all others to the right; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *rest]).rstrip()
