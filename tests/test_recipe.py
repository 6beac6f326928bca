"""The recipe tree: overrides, messages, JSON, differences, validation."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from adaptive.errors import RecipeError
from adaptive.overrides import expected, leaf_kinds, parse, read
from adaptive.recipe import (
    FORMAT_VERSION,
    Published,
    Recipe,
    describe,
    difference,
    identity_difference,
    leaves,
    list_recipes,
    load,
    setting_kinds,
)

TINY = load("mor_tiny")


def message(call, *args, **kwargs) -> str:
    with pytest.raises(RecipeError) as raised:
        call(*args, **kwargs)
    return str(raised.value)


ROOT = Path(__file__).resolve().parents[1]


def test_importing_recipes_does_not_import_jax():
    code = (
        "import sys, adaptive.recipe, adaptive.account, adaptive.peaks; adaptive.recipe.load('mor_360m'); "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.steps=100", "train.steps", 100),
        ("train.steps=1e3", "train.steps", 1000),
        ("mesh.data=-1", "mesh.data", -1),
        ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("model.tie_embeddings=false", "model.tie_embeddings", False),
        ("model.router.kind=token_choice", "model.router.kind", "token_choice"),
        ("model.router.capacities=1,0.5,0.25", "model.router.capacities", (1.0, 0.5, 0.25)),
        ("data.paths=a b.txt, c=d.txt", "data.paths", ("a b.txt", "c=d.txt")),
        ("data.weights=", "data.weights", ()),
        ("data.weights=()", "data.weights", ()),
        ("log.sample_prompt=The = ", "log.sample_prompt", "The = "),
    ],
)
def test_override_sets_one_leaf_with_its_type(override, path, value):
    before, after = leaves(TINY), leaves(TINY.with_(override))
    assert after[path] == value
    assert type(after[path]) is type(value)
    assert {p for p in before if before[p] != after[p]} <= {path}


def test_large_whole_numbers_are_exact():
    assert parse(int, "9007199254740993", where="x") == 9007199254740993
    assert parse(int, "1e9", where="x") == 10**9


def test_every_leaf_type_of_the_tree_can_be_set_from_its_printed_form():
    for path, kind in setting_kinds().items():
        value = leaves(TINY)[path]
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        text = text.lower() if kind is bool else text
        assert parse(kind, text, where=path) == value
        assert expected(kind)


@dataclasses.dataclass(frozen=True)
class _Odd:
    maybe: int | None = None
    modes: Literal["a", "b"] | None = None
    counts: tuple[int, ...] = ()


def test_optional_and_integer_tuples():
    kinds = leaf_kinds(_Odd)
    assert parse(kinds["maybe"], "none", where="maybe") is None
    assert parse(kinds["maybe"], "3", where="maybe") == 3
    assert parse(kinds["counts"], "1,2e1", where="counts") == (1, 20)
    assert "whole number, or none" in message(parse, kinds["maybe"], "x", where="maybe")
    assert "one of a, b, or none" in message(parse, kinds["modes"], "c", where="modes")
    assert read(_Odd, {"maybe": None, "modes": "a", "counts": [1]}, where="odd") == _Odd(None, "a", (1,))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stpes=1", ["train.stpes does not exist", "train.steps"]),
        ("steps=1", ["train.steps"]),
        ("lr=1", ["optimizer.learning_rate"]),
        ("fsdp=2", ["mesh.fsdp"]),
        ("hidden=2", ["model.hidden_size"]),
        ("optim.beta2=2", ["optimizer.beta2"]),
        ("zzzqq=1", ["settings are in model, data, optimizer"]),
        ("train.steps=abc", ["train.steps=abc", "a whole number"]),
        ("train.steps=1.5", ["a whole number", "not a fraction"]),
        ("train.steps=1e999999999", ["a whole number"]),
        ("train.steps=nan", ["a whole number"]),
        ("optimizer.beta1=nan", ["a number"]),
        ("optimizer.eps=1/2", ["a number", "decimal"]),
        ("model.tie_embeddings=yes", ["true or false"]),
        ("model.router.kind=expert_chioce", ["one of none, expert_choice, token_choice", "did you mean expert_choice"]),
        ("data.weights=1,x", ["numbers separated by commas"]),
        ("model.router=expert_choice", ["group of settings", "model.router.kind"]),
        ("train.steps.x=1", ["train.steps is a single value"]),
        ("train.steps", ["name=value"]),
        ("=3", ["name=value"]),
        ("data=fineweb", ["embedded", "fineweb_edu", "data.source=files data.paths=fineweb"]),
        ("name=other", ["no setting"]),
        ("published.tokens=3", ["no setting"]),
    ],
)
def test_refused_overrides_say_what_would_be_right(override, parts):
    text = message(TINY.with_, override)
    for part in parts:
        assert part in text


def test_a_name_given_twice_is_refused():
    assert "train.steps is given more than once: 1 and 2" in message(TINY.with_, "train.steps=1", "train.steps=2")


def test_preset_applies_before_single_settings_whatever_the_order():
    a = TINY.with_("data=mixed", "data.tokenizer=hnet-bytes")
    b = TINY.with_("data.tokenizer=hnet-bytes", "data=mixed")
    assert a == b
    assert a.data.paths == ("english", "python", "chinese")
    assert a.data.tokenizer == "hnet-bytes"
    assert a.data.seq_len == TINY.data.seq_len


# Loading


def test_unknown_recipe_names_the_nearest():
    assert "mor_360m" in message(load, "mor_360")
    assert "mor_tiny" in message(load, "mortiny")
    assert "--list_recipes" in message(load, "qqqqqqqq")


def test_a_saved_recipe_can_be_loaded(tmp_path):
    path = tmp_path / "recipe.json"
    changed = TINY.with_("train.steps=7", "model.router.capacities=1,0.5,0.25")
    path.write_text(changed.to_json())
    assert load(str(path)) == changed


def test_an_unreadable_file_is_an_error(tmp_path):
    assert "cannot read" in message(load, str(tmp_path / "absent.json"))
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    assert "bad.json" in message(load, str(tmp_path / "bad.json"))


# JSON


def _changed(change) -> str:
    tree = json.loads(TINY.to_json())
    change(tree)
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t["train"].update(stpes=3), ["recipe.json.train.stpes does not exist", "steps"]),
        (lambda t: t["train"].pop("steps"), ["recipe.json.train lacks steps"]),
        (lambda t: t["train"].update(steps="3"), ["recipe.json.train.steps is '3'", "whole number"]),
        (lambda t: t["train"].update(steps=3.0), ["whole number"]),
        (lambda t: t["train"].update(steps=True), ["whole number"]),
        (lambda t: t["train"].update(remat="all"), ["none, layer, dots"]),
        (lambda t: t["data"].update(paths="english"), ["names separated by commas"]),
        (lambda t: t.update(model=3), ["TransformerConfig"]),
        (lambda t: t.update(format_version=99), ["format 99", "update adaptive"]),
        (lambda t: t.pop("format_version"), ["no format_version"]),
    ],
)
def test_saved_recipes_are_read_strictly(change, parts):
    text = message(Recipe.from_json, _changed(change))
    for part in parts:
        assert part in text


def test_what_an_older_format_lacks_has_its_default():
    tree = json.loads(TINY.to_json())
    older = {**tree, "format_version": 1, "mesh": {name: tree["mesh"][name] for name in ("data", "fsdp", "tensor")}}
    assert Recipe.from_json(json.dumps(older)) == TINY
    assert "lacks expert" in message(Recipe.from_json, json.dumps({**older, "format_version": FORMAT_VERSION}))
    assert "lacks name" in message(Recipe.from_json, json.dumps({k: v for k, v in older.items() if k != "name"}))


def test_malformed_json_names_file_and_line():
    assert "w/recipe.json, line 2" in message(Recipe.from_json, '{\n"a" 3}', where="w/recipe.json")


def test_json_keeps_every_field():
    recipe = dataclasses.replace(TINY, published=Published("r", "s", 1e9, 2e18, "n"))
    assert Recipe.from_json(recipe.to_json()) == recipe


# Differences


def test_difference_names_path_and_both_values():
    other = TINY.with_("train.steps=5", "data.weights=0.5", "log.every=3")
    assert difference(TINY, other) == [
        "data.weights: () -> 0.5",
        f"train.steps: {TINY.train.steps} -> 5",
        f"log.every: {TINY.log.every} -> 3",
    ]
    assert difference(TINY, TINY) == []


SHARED_WORKDIR = {
    "data.prefetch", "data.cache_dir", "train.device_batch_size", "train.remat", "train.loss_chunk",
    "train.max_bad_steps", "train.step_timeout_s",
}  # fmt: skip


def test_identity_is_every_setting_but_a_short_list():
    """Each leaf in turn: a new one belongs to the run's identity until it is listed here."""
    for path, kind in setting_kinds().items():
        free = path.partition(".")[0] in ("mesh", "eval", "checkpoint", "log") or path in SHARED_WORKDIR
        other = TINY.with_(f"{path}={_other_value(kind, leaves(TINY)[path])}")
        assert len(difference(TINY, other)) == 1, path
        assert (identity_difference(TINY, other) == []) == free, path


