"""What users bring along: recipe files, partial recipes, parts of their own."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive.errors import RecipeError
from adaptive.models.depth import token_choice
from adaptive.recipe import Published, Recipe, describe, filed_of, leaves, list_recipes, load

ROOT = Path(__file__).resolve().parents[1]
TINY = load("mor_tiny")


def message(call, *args, **kwargs) -> str:
    with pytest.raises(RecipeError) as raised:
        call(*args, **kwargs)
    return str(raised.value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, and imports as they were before the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


# Recipes of the package


def test_folders_of_the_same_names_hide_nothing(tmp_path):
    """In a project that has packages `recipes` and `launch` itself, by every way to run."""
    for name in ("recipes", "launch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported the wrong package')")
    program = """
import sys
sys.path.insert(0, "")
from adaptive.launch import local
from adaptive.recipe import list_recipes, load
from adaptive.recipes.bases import mor
assert load("mor_tiny").name == "mor_tiny" and len(list_recipes()) > 50
assert "recipes" not in sys.modules and "launch" not in sys.modules
print(local.__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
                          env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)})  # fmt: skip
    assert done.stdout == "adaptive.launch.local\n", done.stderr


def test_the_list_holds_recipes_alone():
    assert "mor_tiny" in list_recipes() and not {"bases", "dlm_bases", "hnet_bases"} & set(list_recipes())


# Python files


def test_a_file_may_hold_a_recipe_itself_and_import_its_neighbours(folder):
    (folder / "exp").mkdir()
    (folder / "exp" / "shapes_of_mine.py").write_text("WIDTH = 64\n")
    mine = folder / "exp" / "mine.py"
    mine.write_text(
        "import shapes_of_mine\nfrom adaptive.recipe import load\n"
        "recipe = load('mor_tiny').with_(f'model.width={shapes_of_mine.WIDTH}')\n"
    )
    assert load("exp/mine.py").model.width == 64
    assert load(str(mine)).model.width == 64
    mine.write_text("recipe = 3")
    assert "has no recipe" in message(load, "exp/mine.py")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import not_there", "the recipe mine.py failed: there is no module not_there"),
        ("def recipe(:", "mine.py, line 1: invalid syntax"),
        ("\n1 / 0", "mine.py, line 2: ZeroDivisionError: division by zero"),
        ("def recipe():\n    return [][0]", "recipe() of mine.py failed: "),
        ("from adaptive.recipe import load\nrecipe = load('mor_tiny').with_('train.stpes=1')", "train.stpes does not"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_place(folder, text, says):
    (folder / "mine.py").write_text(text)
    assert says in message(load, "mine.py")


def test_a_file_that_is_called_like_a_module_hides_none(folder):
    (folder / "json.py").write_text("from adaptive.recipe import load\nrecipe = load('mor_tiny')\n")
    assert load("json.py") == TINY
    assert sys.modules["json"] is json


# Differences in JSON


def saved(path: Path, **tree) -> str:
    path.write_text(json.dumps(tree))
    return str(path)


def test_a_difference_is_enough_nested_or_dotted(folder):
    path = saved(
        folder / "mine.json",
        base="mor_tiny",
        model={"width": 64, "body": {"depth": {"kind": "token_choice", "balance_coefficient": 0.3}, "coda": None}},
        schedule={"kind": "constant"},
        **{"train.steps": 7, "model.body.core.blocks": {"0": {"mixer": {"heads": 2}}}, "data.paths": ["python"]},
    )
    recipe = load(path)
    words = (
        "model.width=64", "model.body.depth=token_choice", "model.body.depth.balance_coefficient=0.3",
        "model.body.coda=none", "schedule.kind=constant", "train.steps=7", "model.body.core.blocks.0.mixer.heads=2",
        "data.paths=python",
    )  # fmt: skip
    wanted = TINY.with_(*words)
    assert leaves(recipe) == leaves(wanted)
    assert (recipe.name, recipe.description, recipe.published) == ("mine", "mor_tiny, changed", Published())
    assert Recipe.from_json(recipe.to_json()) == recipe
    marked = [line for line in describe(recipe, filed_of(path)).splitlines() if line.startswith("*")]
    assert not marked  # the file is what it is compared with


def test_a_base_may_be_a_file_beside_it(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "base.json").write_text(TINY.with_("train.steps=9").to_json())
    saved(folder / "deep" / "one.json", base="base.json", name="first", description="of two", **{"data.seq_len": 64})
    recipe = load(saved(folder / "two.json", base="deep/one.json", data="mixed"))
    assert (recipe.train.steps, recipe.data.seq_len, recipe.data.weights) == (9, 64, (0.5, 0.3, 0.2))
    assert (recipe.name, load("deep/one.json").name, load("deep/one.json").description) == ("two", "first", "of two")
    (folder / "mine.py").write_text(
        "from adaptive.recipe import load\nrecipe = load('mor_tiny').with_('train.steps=8')"
    )
    assert load(saved(folder / "three.json", base="mine.py")).train.steps == 8


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"model.width": 64}, 'neither the "format_version" of a saved one nor a "base"'),
        ({"base": "mor_tinny"}, "nearest: mor_tiny"),
        ({"base": "mine.json"}, "mine.json is its own base"),
        ({"base": "gone.json"}, "cannot read the recipe"),
        ({"base": "mor_tiny", "model.widht": 64}, "model.widht does not exist; nearest: model.width"),
        ({"base": "mor_tiny", "model": {"width": "64"}}, "model.width is '64': expected a whole number"),
        ({"base": "mor_tiny", "model.width": 64, "model": {"width": 32}}, "model.width is given more than once"),
        ({"base": "mor_tiny", "model.body.depth": "tokne_choice"}, "did you mean token_choice?"),
        ({"base": "mor_tiny", "model.body.depth": 3}, "model.body.depth is 3: expected one of all"),
        ({"base": "mor_tiny", "model.body.core.blocks": [1]}, "model.body.core.blocks is a group of settings"),
        ({"base": "mor_tiny", "name": 3}, "name is 3: expected text"),
        ({"base": "mor_tiny", "data": "klingon"}, "data=klingon: there is no such preset"),
        ({"base": "mor_tiny", "published.tokens": 3}, "no setting"),
    ],
)
def test_what_is_wrong_in_a_difference_is_told(folder, tree, says):
    assert says in message(load, saved(folder / "mine.json", **tree))


