"""How the runs behind a page were made."""

from collections.abc import Sequence

from adaptive.sweeps.page import wrapped
from adaptive.sweeps.runs import Outcome
from adaptive.training.report.numbers import compact, duration


def form(runs: str, whole: str, *, quick: bool, missing: Sequence[str]) -> str:
    """A paragraph: of a quick study what its runs are and which is whole, and runs that are not finished; "" where
    there is nothing to say."""
    out = ""
    if quick:
        out = (
            f"**This is the quick form**: {runs}, to see that all parts work. It carries no conclusion. The {whole}, "
            "remains to be run."
        )
    if missing:
        out += f" Not finished, and left out: {', '.join(missing)}."
    return wrapped(out)


def made_of(outcomes: Sequence[Outcome], study: str, *, quick: bool, match: str) -> str:
    """A paragraph: how many runs, what they cost, when, on what, from which code, and the command."""
    starts = [one.start for one in outcomes]
    machines = dict.fromkeys(
        f"{start['devices']} ({start['processor'] or 'unknown'}, {start['cores']} cores), jax {start['jax']}"
        for start in starts
    )
    commits = dict.fromkeys(
        package["commit"][:9] + " with changes" * bool(package["changed"])
        for start in starts
        if (package := start["package"])
    )
    days = dict.fromkeys(sorted(start["time"][:10] for start in starts))
    seconds, flops = sum(one.seconds for one in outcomes), sum(one.flops for one in outcomes)
    options = " --quick" * quick + f" --match {match}" * (match != "compute")
    return wrapped(f"""
        {len(outcomes)} runs, {compact(flops, "FLOP")}, {duration(seconds)} of training, compilation and scoring
        left out, on {" and ".join(days)}: {"; ".join(machines)}; commit
        {", ".join(commits) or "not known"}; `adaptive study {study}{options}`.""")