def _other_value(kind, value):
    if kind is bool:
        return str(not value).lower()
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return "7" if value != ("7",) else "8"
    return next((str(v) for v in getattr(kind, "__args__", ()) if v != value), f"{value}x")


def test_describe_marks_what_differs_from_the_file():
    lines = describe(TINY.with_("train.steps=5")).splitlines()
    marked = [line for line in lines if line.startswith("*")]
    assert len(marked) == 1
    assert "steps" in marked[0] and f"(recipe: {TINY.train.steps})" in marked[0]
    for path in leaves(TINY):
        assert any(line[2:].startswith(path.partition(".")[2] + " ") for line in lines), path


def test_describe_a_recipe_that_has_no_file():
    assert "*" not in describe(dataclasses.replace(TINY, name="mine"))


# Validation


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.steps=0"], ["train.steps=0", "at least 1"]),
        (["train.batch_size=0"], ["train.batch_size"]),
        (["train.device_batch_size=-1"], ["train.device_batch_size"]),
        (["data.seq_len=1"], ["data.seq_len=1", "at least 2"]),
        (["schedule.warmup_steps=-1"], ["schedule.warmup_steps"]),
        (["schedule.decay_fraction=1.5"], ["from 0 to 1"]),
        (["optimizer.beta2=1"], ["below 1"]),
        (["optimizer.clip_norm=0"], ["above 0"]),
        (["mesh.fsdp=0"], ["mesh.fsdp"]),
        (["mesh.expert=2"], ["mesh.expert=2", "no experts"]),
        (["mesh.data=0"], ["mesh.data=0", "-1"]),
        (["mesh.data=-2"], ["mesh.data=-2"]),
        (["data.paths="], ["data.paths is empty"]),
        (["data.weights=1,2"], ["2 numbers for 1 data.paths"]),
        (["data.weights=0"], ["above 0"]),
        (["train.loss_chunk=100"], ["does not divide data.seq_len=256", "128"]),
        (["eval.selection=top"], ["topk, threshold"]),
        (["eval.selection="], ["topk, threshold"]),
        (["model.recursions=4"], ["does not divide the depth", "6"]),
        (["model.router.capacities=0.5,0.75,1"], ["must not increase", "1,0.75,0.5"]),
        (["model.kv=shared", "model.router.capacities=0.5,0.5,0.5"], ["model.kv=shared", "must be 1"]),
        (["model.num_kv_heads=3"], ["num_kv_heads can be 1, 2, 4"]),
        (["model.router.temperature=0"], ["model.router.temperature", "above 0"]),
    ],
)
def test_invalid_recipes_say_what_would_be_right(overrides, parts):
    text = message(TINY.with_(*overrides).validate)
    for part in parts:
        assert part in text


def test_a_small_run_of_a_large_recipe_is_valid():
    load("mor_360m").with_("data=embedded", "train.steps=2", "train.batch_size=1", "data.seq_len=256").validate()


def test_list_is_sorted_and_leaves_out_shared_modules():
    names = list_recipes()
    assert names == sorted(names)
    assert not {"bases", "hnet_bases"} & set(names)


def test_every_setting_is_read_by_the_code():
    """An option that parses and does nothing is worse than a missing one: some module reads each as an attribute."""
    declared = ("config.py", "recipe.py", "overrides.py")
    sources = [p for p in (ROOT / "adaptive").rglob("*.py") if p.name not in declared]
    configs = "\n".join(p.read_text().split("def ", 1)[-1] for p in (ROOT / "adaptive").rglob("config.py"))
    code = "\n".join(p.read_text() for p in sources) + configs
    unread = [path for path in setting_kinds() if not re.search(rf"\.{path.rpartition('.')[2]}\b", code)]
    unread = [path for path in unread if not path.startswith("mesh.")]  # read by the names of the mesh's axes
    unread = [path for path in unread if path != "model.hnet.rotary_dims"]  # with all that `HNetConfig.shape` reads
    assert not unread
