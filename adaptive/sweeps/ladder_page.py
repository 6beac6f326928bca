"""The page of a ladder: tables and pictures."""

from collections.abc import Sequence

import numpy as np

from adaptive.sweeps import pictures
from adaptive.sweeps.fits import HUBER, RESAMPLES, Fit, interval
from adaptive.sweeps.ladder_results import (
    BASELINE,
    FAMILIES,
    ORDERINGS,
    PUBLISHED_PHI,
    Contents,
    controls,
    family_of,
    verdicts,
)
from adaptive.sweeps.laws import Curves
from adaptive.sweeps.made_of import form, made_of
from adaptive.sweeps.page import Page, listed, table, wrapped
from adaptive.training.report.numbers import compact

NAME = "ladder"
QUICK = "minutes of training, two widths and few variants"


def ladder_page(c: Contents) -> Page:
    if not c.text:
        nothing = "No run is finished: nothing follows yet."
        return Page(NAME, f"# Ladder\n\n{nothing}\n", {}, [nothing])
    verdict = verdicts(c)
    parts = [
        "# Ladder: is a recursion, an expert or a chunk worth its compute?",
        form(QUICK, f"full ladder, `adaptive study {NAME}`", quick=c.quick, missing=c.missing),
        "## Verdict",
        listed(verdict),
        f"## Loss at {c.shared}",
        *_losses(c),
        "## Orderings of the papers",
        *_orderings(c),
        "## What a recursion is worth",
        *_worth(c),
        "## Loss against compute",
        *_curves(c),
        "## Controls",
        *_controls(c),
        "## How it is made",
        *_how(c),
    ]
    return Page(NAME, "\n\n".join(filter(None, parts)) + "\n", _pictures(c), verdict)


def _widths(c: Contents) -> list[str]:
    return [f"w{width}" for width in c.widths]


def _losses(c: Contents) -> list[str]:
    about = """
        Held-out nats per byte, selected as in generation; in brackets the difference to vanilla in thousandths of a
        nat, with the interval that holds 95 % of resamples (of documents, which are paired, and of seeds). Columns
        are widths of the stream."""
    rows = [["", *_widths(c)], *([name, *(_loss(c, name, width) for width in c.widths)] for name in c.variants)]
    costs = (_costs(c, width) for width in c.widths)
    for label, *cells in zip(("parameters of vanilla", "tokens", "training compute"), *costs, strict=True):
        rows.append([label, *cells])
    return [wrapped(about), table(rows), "![differences to vanilla](PICTURE/against.svg)"]


def _loss(c: Contents, name: str, width: int) -> str:
    cell = c.cells.get((name, width, 1.0))
    if cell is None:
        return "—"
    d = c.difference(name, BASELINE, width) if name != BASELINE else None
    return f"{cell.loss:.4f}" + (f" ({d.thousandths()})" if d else "")


def _costs(c: Contents, width: int) -> tuple[str, str, str]:
    some = [one for one in c.text if one.labels["width"] == width and one.labels["amount"] == 1.0]
    own = next((one for one in some if one.labels["variant"] == BASELINE), None)
    held = own.parameters["unique"] + own.parameters["embedding"] if own else None
    return compact(held), _range([one.tokens for one in some]), _range([one.flops for one in some], "FLOP")


def _range(values: Sequence[float], unit: str = "") -> str:
    low, high = min(values, default=0.0), max(values, default=0.0)
    return compact(low, unit) if high <= 1.03 * low else f"{compact(low, unit)} to {compact(high, unit)}"


def _orderings(c: Contents) -> list[str]:
    words = {-1: "appears", 1: "other way round", 0: "within chance"}
    rows = [["lower < higher loss", "printed in", *_widths(c)]]
    for one in ORDERINGS:
        found = [c.difference(one.lower, one.higher, width) for width in c.widths]
        if any(found):
            told = [f"{words[d.sign]}, {d.thousandths()}" if d else "—" for d in found]
            rows.append([f"{one.lower} < {one.higher}", one.source, *told])
    about = "Differences in thousandths of a nat with 95 % intervals."
    if c.spread.freedom:
        about += f" The noise of seeds in them, {c.spread.share:.2%} of the loss, is that of few runs, taken for all."
    else:
        about += " **No run has a second seed: the noise of seeds is not in the intervals.**"
    return [wrapped(about), table(rows) if len(rows) > 1 else "No pair of these is in this ladder."]


# Fits


def _shown(one: Fit, name: str) -> str:
    low, high = one.interval(name)
    return f"{one[name]:.2f} [{low:.2f}, {high:.2f}]"


def _worth(c: Contents) -> list[str]:
    about = """
        `L = E + A (N_once + r^φ N_rec)^-alpha + B D^-beta` (arXiv 2604.21106), fitted to the runs of a family and of
        vanilla: a shared block of N_rec parameters that is passed r times counts as r^φ N_rec. φ = 1 says that a
        recursion is worth fresh layers, 0 that it is worth nothing. r of MoR is the mean over tokens. N counts all
        parameters but routers, with the embedding table, which is the head."""
    method = f"""
        Variable projection: E, A and B, none below 0, follow from the exponents, which Gauss-Newton finds from a
        grid of starts. Relative residuals count by Huber's rule ({HUBER:g}). Intervals hold 95 % of {RESAMPLES:,}
        resamples of the runs, drawn within each variant."""
    if not c.worths:
        return [wrapped(about), "There are too few runs to fit it."]
    rows = [["family", "φ", "alpha", "beta", "E", "R² of log loss", "runs"]]
    for family, one in c.worths.items():
        cells = [_shown(one, name) for name in ("phi", "alpha", "beta", "E")]
        rows.append([family, *cells, f"{one.r_squared:.4f}", str(one.runs)])
    return [wrapped(about), table(rows), "![worth of a recursion](PICTURE/phi.svg)", wrapped(method)]


