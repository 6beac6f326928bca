"""Is a recursion, an expert or a chunk worth its compute? A ladder of small models of every kind on the embedded text.

Every model has the same depth, 14 layers: a first, twelve in the middle, a last. Recursive ones share the middle
between two, three or four passes; in routed ones (MoR) a pass computes the tokens that a router selects. Mixtures of
experts have eight experts where the plain model has one feed-forward, and use as much of them per token. H-Nets have a
Mamba-2 layer on either side of a transformer on chunks of about four bytes. Every number is our own choice.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from adaptive.account import account, parameters
from adaptive.layers.chunkers import dynamic
from adaptive.layers.moe.routers import expert_choice, token_choice
from adaptive.layers.moe.settings import RouterSettings
from adaptive.models.bodies import hnet, plain
from adaptive.recipe import Recipe
from adaptive.recipes.bases import changed, moe, mor, recursive, steps, tiny, titled, tokens_per_step, transformer
from adaptive.recipes.hnet_bases import attends, on_bytes, repeated, tiny_scans
from adaptive.studies import Form, Study
from adaptive.sweeps.ladder_page import ladder_page
from adaptive.sweeps.ladder_results import Contents
from adaptive.sweeps.page import Page
from adaptive.sweeps.runs import Outcome, Planned
from adaptive.sweeps.shuffled import write_shuffled

SHUFFLED = "shuffled.txt"
HELD_OUT = 20  # every so many documents one
MIDDLE = 12  # layers, which two, three and four passes divide
VOCABULARY = 320


@dataclasses.dataclass(frozen=True)
class Size:
    """A ladder.

    widths      of the stream
    tokens      of the plain model's run, for each unit of width
    amounts     of compute or data that a variant is trained with at every width, as multiples, those above 1 at all but
                the greatest; of variants not named: 1
    variants    names, as `VARIANTS` has them
    controls    of these, those that train on shuffled text as well, at the least width
    more_seeds  of the plain model, for the noise of seeds, at so many of the least widths
    """

    widths: tuple[int, ...]
    tokens: int
    variants: tuple[str, ...]
    amounts: Mapping[str, tuple[float, ...]]
    controls: tuple[str, ...]
    more_seeds: tuple[int, int]


def base(width: int) -> Recipe:
    """The plain model. Learning rates fall with the root of the width, and are the same for all variants."""
    hidden = 8 * math.ceil(width / 3)
    model = transformer(
        layers=MIDDLE + 2, width=width, heads=2, kv_heads=2, head_dim=width // 2, hidden=hidden, vocab_size=VOCABULARY
    )
    return changed(
        dataclasses.replace(tiny(), model=model),
        data={"seq_len": 128, "validation_every": HELD_OUT},
        optimizer={"learning_rate": float(f"{2.5e-3 * math.sqrt(128 / width):.3g}")},
        train={"batch_size": 16},
        eval={"every": 0, "rows": 16, "selection": ("topk",)},
        checkpoint={"every": 500, "keep_last": 1},
        log={"wandb": "disabled", "sample_tokens": 0},
    )


def chunked(recipe: Recipe) -> Recipe:
    """An H-Net: a Mamba-2 layer before and behind chunks of about four bytes, inside six layers half as wide again."""
    width = recipe.model.width
    inner = 3 * width // 2
    side = repeated(tiny_scans(1))
    inside = attends(inner, 8 * math.ceil(inner / 3), heads=3, repeat=6)
    body = hnet.Settings(
        encoder=side,
        chunker=dynamic.Settings(target=4.0),
        inner=plain.Settings(repeated(inside)),
        inner_width=inner,
        decoder=side,
        capacities=(0.44,),
        rate=2.0,
    )
    model = on_bytes(width, body).model
    return dataclasses.replace(recipe, model=dataclasses.replace(model, vocab_size=VOCABULARY))


def _experts(router: RouterSettings) -> Callable[[Recipe], Recipe]:
    return lambda recipe: moe(recipe, router, experts=8, size=4 * math.ceil(recipe.model.width / 3))


VARIANTS: dict[str, Callable[[Recipe], Recipe]] = {
    "vanilla": lambda recipe: recipe,
    "recursive2": lambda recipe: recursive(recipe, 2),
    "recursive3": lambda recipe: recursive(recipe, 3),
    "recursive4": lambda recipe: recursive(recipe, 4),
    "mor2": lambda recipe: mor(recipe, 2),
    "mor3": lambda recipe: mor(recipe, 3),
    "mor4": lambda recipe: mor(recipe, 4),
    "moe_ec": _experts(expert_choice.Settings()),
    "moe_tc": _experts(token_choice.Settings()),
    "hnet": chunked,
}
RECURSIVE = ("recursive2", "recursive3", "recursive4")
FULL = Size(
    widths=(16, 24, 32, 48),
    tokens=31_250,
    variants=tuple(VARIANTS),
    amounts=dict.fromkeys(("vanilla", *RECURSIVE), (0.5, 1.0, 2.0)),
    controls=("vanilla", "mor3", "moe_ec", "hnet"),
    more_seeds=(2, 2),
)
QUICK = Size(
    widths=(16, 32),
    tokens=4_000,
    variants=("vanilla", "recursive2", "recursive4", "mor3", "moe_ec"),
    amounts={"vanilla": (0.5, 1.0)},
    controls=(),
    more_seeds=(2, 1),
)


def planned(size: Size, form: Form, workdir: Path) -> list[Planned]:
    """All runs of a ladder, the cheapest first."""
    runs = [
        _run(variant, width, amount, seed, form, size)
        for variant in size.variants
        for width in size.widths
        for amount in size.amounts.get(variant, (1.0,))
        if amount <= 1 or width < size.widths[-1]
        for seed in range(form.seeds)
    ]
    least = size.widths[0]
    runs += [_run(variant, least, 1.0, 0, form, size, workdir) for variant in size.controls]
    more, at = size.more_seeds
    runs += [_run("vanilla", width, 1.0, form.seeds + i, form, size) for width in size.widths[:at] for i in range(more)]
    return sorted(runs, key=lambda run: run.flops)


def _run(
    variant: str, width: int, amount: float, seed: int, form: Form, size: Size, workdir: Path | None = None
) -> Planned:
    """workdir: where shuffled text is, of a control."""
    first = base(width)
    count = amount * size.tokens * width / tokens_per_step(first)
    recipe = VARIANTS[variant](first)
    if form.match == "compute":
        count *= _flops_per_token(first) / _flops_per_token(recipe)
    name = f"{variant}-w{width}-x{amount:g}-s{seed}" + "-shuffled" * (workdir is not None)
    recipe = changed(
        titled(_of_steps(recipe, max(2, round(count))), name, f"{variant} of the ladder, width {width}"),
        train={"seed": seed},
        data={"shuffle_seed": seed},
    )
    if workdir is not None:
        recipe = changed(recipe, data={"source": "files", "paths": (str((workdir / SHUFFLED).absolute()),)})
    shared, passes = _shared(recipe)
    held = parameters(recipe.model)
    return Planned(name, recipe, {
        "variant": variant, "width": width, "amount": amount, "seed": seed, "control": workdir is not None,
        "once": held.unique + held.embedding + held.head - shared, "shared": shared, "passes": passes,
    })  # fmt: skip


def _of_steps(recipe: Recipe, count: int) -> Recipe:
    return steps(recipe, count, round(0.1 * count))


def _flops_per_token(recipe: Recipe) -> float:
    return account(recipe.model, recipe.data.seq_len).train_flops_per_token


def _shared(recipe: Recipe) -> tuple[int, float]:
    """(parameters of the block that passes share, passes per token by the capacities); (0, 1) of a model without."""
    facts, body = recipe.model.facts(), recipe.model.body
    if facts.recursions < 2:
        return 0, 1.0
    held = parameters(recipe.model)
    counts = body.pass_counts(recipe.data.seq_len)
    passes = sum(counts) / recipe.data.seq_len if counts else float(facts.recursions)
    return (held.effective - held.unique) // (facts.recursions - 1), passes


class Ladder(Study):
    about = "sizes x variants at equal compute: loss against FLOPs, and what a recursion is worth"

    def runs(self, form: Form, workdir: Path) -> list[Planned]:
        return planned(QUICK if form.quick else FULL, form, workdir)

    def prepare(self, workdir: Path) -> None:
        if not (workdir / SHUFFLED).exists():
            write_shuffled(workdir / SHUFFLED)

    def page(self, form: Form, outcomes: Sequence[Outcome], missing: Sequence[str]) -> Page:
        about = (__doc__ or "").partition("\n\n")[2]
        return ladder_page(Contents(about, form.quick, form.match, tuple(outcomes), tuple(missing), HELD_OUT))


STUDY = Ladder()
