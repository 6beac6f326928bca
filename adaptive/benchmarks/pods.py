"""What is said of a train step that was compiled for a machine: lines for a terminal, rows of tables in documents."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive.account import account
from adaptive.benchmarks.estimate import PARTS, RATES
from adaptive.benchmarks.moves import moves, that_fit
from adaptive.benchmarks.traffic import Received
from adaptive.errors import UserError
from adaptive.peaks import peak_of
from adaptive.recipe import Recipe
from adaptive.targets import TARGETS, Topology

GIB, MIB = 2**30, 2**20
WIDTH = 124  # of pages


def lines(record: dict[str, Any], recipe: Recipe, topology: Topology) -> list[str]:
    """All that is known of a compiled step."""
    mesh = " ".join(f"{axis}={size}" for axis, size in record["mesh"].items() if size > 1) or "one device"
    chosen = "" if record["mesh_given"] else " (none was given: mesh.fsdp over what divides the widths, data the rest)"
    at_once = record["rows"] // record["accumulation"]
    micro = f", {record['accumulation']} micro-batches of {at_once} rows" if record["accumulation"] > 1 else ""
    found = [
        f"recipe     {record['recipe']} on {topology}",
        f"mesh       {mesh}{chosen}",
        f"batch      {recipe.train.batch_size:,} rows of {record['seq_len']:,}: {record['rows']} of each device"
        f"{micro}; remat {record['remat']}",
    ]
    if "temporaries" in record:
        effort = "little effort, memory within 3 % (--full_effort)" if record["effort"] else "full effort"
        effort = "" if topology.target == "cpu" else f" with {effort}"
        versions = ", ".join(f"{name} {version}" for name, version in _compilers(record, topology).items())
        found += [
            f"compiled   in {record['compile_s']:.0f} s{effort}; {versions}",
            f"memory     needs {_gib(record['needs'])} of a device: arguments {_gib(record['arguments'])} (state and "
            f"rows; {_gib(record['in_place'])} updated in place), outputs {_gib(record['outputs'])}, temporaries "
            f"{_gib(record['temporaries'])}, code {_gib(record['code'])}",
            *_largest(record),
            *_collectives(record, topology),
        ]
    found += _flops(record, recipe, topology)
    found += _estimate(record, topology)
    return [*found, *_verdict(record, recipe, topology)]


def _compilers(record: dict[str, Any], topology: Topology) -> dict[str, str]:
    names = ["jax", *({"h200": ["jax-cuda13-plugin"], "cpu": ["jaxlib"]}.get(topology.target, ["libtpu"]))]
    return {name: record["versions"].get(name, "?") for name in names}


def _largest(record: dict[str, Any]) -> list[str]:
    heads = ["largest   ", *["          "] * len(record["largest"])]
    return [
        f"{head} {one['array']}, {_mib(one['bytes'])}, {_times(one['number'])}: {one['scope']}"
        for head, one in zip(heads, record["largest"], strict=False)
    ]


def _collectives(record: dict[str, Any], topology: Topology) -> list[str]:
    groups = "nodes" if topology.target == "h200" else "slices"
    if not record["collectives"]:
        return ["exchanges  none"]
    heads = iter(["exchanges ", *["          "] * 9])
    out = []
    for kind, count in record["collectives"].items():
        moved = Received(**record["received"][kind])
        slow = f" and {_mib(moved.between)} between {groups}" if moved.between else ""
        out.append(
            f"{next(heads)} {kind}: {_times(count['runs'])} a step, results {_mib(count['bytes'])}; a device receives "
            f"{_mib(moved.inside)}{slow}"
        )
    total, least = received(record), sum(part["bytes"] for part in record["least"])
    if record["unknown_loops"] or record.get("unknown_groups"):
        out.append(
            f"           {record['unknown_loops']} loops of unknown length count once, "
            f"{record.get('unknown_groups', 0)} collectives of unknown groups as of all devices"
        )
    out.append(f"least      {_mib(least)} that a device has to receive, of {_mib(total)}: {_ratio(total, least)}")
    out += [f"           {part['name']} {_mib(part['bytes'])}: {part['formula']}" for part in record["least"]]
    return out


def received(record: dict[str, Any]) -> float:
    """Bytes that a device receives in a step, over either network."""
    return sum(sum(one.values()) for one in record["received"].values())


def _flops(record: dict[str, Any], recipe: Recipe, topology: Topology) -> list[str]:
    cost, batch = account(recipe.model, record["seq_len"]), recipe.train.batch_size
    useful = cost.train_flops_per_token * record["seq_len"] * batch
    executed = cost.train_flops("none" if record["remat"] == "auto" else record["remat"]) * batch
    return [
        f"FLOPs      {useful:.3g} a step that are useful, {useful / topology.devices:.3g} of each device; "
        f"{executed:.3g} with what is recomputed and masked"
    ]


def _estimate(record: dict[str, Any], topology: Topology) -> list[str]:
    guess = record["estimated"]
    if guess is None:
        return ["estimate   none: a CPU's rates are not on record"]
    rates, kind = RATES[topology.target], TARGETS[topology.target]
    peak = peak_of(kind.kind, "bfloat16").flops or 0.0
    parts = ", ".join(f"{part} {_ms(guess[part])}" for part in PARTS if guess[part])
    if "communication" in guess:
        least, most = times(record)
        between = (
            f"{_ms(least)} to {_ms(most)}: computing {_ms(guess['step'])}, exchanging {_ms(guess['communication'])}"
        )
        used = f"{utilisation(record, most):.0%} to {utilisation(record, least):.0%}"
        hidden = "; all exchanges hidden behind computing, or none"
    else:
        between, used, hidden = _ms(guess["step"]), f"{guess['utilisation']:.0%}", "; exchanges left out"
    slow = f", {kind.between / 1e9:g} GB/s between slices or nodes" if topology.slices > 1 else ""
    return [
        f"estimate   step {between}; utilisation {used}{hidden}",
        f"           computing: {parts}",
        f"assumed    peak {peak / 1e12:g} TFLOP/s, of which matmuls reach {rates.matmul:.0%} and attention "
        f"{rates.attention:.0%}; memory {kind.bandwidth / 1e9:g} GB/s, of which {rates.memory:.0%}; links "
        f"{kind.inside / 1e9:g} GB/s into a device{slow}, all of it; {rates.source}",
    ]


def times(record: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a step where all of its communication is hidden, and where none is."""
    guess = record["estimated"]
    return max(guess["step"], guess["communication"]), guess["step"] + guess["communication"]