def _curves(c: Contents) -> list[str]:
    one, out = c.curves, ["![loss against compute](PICTURE/loss.svg)"]
    if one is None:
        out.append("These runs do not say how steep the curves are, and so not how much compute a variant is worth.")
    else:
        about = f"""
            `L = E + A_v C^-alpha` with one floor, E = {_shown(one, "E")}, and one exponent, alpha =
            {_shown(one, "alpha")}, for all variants; R² of log loss {one.r_squared:.4f}. A variant is then as good
            as vanilla with so many times its compute:"""
        rows = [["variant", "times"], *([name, _times(one, name)] for name in one.law.linear[1:] if name != BASELINE)]
        out += [wrapped(about), table(rows)]
    if (law := c.chinchilla) is not None:
        told = ", ".join(f"{name} = {_shown(law, name)}" for name in ("E", "A", "B", "alpha", "beta"))
        about = f"""
            Vanilla alone, `L = E + A N^-alpha + B D^-beta` with N and D over their geometric means: {told}; R² of
            log loss {law.r_squared:.4f}, {law.runs} runs."""
        out.append(wrapped(about))
    return out


def _times(one: Fit, name: str) -> str:
    """By how much compute the variant's curve is shifted."""
    least = 1e-12
    drawn = (one.drawn(BASELINE) / np.maximum(one.drawn(name), least)) ** (1 / one.drawn("alpha"))
    low, high = interval(drawn)
    return f"{(one[BASELINE] / max(one[name], least)) ** (1 / one['alpha']):.2f} [{low:.2f}, {high:.2f}]"


# What the numbers rest on


def _controls(c: Contents) -> list[str]:
    spread, rows = c.spread, controls(c)
    noise = "No run has a second seed."
    if spread.freedom:
        noise = f"""
            Seeds of the same run differ by {spread.share:.2%} of the loss (standard deviation, pooled over the runs
            that have several; {spread.freedom} degrees of freedom)."""
    if not rows:
        return [wrapped(noise), "No run trained on shuffled text."]
    about = f"""
        Trained and scored on the same text with the characters of each document shuffled. What knows how often each
        character is in its document, and can know nothing else, pays at least {rows[0].least:.4f} nats per byte;
        what pays less reads its targets."""
    told = [[one.variant, one.rule, f"{one.loss:.4f}", "**yes**" if one.below else "no"] for one in rows]
    return [wrapped(noise), wrapped(about), table([["variant", "selection", "nats per byte", "less"], *told])]


def _how(c: Contents) -> list[str]:
    same = """
        Text, held-out documents, rows of 128 bytes, batch, schedule, and the learning rate of a width are the same
        for all variants, and tuned for none. FLOPs are those of training by the account, causal pairs alone."""
    return [wrapped(c.about), wrapped(same), made_of(c.outcomes, NAME, quick=c.quick, match=c.match)]


# Pictures


def _pictures(c: Contents) -> dict[str, str]:
    out = {"loss.svg": _loss_picture(c)}
    if rows := _against(c):
        out["against.svg"] = pictures.whiskers(
            f"Held-out loss less that of vanilla, {c.shared}",
            rows,
            x="nats per byte",
            references=[(0.0, BASELINE)],
            shades=[f"width {width}" for width in c.widths],
        )
    if c.worths:
        found = [
            pictures.Row(name, [pictures.Whisker(one["phi"], *one.interval("phi"))], FAMILIES[name], 0)
            for name, one in c.worths.items()
        ]
        references = [(0.0, "one pass"), (PUBLISHED_PHI, "published"), (1.0, "fresh layers")]
        out["phi.svg"] = pictures.whiskers("φ, the worth of a recursion", found, x="φ", references=references)
    return out


def _against(c: Contents) -> list[pictures.Row]:
    rows = []
    for name in c.variants:
        found = [c.difference(name, BASELINE, width) if name != BASELINE else None for width in c.widths]
        drawn = [pictures.Whisker(*d, 0.35 + 0.65 * (i + 1) / len(c.widths)) for i, d in enumerate(found) if d]
        if drawn:
            rows.append(pictures.Row(name, drawn, FAMILIES[family_of(name)], _mark(c, name)))
    return rows


def _mark(c: Contents, name: str) -> int:
    """Variants of one family have different marks."""
    return [v for v in c.variants if family_of(v) == family_of(name)].index(name) % len(pictures.MARKS)


def _loss_picture(c: Contents) -> str:
    drawn = []
    for name in c.variants:
        some = [one for one in c.text if one.labels["variant"] == name and one.labels["amount"] == 1.0]
        if points := sorted((one.flops, one.loss) for one in some):
            line = _line(c.curves, name, points[0][0], points[-1][0]) or points
            drawn.append(pictures.Curve(name, points, line, FAMILIES[family_of(name)], _mark(c, name)))
    title = f"Held-out loss against training compute, {c.shared} at each width"
    return pictures.curves(title, drawn, x="training compute", x_unit="FLOP", y="nats per byte")


def _line(fitted: Fit | None, name: str, low: float, high: float) -> list[tuple[float, float]]:
    if fitted is None or not isinstance(law := fitted.law, Curves):
        return []
    at = np.geomspace(low, high, 40)
    values = fitted["E"] + fitted[name] * (at / law.unit) ** -fitted["alpha"]
    return list(zip(at.tolist(), values.tolist(), strict=True))
