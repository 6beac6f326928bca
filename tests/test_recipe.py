"""The recipe tree: overrides, messages, JSON, differences, validation."""

import dataclasses
import json
import subprocess
import sys
from typing import Literal

import pytest

from adaptive.errors import RecipeError
from adaptive.layers.moe.routers import top_p
from adaptive.models.depth import token_choice
from adaptive.recipe import (
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
from adaptive.settings import expected, hints, is_choice, leaf_kinds, nodes, parse, read, show

TINY = load("mor_tiny")


def message(call, *args, **kwargs) -> str:
    with pytest.raises(RecipeError) as raised:
        call(*args, **kwargs)
    return str(raised.value)


def test_a_refused_setting_starts_no_back_end():
    code = """
import jax, adaptive.errors, adaptive.recipe, adaptive.account
from jax._src import xla_bridge
recipe = adaptive.recipe.load("mor_360m")
recipe.validate()
for wrong in ("model.body.depth=expert", "model.body.core.blocks.0.mixer.kv_heads=4"):
    try:
        recipe.with_(wrong).validate()
    except adaptive.errors.RecipeError:
        continue
    raise SystemExit("not refused")
raise SystemExit(bool(xla_bridge._backends))
"""
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
        ("model.body.order=sequence", "model.body.order", "sequence"),
        ("model.body.depth.capacities=1,0.5,0.25", "model.body.depth.capacities", (1.0, 0.5, 0.25)),
        ("model.body.core.blocks.0.mixer.heads=8", "model.body.core.blocks.0.mixer.heads", 8),
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


def test_a_node_is_set_by_the_name_of_a_member_and_has_its_defaults():
    routed = TINY.with_("model.body.depth=token_choice")
    assert leaves(routed)["model.body.depth"] == "token_choice"
    assert routed.model.body.depth == token_choice.Settings()
    assert routed.model.body.core == TINY.model.body.core
    ends = TINY.with_("model.body.coda=none", "model.body.core.blocks.0.feed_forward=none").model.body
    assert (ends.coda, ends.core.blocks[0].feed_forward) == (None, None)
    assert ends.prelude == TINY.model.body.prelude


def test_nodes_are_set_before_what_is_below_them_whatever_the_order():
    given = (
        "model.body.core.blocks.0.feed_forward.router.p=0.5", "model.body=recursive",
        "model.body.core.blocks.0.feed_forward.router=top_p", "model.body.core.blocks.0.feed_forward=experts",
    )  # fmt: skip
    recipe = load("vanilla_tiny").with_(*given)
    assert recipe == load("vanilla_tiny").with_(*reversed(given))
    assert recipe.model.body.core.blocks[0].feed_forward.router == top_p.Settings(p=0.5)
    recipe.validate()


def test_large_whole_numbers_are_exact():
    assert parse(int, "9007199254740993", where="x") == 9007199254740993
    assert parse(int, "1e9", where="x") == 10**9


def test_every_leaf_type_of_the_tree_can_be_set_from_its_printed_form():
    for path, kind in setting_kinds(TINY).items():
        value = leaves(TINY)[path]
        text = value if isinstance(value, str) else show(value)
        parsed = parse(kind, text, where=path)
        if is_choice(kind):
            parsed = parsed if parsed is None else parsed.kind() if hasattr(parsed, "kind") else True
        assert parsed == value
        assert expected(kind)


@dataclasses.dataclass(frozen=True)
class _Odd:
    maybe: int | None = None
    modes: Literal["a", "b"] | None = None
    counts: tuple[int, ...] = ()


def test_optional_and_integer_tuples():
    kinds = leaf_kinds(_Odd())
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
        ("hidden=2", ["model.body.core.blocks.0.feed_forward.hidden"]),
        ("optim.beta2=2", ["optimizer.beta2"]),
        ("zzzqq=1", ["settings are in model, objective, data, optimizer"]),
        ("train.steps=abc", ["train.steps=abc", "a whole number"]),
        ("train.steps=1.5", ["a whole number", "not a fraction"]),
        ("train.steps=1e999999999", ["a whole number"]),
        ("train.steps=nan", ["a whole number"]),
        ("optimizer.beta1=nan", ["a number"]),
        ("optimizer.eps=1/2", ["a number", "decimal"]),
        ("model.tie_embeddings=yes", ["true or false"]),
        ("model.body.depth=expert_chioce", ["one of all, expert_choice,", "did you mean expert_choice"]),
        ("model.body.depth.sampling=aux", ["one of aux_loss, aux_router, none"]),
        ("model.body.depth.balance_coefficient=1", ["model.body.depth=expert_choice has no", "; token_choice has"]),
        ("model.body.stack.repeats=3", ["model.body=recursive has no stack; plain has"]),
        ("model.body.core.blocks.1.repeat=2", ["model.body.core.blocks has 1, numbered from 0"]),
        ("model.body.core.blocks.first.repeat=2", ["model.body.core.blocks has 1, numbered from 0"]),
        ("model.body.coda=false", ["model.body.coda=false", "true", "none"]),
        ("data.weights=1,x", ["numbers separated by commas"]),
        ("model.body.core=plain", ["model.body.core is a group of settings", "blocks.0, repeats"]),
        ("train.steps.x=1", ["train.steps is a single value"]),
        ("train.steps", ["name=value"]),
        ("=3", ["name=value"]),
        ("data=fineweb", ["embedded", "fineweb_edu", "data.source=files data.paths=PATH"]),
        ("name=other", ["no setting"]),
        ("published.tokens=3", ["no setting"]),
    ],
)
def test_refused_overrides_say_what_would_be_right(override, parts):
    text = message(TINY.with_, override)
    for part in parts:
        assert part in text


