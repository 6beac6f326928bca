"""Every shipped recipe: it loads, is valid, and has the published numbers."""

import ast
import inspect
from pathlib import Path

import pytest

import recipes
from adaptive.account import account, paper_flops_per_token, parameters
from adaptive.recipe import Recipe, difference, list_recipes, load

FOLDER = Path(recipes.__path__[0])
PUBLISHED = [name for name in list_recipes() if not name.endswith(("_tiny", "_bench"))]

# Non-embedding unique parameters, effective layers, layers of the shared block (MoR paper, tables of architectures)
SHAPES = {
    "vanilla_135m": (106_203_456, 30, 30),
    "vanilla_360m": (314_635_200, 32, 32),
    "vanilla_730m": (654_392_832, 26, 26),
    "vanilla_1_7b": (1_610_713_088, 24, 24),
    "recursive2_135m": (56_642_112, 30, 14),
    "recursive_135m": (42_481_728, 32, 10),
    "mor_135m": (42_481_728, 32, 10),
    "recursive2_360m": (167_150_400, 32, 15),
    "recursive_360m": (117_988_800, 32, 10),
    "recursive4_360m": (98_324_160, 34, 8),
    "mor2_360m": (167_150_400, 32, 15),
    "mor_360m": (117_988_800, 32, 10),
    "mor4_360m": (98_324_160, 34, 8),
    "mor_360m_token": (117_988_800, 32, 10),
    "mor_360m_kv_share": (117_988_800, 32, 10),
    "recursive_730m": (251_690_496, 26, 8),
    "mor_730m": (251_690_496, 26, 8),
    "recursive_1_7b": (671_131_648, 26, 8),
    "mor_1_7b": (671_131_648, 26, 8),
    "mor_1_7b_token": (671_131_648, 26, 8),
    "recursive2_1_7b": (872_470_528, 24, 11),
    "mor2_1_7b": (872_470_528, 24, 11),
}

# Steps, warm-up steps, tokens in billions (released configurations)
RELEASED_RUNS = {
    "vanilla_360m": (9438, 57, 19.79),
    "recursive2_360m": (9438, 57, 19.79),
    "recursive_360m": (9438, 57, 19.79),
    "recursive4_360m": (8883, 57, 18.63),
    "mor2_360m": (12619, 86, 26.46),
    "mor_360m": (14161, 86, 29.70),
    "mor_360m_token": (14161, 86, 29.70),
    "mor4_360m": (14216, 86, 29.81),
    "mor_360m_kv_share": (14672, 86, 30.77),
}

# MFLOP per token in the paper's accounting
PAPER_MFLOPS = {
    "vanilla_360m": 833.618,
    "recursive_360m": 833.618,
    "recursive4_360m": 885.719,
    "mor2_360m": 623.493,
    "mor_360m": 555.636,
    "mor_360m_token": 555.636,
    "mor4_360m": 553.452,
    "mor_360m_kv_share": 536.248,
    "vanilla_135m": 309.658,
    "recursive_135m": 330.301,
    "mor_135m": 216.596,
    "vanilla_730m": 1635.779,
    "mor_730m": 1110.092,
    "vanilla_1_7b": 3422.552,
    "recursive_1_7b": 3707.765,
    "mor_1_7b": 2537.088,
    "mor2_1_7b": 2615.149,
}

# Rows whose printed token count the budget contradicts: tokens in billions that it buys
CONTRADICTED = {"recursive2_1_7b": 20.0, "mor_1_7b_token": 27.0}