# Parts of one's own

PART = """
import dataclasses

from adaptive.models.depth import token_choice


@dataclasses.dataclass(frozen=True)
class Settings(token_choice.Settings):
    extra: float = 1.5


@dataclasses.dataclass(frozen=True)
class Needy(token_choice.Settings):
    extra: float = dataclasses.field(kw_only=True)


class Plain:
    pass


WRONG = 3
"""
PLACE = "model.body.depth"


@pytest.fixture
def package(folder):
    (folder / "mypkg").mkdir()
    (folder / "mypkg" / "__init__.py").touch()
    (folder / "mypkg" / "routers.py").write_text(PART)
    return folder


def test_a_part_of_ones_own_is_named_by_its_module(package):
    recipe = TINY.with_(f"{PLACE}=mypkg.routers:Settings", f"{PLACE}.extra=2", f"{PLACE}.balance_coefficient=0.2")
    assert isinstance(recipe.model.body.depth, token_choice.Settings)
    assert leaves(recipe)[PLACE] == "mypkg.routers:Settings" and leaves(recipe)[f"{PLACE}.extra"] == 2
    recipe.validate()
    text = recipe.to_json()
    assert json.loads(text)["model"]["body"]["depth"]["kind"] == "mypkg.routers:Settings"
    assert Recipe.from_json(text) == recipe
    nested = saved(
        package / "mine.json", base="mor_tiny", model={"body": {"depth": {"kind": "mypkg.routers:Settings"}}}
    )
    assert load(nested).model.body.depth == type(recipe.model.body.depth)()
    assert "mypkg.routers:Settings" in describe(recipe)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("mypkg.router:Settings", "importing mypkg.router failed: there is no module mypkg.router"),
        ("nopkg.routers:Settings", "there is no module nopkg"),
        ("mypkg.routers:Setings", "has no Setings"),
        ("mypkg.routers:WRONG", "make it a subclass of adaptive.models.depth.Depth"),
        ("mypkg.routers:Plain", "make it a subclass of adaptive.models.depth.Depth"),
        ("adaptive.layers.mixers.attention:Settings", "make it a subclass of adaptive.models.depth.Depth"),
        ("mypkg.routers:Needy", "every field of Needy needs a default"),
        ("mypkg/routers.py:Settings", "is written MODULE:NAME"),
        (":", "is written MODULE:NAME"),
    ],
)
def test_what_is_no_part_is_refused(package, kind, says):
    assert says in message(TINY.with_, f"{PLACE}={kind}")
    tree = json.loads(TINY.to_json())
    tree["model"]["body"]["depth"]["kind"] = kind
    if "Needy" not in kind:
        assert says in message(Recipe.from_json, json.dumps(tree))


def test_a_part_in_the_recipes_own_file_is_found_again(folder):
    (folder / "mine.py").write_text(
        PART + "\nfrom adaptive.recipe import load\n\n\ndef recipe():\n    recipe = load('mor_tiny')\n"
        "    body = dataclasses.replace(recipe.model.body, depth=Settings(extra=4))\n"
        "    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, body=body))\n"
    )
    recipe = load("./mine.py")
    assert leaves(recipe)[PLACE] == "mine:Settings"
    again = Recipe.from_json(recipe.to_json())
    assert leaves(again) == leaves(recipe) and again.model.body.depth.extra == 4


def test_a_router_of_experts_brings_its_own_module(package):
    from adaptive.layers.moe.layer import layer_kind

    (package / "mypkg" / "experts.py").write_text(
        "from adaptive.layers.moe.routers.token_choice import Router, Settings as Base\nimport dataclasses\n"
        "@dataclasses.dataclass(frozen=True)\nclass Settings(Base):\n    pass\nclass Layer: pass\n"
    )
    place = "model.body.core.blocks.0.feed_forward"
    recipe = TINY.with_(f"{place}=experts", f"{place}.router=mypkg.experts:Settings")
    kind = recipe.model.body.core.blocks[0].feed_forward.router.kind()
    assert layer_kind(kind).__module__ == "mypkg.experts"


def test_differences_of_a_part_of_ones_own_are_told(package):
    recipe = TINY.with_(f"{PLACE}=mypkg.routers:Settings")
    other = dataclasses.replace(recipe, name="other").with_(f"{PLACE}.extra=3")
    from adaptive.recipe import identity_difference

    assert identity_difference(recipe, other) == [f"{PLACE}.extra: 1.5 -> 3.0"]