def test_what_is_below_nothing_says_so():
    alone = TINY.with_("model.body.coda=none", "model.body.core.blocks.0.feed_forward=none")
    assert "model.body.coda is none" in message(alone.with_, "model.body.coda.repeats=2")
    text = message(alone.with_, "model.body.core.blocks.0.feed_forward.hidden=2")
    assert "feed_forward is none; it can be one of dense, experts" in text


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


OWN = """
from dataclasses import replace
from adaptive.recipe import Recipe, load

def recipe() -> Recipe:
    return replace(load("mor_tiny"), name="")
"""


def test_a_recipe_may_be_any_python_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    assert load(str(path)) == dataclasses.replace(TINY, name="mine")
    path.write_text("recipe = 3")
    assert "has no recipe: a function recipe()" in message(load, str(path))
    assert "there is no such file" in message(load, str(tmp_path / "other.py"))


def test_a_saved_recipe_can_be_loaded(tmp_path):
    path = tmp_path / "recipe.json"
    changed = TINY.with_("train.steps=7", "model.body.depth.capacities=1,0.5,0.25")
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
        (lambda t: t["train"].update(remat="all"), ["none, attention, dots, layer"]),
        (lambda t: t["data"].update(paths="english"), ["names separated by commas"]),
        (lambda t: t.update(model=3), ["recipe.json.model is 3", "an object"]),
        (lambda t: t["model"]["body"].update(kind="recusrive"), ["recipe.json.model.body=recusrive", "recursive"]),
        (lambda t: t["model"]["body"].pop("kind"), ['recipe.json.model.body lacks its "kind"']),
        (lambda t: t["model"]["body"]["core"]["blocks"][0].pop("repeat"), ["model.body.core.blocks.0 lacks repeat"]),
        (lambda t: t.update(format_version=99), ["format 99", "update adaptive"]),
        (lambda t: t.update(format_version=3), ["format 3", "written before a model's settings became a tree"]),
        (lambda t: t.pop("format_version"), ["no format_version"]),
    ],
)
def test_saved_recipes_are_read_strictly(change, parts):
    text = message(Recipe.from_json, _changed(change))
    for part in parts:
        assert part in text


def test_a_recipe_that_counts_batches_of_an_evaluation_is_read():
    def older(tree):
        del tree["eval"]["rows"]
        tree["eval"]["batches"] = 3

    read = Recipe.from_json(_changed(older))
    assert read == TINY.with_(f"eval.rows={3 * TINY.train.batch_size}")


def test_what_a_recipe_did_not_say_before_it_could_is_what_was_done():
    def older(tree):
        del tree["train"]["auxiliary_over"], tree["train"]["frozen"], tree["init"]

    assert Recipe.from_json(_changed(older)) == TINY.with_("train.auxiliary_over=micro_batch")


@pytest.mark.parametrize("name", ["mor_tiny", "moe_tc_tiny", "hnet_mor_tiny"])
def test_what_recipes_had_before_can_be_read(name):
    for path, node in nodes(load(name), "recipe"):
        kinds = hints(type(node))
        for field in dataclasses.fields(node):
            if "before" in field.metadata:
                read(kinds[field.name], field.metadata["before"], where=f"{path}.{field.name}")


def test_malformed_json_names_file_and_line():
    assert "w/recipe.json, line 2" in message(Recipe.from_json, '{\n"a" 3}', where="w/recipe.json")


@pytest.mark.parametrize("overrides", [
    (), ("model.body.coda=none",), ("model.body.core.blocks.0.feed_forward=experts",),
    ("model.body=hnet", "model.body.inner=recursive"),
])  # fmt: skip
def test_json_keeps_every_field(overrides):
    recipe = dataclasses.replace(TINY, published=Published("r", "s", 1e9, 2e18, "n")).with_(*overrides)
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


def test_difference_of_trees_of_another_shape():
    other = TINY.with_("model.body.depth=all", "model.body.coda=none")
    lines = difference(TINY, other)
    assert "model.body.depth: expert_choice -> all" in lines
    assert "model.body.depth.alpha: 0.1 -> (absent)" in lines
    assert "model.body.depth.loop: (absent) -> false" in lines
    assert "model.body.coda: true -> none" in lines
    assert len(difference(other, TINY)) == len(lines)


SHARED_WORKDIR = {
    "data.prefetch", "data.workers", "data.cache_dir", "train.device_batch_size", "train.remat", "train.loss_chunk",
    "train.max_bad_steps", "train.start_timeout_s", "train.step_timeout_s", "train.shutdown_timeout_s",
    "train.repeat_every",
}  # fmt: skip