def utilisation(record: dict[str, Any], seconds: float) -> float:
    """Useful FLOPs over what the peak would do in that time."""
    return record["estimated"]["utilisation"] * record["estimated"]["step"] / seconds


def _verdict(record: dict[str, Any], recipe: Recipe, topology: Topology) -> list[str]:
    room = record["device_memory"]
    if room is None:
        return ["verdict    compiles; how much memory a CPU has is not known"]
    if record["fits"]:
        left = room - record["needs"]
        tight = "; train.remat=auto would leave 5 % free" if left < 0.05 * room else ""
        return [f"verdict    fits: {_gib(record['needs'])} of {_gib(room)}, {_gib(left)} to spare{tight}"]
    needs = "more than it has" if record["needs"] is None else _gib(record["needs"])
    found = [f"verdict    does not fit: needs {needs} of {_gib(room)}"]
    fitting = that_fit(moves(record, recipe, topology), topology)
    for head, move in zip(["           would fit, by estimate:", *["           or"] * 9], fitting, strict=False):
        found.append(f"{head} {' '.join(move.settings)} ({_gib(move.needs)}, {_ms(move.seconds)})")
    if not fitting:
        found.append("           nothing found that would fit, by estimate: mesh.tensor, or a larger topology")
    return [*found, "           --sweep compiles them and recommends one"]


