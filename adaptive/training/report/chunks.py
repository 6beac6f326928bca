"""Where chunking stages cut the text, as HTML; "" for models that cut none."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from adaptive.training.report.bars import histogram
from adaptive.training.report.charts import COLOURS, Point, Series, line_chart
from adaptive.training.report.layout import grid, section, smooth, table
from adaptive.training.report.numbers import percent
from adaptive.training.report.passage import chunk_sizes, chunks_html
from adaptive.training.report.runs import Run
from adaptive.training.report.schema import MOST_BYTES, ChunkRecord
from adaptive.training.report.svg import element

_MOST_OVERSHOOT = 3.0  # times the highest target that the chart of chunk sizes shows
_SELECTIONS = {"topk": "with the capacities of training", "threshold": "without capacities, as in generation"}


def chunks(run: Run) -> str:
    """Passage, histograms and curves."""
    stages = stages_of(run)
    if not stages:
        return ""
    held_out = run.routing.chunks
    how = _SELECTIONS[run.routing.selection] if _limited(run) else ""
    when = f"Held-out text at step {run.routing.step:,}{f', {how}' if how else ''}. " if held_out else ""
    return section(
        "Where chunks begin",
        _passage(run, len(stages)),
        grid(*(_histogram(record, run) for record in held_out), *_curves(run, stages)),
        _words(held_out),
        lead=when + _lead(run, len(stages)),
    )


def stages_of(run: Run) -> list[int]:
    """Numbers of the stages that chunk."""
    names = {name for row in (*run.training, *run.evaluations) for name in row}
    logged = [s for s in range(COLOURS) if names & {f"routing/kept_{s}", f"eval/routing/kept_{s}"}]
    return logged or [record.stage for record in run.routing.chunks]


def bytes_per_chunk(row: Mapping[str, float | None], stages: Sequence[int], place: str = "") -> list[float]:
    """Of each stage, counted from the bytes; as many as are known."""
    out, product = [], 1.0
    for stage in stages:
        kept = row.get(f"{place}routing/kept_{stage}")
        if not kept:
            break
        out.append(product := product / kept)
    return out


def _learned(run: Run, stage: int) -> bool:
    """Whether a router decides there; taken for granted where no recipe tells."""
    return run.chunking[stage].chunker.learned if run.chunking else True


def _target(run: Run, stage: int) -> float | None:
    """Bytes per chunk of a stage that the chunkers aim at; None where nothing is aimed at or known."""
    around = [settings.chunker for settings in run.chunking[: stage + 1]]
    aims = bool(around) and all(chunker.learned for chunker in around)
    return math.prod(chunker.expected() for chunker in around) if aims else None


def _limited(run: Run) -> bool:
    return any(settings.capacities for settings in run.chunking)


def _lead(run: Run, stages: int) -> str:
    rules = {s: settings.chunker.rule() for s, settings in enumerate(run.chunking) if not settings.chunker.learned}
    told = " ".join(f"Stage {s} begins a chunk {rule}." for s, rule in rules.items())
    if len(rules) == stages:
        return f"{told} Nothing of that is learned."
    nested = " Chunks of a deeper stage are made of chunks of the one before." if stages > 1 else ""
    return f"The network inside sees one vector per chunk; a router learned where to begin one.{nested} {told}".strip()


def _passage(run: Run, stages: int) -> str:
    passage = run.routing.passage
    if not passage or not any(token.begins for token in passage):
        return ""
    losses = sorted(token.loss for token in passage if token.loss is not None)
    high = max(losses[int(0.95 * (len(losses) - 1))], 1e-6) if losses else 1.0
    learned = [_learned(run, s) for s in range(stages)]
    swatch = lambda kind, text, **more: element(  # noqa: E731
        "span", element("i", kind=f"swatch {kind}", **more) + text
    )
    chunk = "".join(swatch(f"b{s + 1}", f"stage {s}") for s in range(stages)) + swatch("other", "every other chunk")
    loss = "".join(swatch("loss", f"{s * high:.1f}", style=f"--s:{s:.2f}") for s in (0.0, 0.5, 1.0)) + " nats"
    button = lambda by, on: element("button", by, data_by=by, aria_pressed=on, type="button")  # noqa: E731
    toggle = element("span", button("chunk", "true") + button("loss", "false"), kind="toggle") if losses else ""
    legends = element("span", chunk, kind="legend for-chunk") + element("span", loss, kind="legend for-loss")
    controls = element("div", toggle + legends, kind="controls by-chunk")
    sizes = [chunk_sizes(passage, stage) for stage in range(stages)]
    return controls + element("div", chunks_html(passage, sizes, learned, high), kind="passage by-chunk")


def _histogram(record: ChunkRecord, run: Run) -> str:
    total = sum(record.lengths)
    if not total:
        return ""
    seen, tenth = 0, MOST_BYTES
    for length, count in enumerate(record.lengths, 1):
        seen += count
        if seen >= 0.9 * total:
            tenth = length
            break
    target = _target(run, record.stage)
    pulled = f", target {target:g}" if target is not None else ""
    note = f"mean {record.mean:.2f} bytes{pulled}; nine in ten have at most {tenth}"
    title = f"Lengths of held-out chunks, stage {record.stage}"
    return histogram(title, record.lengths, x="bytes", colour=1 + record.stage % COLOURS, note=note)


def _words(records: Sequence[ChunkRecord]) -> str:
    """How well chunks agree with words."""
    known = [record for record in records if record.words is not None]
    if not known:
        return ""
    head = ("stage", "words that begin a chunk", "chunks that begin at a word", "at a word by chance")
    rows = [(f"stage {r.stage}", percent(r.words), percent(r.at_words), percent(r.chance)) for r in known]
    lead = "A chunk begins at a word where it begins at its first letter or at what stands before that."
    return element("h3", "Chunks and words") + element("p", lead, kind="lead") + table([head, *rows], kind="compare")


def _curves(run: Run, stages: Sequence[int]) -> list[str]:
    learned = [s for s in stages if _learned(run, s)]
    share: dict[str, Any] = {"x": "tokens", "y_range": (0, None), "percent": True}
    sizes = [series for s in stages for series in _sizes(run, stages, s)]
    near = [series for s in learned for series in _both(run, f"near_half_{s}", f"stage {s}", s)]
    return [
        line_chart("Bytes per chunk", sizes, x="tokens", y="bytes per chunk", y_range=(0, _highest(sizes))),
        line_chart("Positions kept", _against_target(run, "kept", stages), y="share that begins a chunk", **share),
        line_chart(
            "Mean probability", _against_target(run, "probability", learned), y="of a boundary", **share,
            note="the ratio loss pulls this and the share kept to one over the target",
        ),
        line_chart("Undecided", near, y="share of positions", **share, note="probability within 0.05 of one half"),
        _overflow(run, stages),
        _ratio_losses(run, learned),
    ]  # fmt: skip


def _both(run: Run, name: str, label: str, stage: int) -> list[Series]:
    """A column in training and on held-out text."""
    colour = 1 + stage % COLOURS
    return [
        Series(label, smooth(run.points(f"routing/{name}", "tokens")), colour),
        Series(f"{label}, held-out", run.points(f"eval/routing/{name}", "tokens"), colour, "dots"),
    ]


def _sizes(run: Run, stages: Sequence[int], stage: int) -> list[Series]:
    def points(rows: Sequence[Mapping[str, float | None]], place: str) -> list[Point]:
        known = ((row.get("tokens"), bytes_per_chunk(row, stages[: stage + 1], place)) for row in rows)
        return [(float(at), sizes[-1]) for at, sizes in known if at is not None and len(sizes) == stage + 1]

    colour = 1 + stage % COLOURS
    training, held_out = points(run.training, ""), points(run.evaluations, "eval/")
    found = [
        Series(f"stage {stage}", smooth(training), colour),
        Series(f"stage {stage}, held-out", held_out, colour, "dots"),
    ]
    if (level := _target(run, stage)) is not None:
        found.append(_level(f"stage {stage}, target", training or held_out, level, colour))
    return found


def _highest(series: Sequence[Series]) -> float | None:
    """Where to cut off curves that overshoot their targets by far at first; None: nowhere."""
    targets = [value for s in series if s.style == "dashed" for _, value in s.points]
    limit = _MOST_OVERSHOOT * max(targets, default=math.inf)
    return limit if any(value > limit for s in series for _, value in s.points) else None


def _against_target(run: Run, name: str, stages: Sequence[int]) -> list[Series]:
    found = []
    for s in stages:
        training, held_out = _both(run, f"{name}_{s}", f"stage {s}", s)
        found += [training, held_out]
        if run.chunking and _learned(run, s):
            level = 1 / run.chunking[s].chunker.expected()
            found.append(_level(f"stage {s}, target", training.points, level, training.colour))
    return found


def _level(name: str, along: Sequence[Point], level: float, colour: int) -> Series:
    ends = [along[0][0], along[-1][0]] if along else []
    return Series(name, [(at, level) for at in ends], colour, "dashed")


def _overflow(run: Run, stages: Sequence[int]) -> str:
    series = [s for stage in stages for s in _both(run, f"overflow_{stage}", f"stage {stage}", stage)]
    if not any(value for s in series for _, value in s.points):
        return ""
    return line_chart(
        "Boundaries without a slot", series, x="tokens", y="share of boundaries", y_range=(0, None), percent=True,
        note="they join the chunk before; a stage's capacities make room",
    )  # fmt: skip


def _ratio_losses(run: Run, stages: Sequence[int]) -> str:
    series, apart = [], False
    for s in stages:
        whole, own = (smooth(run.points(f"routing/ratio_loss_{over}_{s}", "tokens")) for over in ("global", "device"))
        series.append(Series(f"stage {s}, whole batch", whole, 1 + s % COLOURS))
        series.append(Series(f"stage {s}, by device", own, 1 + s % COLOURS, "dashed"))
        apart = apart or any(abs(a - b) > 1e-4 for (_, a), (_, b) in zip(whole, own, strict=False))
    over = {getattr(settings.chunker, "ratio_over", "") for settings in run.chunking} - {""}
    names = {"global": "whole batch", "device": "by device"}
    used = f"; trained: {' and '.join(names[name] for name in sorted(over))}" if over else ""
    same = "" if apart else "; both are the same here"
    note = f"1 at the target{used}{same}"
    return line_chart("Ratio losses", series, x="tokens", y="mean over the interval", note=note)


def size_tile(run: Run) -> tuple[str, str, str] | None:
    """A headline number: (name, value, detail); None for models that do not chunk."""
    stages = stages_of(run)
    held_out = bytes_per_chunk(run.last_evaluation, stages, "eval/")
    sizes = held_out or bytes_per_chunk(run.last, stages)
    if not sizes:
        return None
    each = " \u00d7 ".join(f"{b / a:.2f}" for a, b in zip([1.0, *sizes], sizes, strict=False))
    kept = f"one at {percent(1 / sizes[-1])} of bytes"
    return "bytes per chunk", f"{sizes[-1]:.2f}", f"{each} by stage" if len(sizes) > 1 else kept