@pytest.mark.parametrize("name", ["mor_tiny", "hnet_moe_tiny"])
def test_identity_is_every_setting_but_a_short_list(name):
    """Each leaf in turn: a new one belongs to the run's identity until it is listed here."""
    recipe = load(name)
    for path, kind in setting_kinds(recipe).items():
        free = path.partition(".")[0] in ("mesh", "eval", "checkpoint", "log") or path in SHARED_WORKDIR
        text = _other_value(kind, leaves(recipe)[path])
        if text is None:
            continue
        other = recipe.with_(f"{path}={text}")
        assert path in difference(recipe, other)[0]
        assert (identity_difference(recipe, other) == []) == free, path


def _other_value(kind, value) -> str | None:
    """Another value as an override spells it; None of a node that can be one thing alone."""
    if is_choice(kind):
        now = {None: "none", True: "true"}.get(value, value)
        others = [text for text in expected(kind).removeprefix("one of ").split(", ") if text != now]
        return others[0] if others else None
    if kind is bool:
        return str(not value).lower()
    if isinstance(value, int | float):
        return str(value + 1)
    if isinstance(value, tuple):
        return "7" if value != ("7",) else "8"
    return next((str(v) for v in getattr(kind, "__args__", ()) if v != value), f"{value}x")


def test_describe_marks_what_differs_from_the_file():
    lines = describe(TINY.with_("train.steps=5")).splitlines()
    marked = [line for line in lines if line.startswith("*")]
    assert len(marked) == 1
    assert "steps" in marked[0] and f"(recipe: {TINY.train.steps})" in marked[0]
    for path in leaves(TINY):
        assert any(line[2:].split()[:1] == [path.rpartition(".")[2]] for line in lines), path


def test_describe_shows_the_tree():
    lines = [" ".join(line[4:].split()) for line in describe(TINY).splitlines() if line.startswith("    ")]
    first = lines.index("body recursive")
    assert lines[first : first + 5] == ["body recursive", "prelude", "blocks.0", "mixer attention", "heads 4"]
    marked = [line for line in describe(TINY.with_("model.body.depth=token_choice")).splitlines() if line[:1] == "*"]
    assert " ".join(marked[0].split()) == "* depth token_choice (recipe: expert_choice)"
    assert any(line.split()[1] == "balance_coefficient" for line in marked)


def test_describe_a_recipe_that_has_no_file():
    assert "*" not in describe(dataclasses.replace(TINY, name="mine"))
    assert "*" in describe(dataclasses.replace(TINY.with_("train.steps=5"), name="mine"), filed=TINY)


# Validation


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.steps=0"], ["train.steps=0", "at least 1"]),
        (["train.batch_size=0"], ["train.batch_size"]),
        (["train.device_batch_size=-1"], ["train.device_batch_size"]),
        (["data.seq_len=1"], ["data.seq_len=1", "at least 2"]),
        (["schedule.warmup_steps=-1"], ["schedule.warmup_steps"]),
        (["schedule.decay_fraction=1.5"], ["at least 0 and at most 1"]),
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
        (["train.loss_chunk=1000", "data.seq_len=2147483647"], ["nearest that does: 1;"]),
        (["train.loss_chunk=1000", "data.seq_len=2147483648"], ["data.seq_len=2147483648: must be at least 2 and"]),
        (["eval.selection=top"], ["topk, threshold"]),
        (["eval.selection="], ["topk, threshold"]),
        (["data.validation_every=1"], ["data.validation_every=1", "at least 2"]),
        (["data.boundaries=words"], ["data.boundaries=words", "only the chunker words"]),
        (["model.body.recursions=0"], ["model.body.recursions=0", "at least 1"]),
        (["model.body.depth.capacities=0.5,0.75,1"], ["must not increase", "1,0.75,0.5"]),
        (
            ["model.body.keys_values=shared", "model.body.depth.capacities=0.5,0.5,0.5"],
            ["keys_values=shared", "must be 1"],
        ),
        (["model.body.core.blocks.0.mixer.kv_heads=3"], ["blocks.0.mixer.heads=4", "kv_heads can be 1, 2, 4"]),
        (["model.body.depth.temperature=0"], ["model.body.depth.temperature=0", "above 0"]),
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
    assert not {"bases", "dlm_bases", "hnet_bases"} & set(names)


def test_experts_fit_the_mesh():
    routed = load("moe_tc_tiny")
    routed.with_("mesh.expert=4").validate()
    assert "mesh.expert=3 does not divide the 8 experts" in message(routed.with_("mesh.expert=3").validate)
    bounded = routed.with_(
        "mesh.expert_parallel.buffer_factor=2", "model.body.stack.blocks.0.feed_forward.execution=capacity"
    )
    assert "buffer_factor bounds ragged rows" in message(bounded.validate)


def test_the_chunker_words_and_its_data_belong_together():
    assert "needs data.boundaries=words" in message(load("hnet_words_tiny").with_("data.boundaries=none").validate)
