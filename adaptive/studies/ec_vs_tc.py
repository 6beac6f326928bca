"""Do experts that choose their tokens pay in a masked-diffusion model, and does capacity that follows the masked share?

EC-DLM (arXiv 2604.01622) says three things: expert choice reaches a loss in half of token choice's time, more experts
per token where few tokens are hidden lower the loss at equal compute, and a trained token-choice model gains by
having its routers replaced. Here are small models of bytes, every number our own choice: three layers of width
48, each with 16 experts of 24 hidden units, 4 of them per token on average, and a shared feed-forward of 48. A
schedule goes from 1 to 7.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive.account import account
from adaptive.layers.feed_forwards import experts as mixture
from adaptive.layers.mixers import attention
from adaptive.layers.moe.routers import expert_choice, token_choice
from adaptive.layers.moe.scheduled import Schedule
from adaptive.layers.moe.settings import RouterSettings
from adaptive.models.bodies import plain
from adaptive.objectives import masked_diffusion
from adaptive.recipe import Recipe
from adaptive.recipes.bases import changed, stack_of, steps, tiny, titled, tokens_per_step, transformer, with_body
from adaptive.retrofitting import retrofitted
from adaptive.runs.load import Trained
from adaptive.studies import Form, Study
from adaptive.sweeps.denoising import scored
from adaptive.sweeps.ec_vs_tc_page import ec_vs_tc_page
from adaptive.sweeps.ec_vs_tc_results import EC, LOW, RETROFIT_PARTS, TC, Contents
from adaptive.sweeps.page import Page
from adaptive.sweeps.runs import Begins, Outcome, Planned, Scored

VOCABULARY, MASK = 320, 258  # of the byte tokenizer
PER_TOKEN, LEAST, MOST, SLACK = 4, 1, 7, 1.2
LATE = 0.5  # of the steps of a run, those of what goes on from it


_WITH_SCHEDULE = ("schedule=linear_reverse", f"k_min={LEAST}", f"k_max={MOST}", f"row_slack={SLACK}")


@dataclasses.dataclass(frozen=True)
class Size:
    """A study.

    layers, width  of the model
    tokens     of a run
    variants   names, as `VARIANTS` has them
    later      names of what goes on from finished runs of token choice
    evaluated  how often the loss is taken along a run
    """

    layers: int
    width: int
    tokens: int
    variants: tuple[str, ...]
    later: tuple[str, ...]
    evaluated: int


def _token_choice(**options: Any) -> token_choice.Settings:
    return token_choice.Settings(experts_per_token=PER_TOKEN, capacity_group="batch", **options)


def _expert_choice(schedule: Schedule) -> expert_choice.Settings:
    static = expert_choice.Settings(experts_per_token=float(PER_TOKEN), score="selected", decode="refuse")
    if schedule == "static":
        return static
    return dataclasses.replace(static, schedule=schedule, k_min=LEAST, k_max=MOST, row_slack=SLACK)


VARIANTS: dict[str, RouterSettings] = {
    TC: _token_choice(),
    EC: _expert_choice("static"),
    "tc_unbalanced": _token_choice(balance_coefficient=0.0),
    "tc_bias": _token_choice(balance_coefficient=0.0, bias=True),
    "tc_1.25": _token_choice(capacity_factor=1.25),
    "tc_1.25_bias": _token_choice(capacity_factor=1.25, balance_coefficient=0.0, bias=True),
    "tc_1.5": _token_choice(capacity_factor=1.5),
    "tc_1.5_unbalanced": _token_choice(capacity_factor=1.5, balance_coefficient=0.0),
    LOW: _expert_choice("linear_reverse"),
    "ec_linear": _expert_choice("linear"),
    "ec_cosine_reverse": _expert_choice("cosine_reverse"),
    "ec_cosine": _expert_choice("cosine"),
    "ec_gaussian": _expert_choice("gaussian"),
    "ec_gaussian_reverse": _expert_choice("gaussian_reverse"),
}
FULL = Size(3, 48, 1_200_000, tuple(VARIANTS), RETROFIT_PARTS, evaluated=12)
QUICK = Size(1, 32, 60_000, (TC, EC, LOW), RETROFIT_PARTS[:2], evaluated=5)


def base(size: Size, router: RouterSettings) -> Recipe:
    """The model with this router, and a rate that is held after its warm-up, so that losses along the way compare.

    Normalised queries and keys and rotary angles that tell neighbours apart are those of the tiny diffusion recipes: a
    model of bytes otherwise learns for long nothing but how often each is.
    """
    routed = mixture.Settings(router, experts=16, expert_size=size.width // 2, shared_size=size.width)
    shape = transformer(
        layers=size.layers, width=size.width, heads=2, kv_heads=2, head_dim=size.width // 2, hidden=size.width,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    whole = stack_of(dataclasses.replace(tiny(), model=shape))
    mixer = attention.Settings(heads=2, kv_heads=2, head_dim=size.width // 2, rope_theta=100.0, qk_norm="head")
    blocks = tuple(dataclasses.replace(one, mixer=mixer, feed_forward=routed) for one in whole.blocks)
    recipe = dataclasses.replace(tiny(), model=shape, objective=masked_diffusion.Settings(mask_id=MASK))
    return changed(
        with_body(recipe, plain.Settings(dataclasses.replace(whole, blocks=blocks))),
        data={"seq_len": 128, "validation_every": 20},
        optimizer={"learning_rate": 2e-3},
        schedule={"kind": "trapezoid", "decay_fraction": 0.2},
        train={"batch_size": 16},
        eval={"rows": 64, "selection": ("topk",)},
        checkpoint={"every": 500, "keep_last": 1},
        log={"wandb": "disabled", "sample_tokens": 0, "every": 10},
    )


def planned(size: Size, form: Form, workdir: Path) -> list[Planned]:
    """All runs, those that begin from others last."""
    runs = [_run(name, seed, form, size) for name in size.variants for seed in range(form.seeds)]
    first = {run.name: run for run in runs}
    later = [_later(part, first[f"{TC}-s{seed}"], workdir, size) for part in size.later for seed in range(form.seeds)]
    return [*sorted(runs, key=lambda run: run.flops), *later]


def _run(name: str, seed: int, form: Form, size: Size) -> Planned:
    recipe, first = base(size, VARIANTS[name]), base(size, VARIANTS[TC])
    count = size.tokens / tokens_per_step(recipe)
    if form.match == "compute":
        count *= _flops_per_token(first) / _flops_per_token(recipe)
    recipe = _seeded(_of_steps(recipe, max(size.evaluated, round(count)), size), f"{name}-s{seed}", seed)
    return Planned(recipe.name, recipe, {"variant": name, "seed": seed, "part": "first"})


def _later(part: str, first: Planned, workdir: Path, size: Size) -> Planned:
    """What goes on from a finished token-choice run for half as many steps: as it is, or with experts that choose."""
    seed, name = first.labels["seed"], f"{part}-s{first.labels['seed']}"
    count = max(size.evaluated, round(LATE * first.recipe.train.steps))
    labels = {"variant": part, "seed": seed, "part": "later"}
    if part == RETROFIT_PARTS[0]:
        recipe = _seeded(_of_steps(first.recipe, count, size), name, seed + 100)
        source = {"run": str(first.folder(workdir).absolute()), "step": first.recipe.train.steps}
        return Planned(name, changed(recipe, init=source), labels, Begins(first.name))
    short = _of_steps(first.recipe, count, size)
    settings: tuple[str, ...] = (
        f"train.steps={count}",
        f"train.seed={seed + 100}",
        f"data.shuffle_seed={seed + 100}",
        f"schedule.warmup_steps={short.schedule.warmup_steps}",
        f"eval.every={short.eval.every}",
    )
    if part == RETROFIT_PARTS[2]:
        at = "model.body.stack.blocks.0.feed_forward.router"
        settings += tuple(f"{at}.{own}" for own in _WITH_SCHEDULE)
    return Planned(name, retrofitted(first.recipe, settings, name), labels, Begins(first.name, settings))


def _seeded(recipe: Recipe, name: str, seed: int) -> Recipe:
    made = titled(recipe, name, f"{name.rpartition('-')[0]} of the study ec_vs_tc")
    return changed(made, train={"seed": seed}, data={"shuffle_seed": seed})


def _of_steps(recipe: Recipe, count: int, size: Size) -> Recipe:
    return changed(steps(recipe, count, round(0.05 * count)), eval={"every": max(1, count // size.evaluated)})


def _flops_per_token(recipe: Recipe) -> float:
    return account(recipe.model, recipe.data.seq_len).train_flops_per_token


class ExpertOrTokenChoice(Study):
    about = "masked diffusion: do experts that choose, and capacity that follows the masked share, pay at equal compute"
    seeds = 3

    def runs(self, form: Form, workdir: Path) -> list[Planned]:
        return planned(QUICK if form.quick else FULL, form, workdir)

    def score(self, trained: Trained, folder: Path) -> Scored:
        return scored(trained, folder)

    def page(self, form: Form, outcomes: Sequence[Outcome], missing: Sequence[str]) -> Page:
        about = (__doc__ or "").partition("\n\n")[2]
        return ec_vs_tc_page(Contents(about, form.quick, form.match, tuple(outcomes), tuple(missing)))


STUDY = ExpertOrTokenChoice()
