"""The page of ec_vs_tc: tables and pictures."""

from collections.abc import Sequence

from adaptive.sweeps import pictures
from adaptive.sweeps.denoising import BINS, DRAWS, ROWS
from adaptive.sweeps.ec_vs_tc_results import EC, RETROFIT_PARTS, TC, Contents, verdicts
from adaptive.sweeps.made_of import form, made_of
from adaptive.sweeps.page import Page, listed, table, wrapped
from adaptive.training.report.numbers import compact

NAME = "ec_vs_tc"


def ec_vs_tc_page(c: Contents) -> Page:
    if not c.outcomes:
        nothing = "No run is finished: nothing follows yet."
        return Page(NAME, f"# Expert choice or token choice\n\n{nothing}\n", {}, [nothing])
    verdict = verdicts(c)
    parts = [
        "# Expert choice or token choice, in masked diffusion?",
        form("runs of seconds", f"full study, `adaptive study {NAME}`", quick=c.quick, missing=c.missing),
        "## Verdict",
        listed(verdict),
        "## Does expert choice learn faster?",
        *_first(c),
        "## Does capacity that follows the masked share help?",
        *_by_ratio(c),
        "## Does a retrofit pay?",
        *_later(c),
        "## How it is made",
        *_how(c),
    ]
    return Page(NAME, "\n\n".join(filter(None, parts)) + "\n", _pictures(c), verdict)


def _first(c: Contents) -> list[str]:
    about = f"""
        The bound on held-out text in nats per token, {ROWS} rows with {DRAWS} draws of hidden tokens each, the same
        for all runs; less that of `{TC}`, dropless token choice with a balancing loss, in thousandths of a nat, with
        the interval that holds 95 % of resamples (of rows, which are paired, and of seeds). "Faster" is how many
        times fewer steps it takes to the loss that `{TC}` has before its learning rate falls, mean and extremes over
        seeds. Load is the busiest expert over the mean, dropped the pairs without room, alone the tokens without any
        routed expert; of the last half of training."""
    rows = [["", "loss", f"less {TC}", "faster", "tokens per second", "load", "dropped", "alone"]]
    rows += [_cells(c, name) for name in c.variants("first")]
    return [wrapped(about), table(rows), _noise(c), "![losses along the way](PICTURE/curves.svg)"]


def _cells(c: Contents, name: str) -> list[str]:
    d, speed = (None, None) if name == TC else (c.difference(name, TC), c.speed(name))
    fast = "" if name == TC else "never" if speed is None else f"{speed.steps:.2f} [{speed.low:.2f}, {speed.high:.2f}]"
    told = lambda key, form: _number(c.mean(name, "experts", key), form)  # noqa: E731
    return [
        name, f"{c.cells[name].loss:.4f}", d.thousandths() if d else "", fast, compact(c.mean(name, "tokens_per_s")),
        told("load_max_over_mean", ".2f"), told("dropped_fraction", ".1%"), told("without_expert", ".1%"),
    ]  # fmt: skip


def _noise(c: Contents) -> str:
    if not c.spread.freedom:
        return "**No run has a second seed: the noise of seeds is not in the intervals.**"
    return wrapped(f"The noise of seeds, {c.spread.share:.2%} of the loss, is that of all variants together.")


def _by_ratio(c: Contents) -> list[str]:
    about = f"""
        The mean cross entropy of hidden tokens in rows of which so much is hidden, and the loss less that of `{EC}`,
        whose budget is the same whatever is hidden, in thousandths. All have the same average over uniform shares.
        "Rows" is what the sequences of a step that share rows asked for over their average, as a mean, and how far
        from 1 on average."""
    edges = [f"{i / BINS:.0%} to {(i + 1) / BINS:.0%}" for i in range(BINS)]
    rows = [["", *edges, f"less {EC}", "rows"]]
    names = [name for name in c.variants("first") if name == TC or name.startswith(EC)]
    for name in names:
        d = None if name in (EC, TC) else c.difference(name, EC)
        over, off = (c.mean(name, "experts", key) for key in ("rows_over_average", "rows_deviation"))
        asked = "" if over is None or off is None else f"{over:.3f}, {off:.3f}"
        rows.append(
            [
                name,
                *(_number(c.mean(name, "by_ratio", i), ".3f") for i in range(BINS)),
                d.thousandths() if d else "",
                asked,
            ]
        )
    return [wrapped(about), table(rows), "![differences to static expert choice](PICTURE/schedules.svg)"]


def _later(c: Contents) -> list[str]:
    names = [name for name in RETROFIT_PARTS if name in c.cells]
    if not names:
        return ["No run that goes on from another is finished."]
    about = f"""
        Finished runs of `{TC}` go on for half as many steps, with a new warm-up and a new optimizer's state: as they
        are, or with routers that were replaced (`adaptive convert --to_expert_choice`), no other parameter being
        touched. Before and right after are of the evaluation of training."""
    rows = [["", "before", "right after", "at the end", f"less {names[0]}"]]
    for name in names:
        d = None if name == names[0] else c.difference(name, names[0])
        begun = [_number(c.mean(name, "begun", i), ".4f") for i in (0, 1)]
        rows.append([name, *begun, f"{c.cells[name].loss:.4f}", d.thousandths() if d else ""])
    return [wrapped(about), table(rows), "![along the continuation](PICTURE/retrofit.svg)"]


def _how(c: Contents) -> list[str]:
    same = """
        Text, held-out documents, rows of 128 bytes, batch, schedule and learning rate are the same for all variants,
        and tuned for none. FLOPs are those of training by the account, of the pairs of a token and an expert that are
        asked for; scheduled steps compute up to a fifth more rows than that. Tokens per second are the median of this
        machine, on which experts that choose are multiplied in one batch and tokens that choose group by group."""
    return [wrapped(c.about), wrapped(same), made_of(c.outcomes, NAME, quick=c.quick, match=c.match)]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# Pictures


def _pictures(c: Contents) -> dict[str, str]:
    drawn = [name for name in c.variants("first") if len(c.curve(name)) > 1]
    out = {}
    if drawn:
        out["curves.svg"] = _curves(c, "Held-out loss along training", drawn)
    rows = [
        pictures.Row(name.removeprefix(f"{EC}_"), [pictures.Whisker(*d)], 1, 0)
        for name in c.variants("first")
        if name.startswith(f"{EC}_") and (d := c.difference(name, EC)) is not None
    ]
    if rows:
        title = "Held-out loss less that of a static budget"
        out["schedules.svg"] = pictures.whiskers(title, rows, x="nats per token", references=[(0.0, "static")])
    later = [name for name in RETROFIT_PARTS if len(c.curve(name)) > 1]
    if later:
        out["retrofit.svg"] = _curves(c, "Held-out loss while finished token-choice runs go on", later)
    return out


def _curves(c: Contents, title: str, names: Sequence[str]) -> str:
    colour = lambda name: 0 if name.startswith(TC) else 2 if name == EC else 1  # noqa: E731
    kinds: dict[int, list[str]] = {}
    drawn = []
    for name in names:
        same = kinds.setdefault(colour(name), [])
        same.append(name)
        points = c.curve(name)
        drawn.append(pictures.Curve(name, points[-1:], points, colour(name), (len(same) - 1) % len(pictures.MARKS)))
    return pictures.curves(title, drawn, x="training compute", x_unit="FLOP", y="nats per token")