# Tables of records


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, in the order of their names. Raises UserError where there are none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise UserError(f"no .json file in {folder}")
    return found


# Of the table in docs/machines.md: recipes of published sizes, and one with experts.
RECIPES = ("mor_360m", "recursive_360m", "vanilla_360m", "moe_360m", "mor_1_7b", "vanilla_1_7b", "hnet_1stage_l",
           "hnet_2stage_xl")  # fmt: skip
TOPOLOGIES = ("v5e-16", "v5e-256", "v5p-128", "v6e-256", "h200-64")


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """A table for documents, a row for each recipe and topology that was compiled with the recipe's own batch; what was
    not compiled is named below it. Then how bytes grow with the number of devices, at equal rows of each."""
    known = {(one["recipe"], one["topology"]): one for one in records if not _given(one)}
    head = ["recipe", "on", "mesh", "rows at once", "needs, GiB", "fits", "receives, MiB", "of the least",
            "estimated step, ms", "utilisation"]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    rows += [[f"`{recipe}`", topology, *_row(known[recipe, topology])]
             for recipe in RECIPES for topology in TOPOLOGIES if (recipe, topology) in known]  # fmt: skip
    missing = [
        f"`{recipe}` on {', '.join(absent)}"
        for recipe in RECIPES
        if (absent := [topology for topology in TOPOLOGIES if (recipe, topology) not in known])
    ]
    left = textwrap.fill(f"Not compiled: {'; '.join(missing)}.", WIDTH, break_on_hyphens=False) if missing else ""
    return "\n\n".join(filter(None, (_table(rows), left, _scaling(records))))


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _given(record: dict[str, Any]) -> bool:
    return any(text.startswith("train.batch_size=") for text in record["settings"])


def _scaling(records: Sequence[dict[str, Any]]) -> str:
    """MiB that a device receives, by recipe and number of devices, of records with as many rows at once."""
    found: dict[str, dict[int, float]] = {}
    weak = {one["recipe"] for one in records if _given(one)}
    for one in records:
        if one["recipe"] in weak and one["target"] == "v5e" and one["accumulation"] == 1:
            found.setdefault(one["recipe"], {})[one["devices"]] = received(one) / MIB
    if not found:
        return ""
    sizes = sorted({size for row in found.values() for size in row})
    head = ["MiB that each v5e receives", *(f"{size} devices" for size in sizes)]
    rows = [[f"`{name}`", *(f"{row[size]:,.0f}" if size in row else "not compiled" for size in sizes)]
            for name, row in sorted(found.items())]  # fmt: skip
    return _table([head, ["---"] * len(head), *rows])


def _row(record: dict[str, Any]) -> list[str]:
    mesh = " ".join(f"{axis}={size}" for axis, size in record["mesh"].items() if size > 1)
    rows = f"{record['rows'] // record['accumulation']} of {record['rows']}"
    needs = "more" if record["needs"] is None else f"{record['needs'] / GIB:.2f}"
    head = [mesh, rows, needs, "yes" if record["fits"] else "**no**"]
    if "received" not in record:
        return [*head, "", "", "", ""]
    (least, most), total = times(record), received(record)
    minimum = sum(part["bytes"] for part in record["least"])
    return [
        *head,
        f"{total / MIB:,.0f}",
        _ratio(total, minimum),
        f"{least * 1e3:,.0f} to {most * 1e3:,.0f}",
        f"{utilisation(record, most):.0%} to {utilisation(record, least):.0%}",
    ]


def _ratio(total: float, least: float) -> str:
    return f"{total / least:.2f} times" if least else "nothing is needed"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _gib(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= GIB / 100 else _mib(value)


def _mib(value: float) -> str:
    return f"{value / MIB:,.0f} MiB" if value >= 10 * MIB else f"{value / MIB:.2g} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2g} ms"
