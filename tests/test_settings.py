"""Numbers, names and JSON of settings: what cannot be used is refused by its place, with what would be right."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from adaptive.errors import RecipeError
from adaptive.layers.mixers import mamba2
from adaptive.optim.optimizers import muon
from adaptive.recipe import Recipe, difference, identity_difference, load
from adaptive.settings import check_ranges, parse_json

TINY = load("mor_tiny")
DEEP = "[" * 100_000
FIXTURE = Path(__file__).parent / "runs" / "fixtures" / "recipe_4.json"


def message(call, *arguments) -> str:
    with pytest.raises(RecipeError) as raised:
        call(*arguments)
    assert len(str(raised.value)) < 700
    return str(raised.value)


def saved(**groups) -> str:
    """The recipe as JSON, with fields of its groups replaced by text of JSON."""
    tree = json.loads(TINY.to_json())
    marks = {}
    for group, fields in groups.items():
        for name, text in fields.items():
            marks[f'"{group}.{name}"'] = text
            tree[group] = {**tree[group], name: f"{group}.{name}"} if name else f"{group}."
    text = json.dumps(tree, indent=2)
    for mark, value in marks.items():
        text = text.replace(mark, value)
    return text


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"optimizer": {"learning_rate": "NaN"}}, "NaN is no number"),
        ({"train": {"step_timeout_s": "Infinity"}}, "Infinity is no number"),
        ({"optimizer": {"eps": "1e999"}}, "1e999 is no number"),
        ({"train": {"seed": "9" * 5000}}, "999... is no number"),
        (
            {"train": {"seed": "9" * 30}},
            "recipe.json.train.seed is 999999999999999999999999999999: expected a whole number",
        ),
        ({"train": {"seed": "1e3"}}, "recipe.json.train.seed is 1000.0: expected a whole number"),
        ({"data": {"": DEEP + "]" * 100_000}}, "nested too deeply"),
        ({"name": {"": '"../../x"'}}, "letters, digits, _, - and ., begins with"),
        ({"name": {"": '"a/b"'}}, "write a-b"),
        ({"name": {"": f'"{"x" * 100_000}"'}}, "at most 60 characters"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_a_saved_recipe_holds_only_what_can_be_used(groups, says):
    text = message(Recipe.from_json, saved(**groups))
    assert text.startswith("recipe.json") and says in text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.learning_rate=nan", "expected a number that is finite"),
        ("optimizer.eps=-inf", "expected a number that is finite"),
        ("optimizer.eps=1e999", "expected a number"),
        ("train.steps=1e30", "below 2^63"),
        (f"train.steps={'9' * 5000}", "below 2^63"),
        (f"model.body.core.blocks.{'9' * 400}.repeat=1", "has 1, numbered from 0"),
        ("model.body.depth.capacities=1,nan", "numbers separated by commas"),
    ],
    ids=lambda value: value[:30],
)
def test_the_command_line_takes_only_numbers_that_can_be_used(override, says):
    assert says in message(TINY.with_, override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.seed=4294967296", "at least 0 and at most 4,294,967,295"),
        ("train.seed=-1", "at least 0"),
        ("train.steps=2147483648", "at most 2,147,483,647"),
        ("model.width=2147483648", "below 2^31"),
        ("model.body.core.repeats=1e15", "at most 10,000"),
        ("model.body.core.blocks.0.repeat=1e15", "at most 10,000"),
        ("model.body.recursions=1e15", "at most 10,000"),
    ],
)
def test_seeds_steps_and_sizes_fit_their_32_bits(override, says):
    """A seed beyond them would be cut off, or not, as JAX_ENABLE_X64 says; the state counts steps in an i32; so many
    layers would be listed one by one."""
    assert says in message(TINY.with_(override).validate)


def test_the_nearest_width_that_would_do_is_found_at_once():
    mixer = mamba2.Settings(expand=2, head_dim=2**31 - 1)
    assert "nearest width: 2147483647" in message(mixer.check, 100, "mixer")
    assert "nearest width: 96" in message(mamba2.Settings(expand=2, head_dim=64).check, 100, "mixer")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2**63])
def test_a_recipe_in_python_has_finite_numbers(value):
    odd = dataclasses.replace(TINY, log=dataclasses.replace(TINY.log, sample_tokens=value))
    assert "log.sample_tokens=" in message(odd.validate)
    assert "must be finite" in message(check_ranges, dataclasses.replace(TINY.published, tokens=value))


@pytest.mark.parametrize("name", ["..", "a b", "-x", "é/", "a\x1b[2J", "x" * 61])
def test_names_of_recipes_in_python_are_those_of_folders(name):
    assert message(dataclasses.replace(TINY, name=name).validate).startswith("name is ")
    dataclasses.replace(TINY, name="mor-0.1_é").validate()


def test_json_says_where_it_ends():
    for text, says in (
        ('{\n"a" 3}', "line 2: not JSON"),
        ("", "line 1: not JSON"),
        (DEEP, "somewhere: nested too deeply"),
    ):
        with pytest.raises(ValueError, match=says):
            parse_json(text)
    assert parse_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}


def test_a_recipe_that_an_earlier_version_saved_is_read_as_it_ran():
    """`fixtures/recipe_4.json` is hnet_mor_tiny as the first versions of format 4 wrote it; it is never rewritten."""
    old, new = Recipe.from_json(FIXTURE.read_text()), load("hnet_mor_tiny")
    assert (old.schedule.count_from, old.optimizer) == ("zero", new.optimizer)
    differences = difference(old, new)
    assert "schedule.count_from: zero -> one" in differences
    assert identity_difference(old, new) == differences  # a run is not resumed with another of these unnoticed
    assert Recipe.from_json(old.to_json()) == old
    missing = json.loads(FIXTURE.read_text())
    del missing["schedule"]["kind"]  # what was always there is no less needed
    assert "schedule lacks kind" in message(Recipe.from_json, json.dumps(missing))


def test_the_optimizer_is_chosen_by_name():
    recipe = TINY.with_("optimizer=muon", "optimizer.momentum=0.9", "optimizer.beta2=0.99")
    assert recipe.optimizer == muon.Settings(momentum=0.9, beta2=0.99)
    recipe.validate()
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert "muon has" in message(TINY.with_, "optimizer.momentum=0.9")


def test_files_are_suggested_only_where_they_are(tmp_path):
    (tmp_path / "corpus").mkdir()
    assert f"data.paths={tmp_path}/corpus" in message(TINY.with_, f"data={tmp_path}/corpus")
    assert "data.paths=PATH" in message(TINY.with_, "data=embeded")