def tokens_of(recipe: Recipe) -> int:
    return recipe.train.steps * recipe.train.batch_size * recipe.data.seq_len


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_loads_validates_and_round_trips(name):
    recipe = load(name)
    recipe.validate()
    assert recipe.name == name
    assert recipe.description
    assert Recipe.from_json(recipe.to_json()) == recipe
    family = {"moe": "vanilla", "mor2": "mor", "mor4": "mor"}.get(name.split("_")[0], name.split("_")[0].rstrip("24"))
    assert recipe.model.family == family
    assert ("moe" in name) == (recipe.model.moe.router != "none")


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_file_has_a_header_and_no_logic(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    header = ast.get_docstring(tree) or ""
    for part in (f"python -m adaptive.train --recipe {name}", "Numbers:", "Expect:", "Cost:"):
        assert part in header
    assert not any(isinstance(node, ast.If | ast.For | ast.While | ast.Try) for node in ast.walk(tree))


def test_the_tables_cover_every_published_recipe():
    assert set(SHAPES) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_is_the_published_one(name):
    model = load(name).model
    assert (parameters(model).unique, model.num_layers, model.block_size) == SHAPES[name]
    assert model.vocab_size == 49152
    assert model.tie_embeddings


@pytest.mark.parametrize(("name", "total"), [
    ("vanilla_135m", 134_515_008), ("vanilla_360m", 361_821_120), ("vanilla_730m", 729_890_304),
    ("vanilla_1_7b", 1_711_376_384),
])  # fmt: skip
def test_total_parameters_are_the_published_ones(name, total):
    assert parameters(load(name).model).total == total


def test_a_linear_expert_choice_router_is_one_vector_per_recursion():
    assert parameters(load("mor_360m").model).routers == 3 * 960


def test_the_29_layer_shape_of_the_sharing_ablation():
    assert parameters(load("recursive_135m").with_("model.num_layers=29").model).unique == 38_941_632


@pytest.mark.parametrize("name", RELEASED_RUNS)
def test_steps_are_the_released_ones(name):
    recipe = load(name)
    steps, warmup, billions = RELEASED_RUNS[name]
    assert (recipe.train.steps, recipe.schedule.warmup_steps) == (steps, warmup)
    assert round(tokens_of(recipe) / 1e9, 2) == billions


@pytest.mark.parametrize("name", PAPER_MFLOPS)
def test_flops_per_token_in_the_papers_accounting(name):
    recipe = load(name)
    assert paper_flops_per_token(recipe.model, recipe.data.seq_len) / 1e6 == pytest.approx(PAPER_MFLOPS[name], abs=6e-4)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if load(name).published.flops])
def test_budget_and_steps_agree(name):
    recipe = load(name)
    bought = recipe.published.flops / paper_flops_per_token(recipe.model, recipe.data.seq_len)
    assert recipe.train.steps == pytest.approx(bought / (1024 * 2048), abs=1.01)
    assert recipe.train.batch_size * recipe.data.seq_len == 1024 * 2048


@pytest.mark.parametrize("name", PUBLISHED)
def test_tokens_are_the_printed_ones(name):
    recipe = load(name)
    billions = tokens_of(recipe) / 1e9
    if name in CONTRADICTED:
        assert round(billions, 1) == CONTRADICTED[name]
        assert "budget buys" in recipe.published.notes
    else:
        # Some tables print one decimal, others whole billions (26.46 as 27).
        decimals = recipe.published.source.endswith("(isoFLOP)")
        assert billions == pytest.approx(recipe.published.tokens / 1e9, abs=0.051 if decimals else 0.55)


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_settings_are_the_published_ones(name):
    recipe = load(name)
    o = recipe.optimizer
    assert (o.learning_rate, o.beta1, o.beta2, o.eps, o.weight_decay, o.clip_norm) == (3e-3, 0.9, 0.95, 1e-8, 0.1, 1.0)
    assert (recipe.data.source, recipe.data.seq_len, recipe.data.shuffle) == ("huggingface", 2048, False)
    assert recipe.data.cross_document
    assert recipe.schedule.kind == ("cosine" if name == "recursive2_135m" else "trapezoid")


def test_plain_mor_360m_is_the_papers_chosen_design():
    model, router = load("mor_360m").model, load("mor_360m").model.router
    assert (model.recursions, model.sharing, model.kv) == (3, "middle_cycle", "per_recursion")
    assert (router.kind, router.network, router.activation, router.alpha) == (
        "expert_choice", "linear", "sigmoid", 0.1
    )  # fmt: skip
    assert (router.sampling, router.aux_coefficient, router.z_coefficient) == ("aux_loss", 0.001, 0.0)
    assert model.capacities(2048) == (2048, 1365, 682)
    changed = [line.split(":")[0] for line in difference(load("mor_360m"), load("mor_360m_kv_share"))]
    assert changed == ["model.kv", "train.steps"]


def test_token_choice_is_the_papers_chosen_design():
    router = load("mor_360m_token").model.router
    assert (router.activation, router.alpha, router.balancing, router.balance_coefficient) == (
        "softmax", 1.0, "loss", 0.1
    )  # fmt: skip


def test_the_tiny_family_has_one_effective_depth():
    family = [load(f"{kind}_tiny") for kind in ("vanilla", "recursive", "mor")]
    assert len({r.model.num_layers for r in family}) == 1
    assert len({(r.train, r.data, r.optimizer, r.schedule) for r in family}) == 1
    routed, looped, plain = (account(r.model, r.data.seq_len).forward_flops for r in reversed(family))
    assert routed < looped == plain


def test_bases_import_no_more_than_recipes_and_arithmetic():
    import recipes.bases as bases

    modules = {n.module for n in ast.walk(ast.parse(inspect.getsource(bases))) if isinstance(n, ast.ImportFrom)}
    assert modules == {"adaptive.account", "adaptive.recipe"}
