"""A recipe: everything that defines a run, as one tree of frozen dataclasses.

recipes/NAME.py, or any Python file, has a function `recipe() -> Recipe`, or a Recipe of that name; a file in JSON may
state what differs from a base (`adaptive.changes`). Dotted overrides change leaves
(`train.steps=100`) and what a node is (`model.body.depth=token_choice`). What ran is kept, fully resolved, as JSON that
can be run again. No jax back-end is started here.
"""

import contextlib
import dataclasses
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from adaptive import own, settings
from adaptive.changes import flat
from adaptive.data.config import DATA_PRESETS, DataConfig
from adaptive.errors import RecipeError
from adaptive.layers.moe.settings import MoESettings
from adaptive.models import language_model
from adaptive.models.bodies import hnet
from adaptive.objectives import Objective, next_token
from adaptive.optim.config import ScheduleConfig
from adaptive.optim.optimizers import Optimizer, adamw
from adaptive.parallel.config import MeshConfig
from adaptive.paths import local_path
from adaptive.runs.config import CheckpointConfig, InitConfig
from adaptive.settings import nearest, show
from adaptive.training.config import EvalConfig, LogConfig, TrainConfig

FORMAT_VERSION = 4  # from 4 on the model is a tree of parts
SHARED_MODULES = ("bases", "dlm_bases", "hnet_bases")  # modules of recipes/ that hold what families share
ABOUT = ("name", "description", "published")  # fields of a recipe that are no settings
ABSENT = "(absent)"  # a setting that one of two recipes does not have
LONGEST_NAME = 60


@dataclasses.dataclass(frozen=True)
class Published:
    """What a recipe should reproduce, as its source printed it; empty where nothing was published.

    tokens  training tokens of the published run
    flops   its compute budget in FLOPs, in the source's accounting (`adaptive.account.paper_flops_per_token`)
    """

    result: str = ""
    source: str = ""
    tokens: float = 0.0
    flops: float = 0.0
    notes: str = ""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run. `name`, `description` and `published` tell of it; all other fields are settings."""

    name: str
    description: str = ""
    model: language_model.Settings = field(default_factory=language_model.Settings)
    objective: Objective = field(default_factory=next_token.Settings)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: Optimizer = field(default_factory=adamw.Settings)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    init: InitConfig = field(default_factory=InitConfig, metadata={"before": settings.to_tree(InitConfig())})
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    published: Published = field(default_factory=Published)

    def with_(self, *overrides: str) -> "Recipe":
        """A copy with settings replaced, each given as `a.b=value`; `data=NAME` sets what a preset of data.NAME sets.

        Presets come before single settings, and what a node is before what is below it, whatever the order. Raises
        RecipeError for a name that does not exist (with the nearest that do), a value of the wrong type, and a name
        given twice. The result is not validated: settings that belong together may be changed in several calls.
        """
        pairs = [_split(text) for text in overrides]
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                given = " and ".join(text for other, text in pairs if other == name)
                raise RecipeError(f"{name} is given more than once: {given}; keep one")
        return self._with(pairs, settings.parse)

    def with_values(self, changes: Mapping[str, Any]) -> "Recipe":
        """As `with_`, of values as JSON has them; `path.kind` says what the part at `path` is, like `path` itself."""
        known = settings.leaf_kinds(self)  # some settings are called kind themselves
        named = [(name if name in known else name.removesuffix(".kind"), value) for name, value in changes.items()]
        return self._with(named, _from_value)

    def _with(self, pairs: Iterable[tuple[str, Any]], read: Callable[..., Any]) -> "Recipe":
        """A copy with settings replaced; `read(type, value, where=path)` checks each."""
        out = self
        for name, value in sorted(pairs, key=lambda pair: pair[0].count(".")):
            if name == "data":
                out = dataclasses.replace(out, data=dataclasses.replace(out.data, **_preset(value)))
            else:
                out = settings.with_leaf(out, name, read(_kind(out, name), value, where=name))
        return out

    def validate(self) -> None:
        """Raises RecipeError for the first setting or combination that cannot work, as far as no device is needed."""
        _check_name(self.name, "name")
        settings.check_ranges(self)
        self._check_sizes()
        self.model.validate()
        self.objective.check(self.model.vocab_size)
        self.objective.check_model(self.model)
        self.data.validate()
        self.train.validate(self.data.seq_len)
        self.eval.validate()
        self.init.validate()
        self.mesh.validate(self.expert_layers())
        self._check_words()

    def to_json(self) -> str:
        """All fields, resolved, as indented JSON; `from_json` gives back an equal recipe."""
        return json.dumps({"format_version": FORMAT_VERSION, **settings.to_tree(self)}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str, *, where: str = "recipe.json") -> "Recipe":
        """The recipe that `to_json` wrote. `where` names it in messages.

        Raises RecipeError for malformed JSON, another format, fields that are unknown, missing or of another type, and
        what may not be a name.
        """
        try:
            tree = settings.parse_json(text)
        except ValueError as error:
            raise RecipeError(f"{where}, {error}") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("format_version"), int):
            raise RecipeError(f"{where} is not a saved recipe: it has no format_version")
        version = tree.pop("format_version")
        if version < FORMAT_VERSION:
            raise RecipeError(
                f"{where} has recipe format {version}, written before a model's settings became a tree; this "
                f"version reads format {FORMAT_VERSION} alone. Start from the recipe's name and what differs"
            )
        if version > FORMAT_VERSION:
            raise RecipeError(
                f"{where} has recipe format {version}, this version reads {FORMAT_VERSION}; update adaptive to read it"
            )
        try:
            recipe: Recipe = settings.read(Recipe, _renamed(tree), where=where)
        except RecursionError:
            raise RecipeError(f"{where}: its parts are nested too deeply") from None
        _check_name(recipe.name, f"{where}.name")
        return recipe

    def expert_layers(self) -> list[tuple[int, bool | None]]:
        """Of every feed-forward with experts: how many, and whether their rows are ragged (None: not known)."""
        ragged = {"capacity": False, "ragged": True}
        routed = [node for _, node in settings.nodes(self.model, "model") if isinstance(node, MoESettings)]
        return [(node.experts, ragged.get(node.execution)) for node in routed]

    def _check_sizes(self) -> None:
        """Raises RecipeError for a size that no array has: what is computed from several must have 64 bits."""
        for path, value in settings.leaf_values(self.model, "model.").items():
            for size in value if isinstance(value, tuple) else (value,):
                if isinstance(size, int) and abs(size) >= 2**31:
                    raise RecipeError(f"{path}={show(value)}: must be below 2^31")

    def _check_words(self) -> None:
        stages = [stage for stage in self.model.body.stages() if isinstance(stage, hnet.Settings)]
        kinds = [stage.chunker.kind() for stage in stages if stage.chunker.reads == "boundaries"]
        if kinds and self.data.boundaries == "none":
            raise RecipeError(f"the chunker {kinds[0]} needs data.boundaries=words")
        if self.data.boundaries != "none" and not kinds:
            raise RecipeError(f"data.boundaries={self.data.boundaries}: only the chunker words reads it")


def _renamed(tree: dict[str, Any]) -> dict[str, Any]:
    """Saved settings under the names that they have now: eval.batches, each of train.batch_size, became eval.rows."""
    evaluation, train = tree.get("eval"), tree.get("train")
    if not isinstance(evaluation, dict) or "batches" not in evaluation or not isinstance(train, dict):
        return tree
    batches, size = evaluation["batches"], train.get("batch_size")
    if not isinstance(batches, int) or not isinstance(size, int):
        return tree
    others = {name: value for name, value in evaluation.items() if name != "batches"}
    return tree | {"eval": others | {"rows": batches * size}}


def _check_name(name: str, where: str) -> None:
    """Raises RecipeError for a name that could not be that of a file or a folder; empty: the recipe has none yet."""
    if name and name_from(name) != name:
        raise RecipeError(
            f"{where} is {name[: 2 * LONGEST_NAME]!r}: a name has letters, digits, _, - and ., begins with a letter, a "
            f"digit or _, and is at most {LONGEST_NAME} characters long; write {name_from(name)}"
        )


def name_from(text: str) -> str:
    """The text as a recipe's name: that of a folder, on every system."""
    return re.sub(r"[^\w.-]+", "-", text).lstrip("-.")[:LONGEST_NAME] or "recipe"


# Loading


def list_recipes() -> list[str]:
    """Names of all recipes that come with the package, sorted."""
    import adaptive.recipes

    return sorted(m.name for m in pkgutil.iter_modules(adaptive.recipes.__path__) if m.name not in SHARED_MODULES)


def load(name: str) -> Recipe:
    """The recipe of this name that comes with the package, or that of the file NAME: in JSON, saved or a difference
    from another (.json), or in Python (.py).

    Raises RecipeError for an unknown name, with the nearest ones, and for a file that cannot be read.
    """
    if name.endswith(".json"):
        return _from_json_file(local_path(name, "--recipe").resolve(), ())
    if name.endswith(".py"):
        return _from_python(local_path(name, "--recipe"))
    known = list_recipes()
    if name not in known:
        near = nearest(name, known)
        hint = f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(known)}"
        raise RecipeError(
            f"there is no recipe '{name}'; {hint} (--list_recipes shows all; a file of your own ends in .py, a saved "
            "recipe in .json)"
        )
    return importlib.import_module(f"adaptive.recipes.{name}").recipe()


def filed_of(name: str) -> Recipe | None:
    """What `describe` compares the recipe that was loaded as `name` with; None: the recipe of its own name."""
    return None if name.endswith(".json") and not _changes_of(local_path(name, "--recipe")) else load(name)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None


def _changes_of(path: Path) -> dict[str, Any] | None:
    """What a file in JSON says that states a difference from its "base"; None of a whole recipe."""
    with contextlib.suppress(ValueError):  # told where it is read as a whole one
        tree = settings.parse_json(_text_of(path))
        return tree if isinstance(tree, dict) and "format_version" not in tree else None
    return None


def _from_json_file(path: Path, above: tuple[Path, ...]) -> Recipe:
    """above: files whose base this is."""
    changes = _changes_of(path)
    if changes is None:
        return Recipe.from_json(_text_of(path), where=str(path))
    base = changes.pop("base", None)
    if not isinstance(base, str):
        raise RecipeError(
            f'{path} is no recipe: it has neither the "format_version" of a saved one nor a "base", the name or the '
            "path of a recipe from which it differs"
        )
    if path in above:
        raise RecipeError(f"{path} is its own base")
    at = (path.parent / local_path(base, f"{path}: base")).resolve() if base.endswith((".json", ".py")) else None
    found = _from_json_file(at, (*above, path)) if at and at.suffix == ".json" else load(str(at or base))
    told = {name: changes.pop(name, None) for name in ("name", "description")}
    if wrong := next((name for name, text in told.items() if not isinstance(text, str | None)), None):
        raise RecipeError(f"{path}: {wrong} is {told[wrong]!r}: expected text")
    try:
        found = found.with_values(flat(changes, str(path)))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    name, description = told["name"] or name_from(path.stem), told["description"] or f"{found.name}, changed"
    return dataclasses.replace(found, name=name, description=description, published=Published())


def _from_python(path: Path) -> Recipe:
    """The file's `recipe`, or what its `recipe()` returns; without a name of its own it has the file's."""
    made = getattr(own.module_of(path), "recipe", None)
    with own.told(f"recipe() of {path}"):
        recipe = made() if callable(made) else made
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{path} has no recipe: a function recipe() that returns an adaptive.recipe.Recipe, or one itself"
        )
    return recipe if recipe.name else dataclasses.replace(recipe, name=name_from(path.stem))


# Leaves


def setting_kinds(recipe: Recipe) -> dict[str, Any]:
    """Dotted path -> type of every setting of the recipe; of a node that can be several things, their door."""
    return {path: kind for path, kind in settings.leaf_kinds(recipe).items() if _head(path) not in ABOUT}


def leaves(recipe: Recipe) -> dict[str, Any]:
    """Dotted path -> value of every setting of the recipe; of a node that can be several things, its kind."""
    return {path: value for path, value in settings.leaf_values(recipe).items() if _head(path) not in ABOUT}


def difference(a: Recipe, b: Recipe) -> list[str]:
    """The settings that differ, each as "path: value in a -> value in b"; (absent) where only the other has it."""
    before, after = leaves(a), leaves(b)
    paths = [*before, *(path for path in after if path not in before)]

    def shown(values: dict[str, Any], path: str) -> str:
        return show(values[path]) if path in values else ABSENT

    both = [(path, shown(before, path), shown(after, path)) for path in paths]
    return [f"{path}: {old} -> {new}" for path, old, new in both if old != new]


# Settings that may change when a run is resumed: they do not alter the mathematics of any step, only where it is
# computed, how fast, and what is kept and shown of it.
_FREE = (
    "mesh.", "eval.", "checkpoint.", "log.", "data.prefetch", "data.workers", "data.cache_dir",
    "train.device_batch_size", "train.remat", "train.loss_chunk", "train.max_bad_steps", "train.start_timeout_s",
    "train.step_timeout_s", "train.shutdown_timeout_s", "train.repeat_every",
)  # fmt: skip


def identity_difference(a: Recipe, b: Recipe) -> list[str]:
    """As `difference`, for the settings that define a run alone: model, objective, data, optimizer, schedule, steps,
    batch, seed, compute dtype. Two recipes without such a difference may share a workdir."""
    return [line for line in difference(a, b) if not line.startswith(_FREE)]


def describe(recipe: Recipe, filed: Recipe | None = None) -> str:
    """Every setting, nested as the recipe is, as printed by --print_recipe; a star marks what differs from `filed`, by
    default the recipe of this name."""
    if filed is None:
        filed = load(recipe.name) if recipe.name in list_recipes() else recipe
    before = leaves(filed)
    lines = [f"{recipe.name}: {recipe.description}"]
    if recipe.published.result:
        lines.append(f"reproduces: {recipe.published.result} ({recipe.published.source})")
    if recipe.published.notes:
        lines.append(f"notes: {recipe.published.notes}")
    kinds, headed = setting_kinds(recipe), set()
    longest = max(2 * path.count(".") + len(path.rpartition(".")[2]) for path in kinds)
    for path, value in leaves(recipe).items():
        *groups, name = _steps(path)
        if not groups:
            lines.append("")
        for i, group in enumerate(groups):
            if (own := ".".join(groups[: i + 1])) not in headed:
                headed.add(own)
                lines += [""] * (i == 0) + [f"  {'  ' * i}{group}"]
        headed.add(path)
        changed = path not in before or before[path] != value
        was = f"   (recipe: {show(before[path])})" if changed and path in before else ""
        shown = "" if value is True and settings.is_choice(kinds[path]) else show(value)
        label = f"{'  ' * len(groups)}{name}"
        lines.append(f"{'*' if changed else ' '} {label:<{longest}}  {shown}{was}".rstrip())
    return "\n".join(lines)


def _steps(path: str) -> list[str]:
    """The parts of a dotted path, a number together with what it counts: model, body, stack, blocks.0, mixer."""
    steps: list[str] = []
    for part in path.split("."):
        if part.isdecimal() and steps:
            steps[-1] += f".{part}"
        else:
            steps.append(part)
    return steps


def _head(path: str) -> str:
    return path.partition(".")[0]


# Overrides


def _split(override: str) -> tuple[str, str]:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError(f"'{override}' is not a setting; write name=value, as in train.steps=100")
    return name.strip(), text


def _from_value(kind: Any, value: Any, *, where: str) -> Any:
    """A setting as JSON has it; what a part is comes as its name, true or null."""
    if not settings.is_choice(kind):
        return settings.read(kind, value, where=where)
    spelled = {True: "true", None: "none"}.get(value, value) if not isinstance(value, list) else value
    if not isinstance(spelled, str):
        raise RecipeError(f"{where} is {value!r}: expected {settings.expected(kind)}")
    return settings.parse(kind, spelled, where=where)


def _preset(name: str) -> dict[str, Any]:
    if name not in DATA_PRESETS:
        raise RecipeError(
            f"data={name}: there is no such preset; there are {', '.join(DATA_PRESETS)}. "
            f"To read files: data.source=files data.paths={name if Path(name).exists() else 'PATH'}"
        )
    return DATA_PRESETS[name]


def _kind(recipe: Recipe, path: str) -> Any:
    """The type of the setting at `path`; RecipeError where the recipe has none, with what it has."""
    kinds = setting_kinds(recipe)
    if path in kinds:
        return kinds[path]
    if _head(path) in ABOUT:
        raise RecipeError(f"{path} tells of a recipe and is no setting; copy the recipe's file to change it")
    inside = [known for known in kinds if known.startswith(f"{path}.")]
    if inside:
        below = dict.fromkeys(_steps(known[len(path) + 1 :])[0] for known in inside)
        raise RecipeError(f"{path} is a group of settings; set one of its {', '.join(below)}")
    why = next(_reasons(recipe, path), "")
    if not why:
        near = nearest(path, kinds)
        groups = dict.fromkeys(map(_head, kinds))
        why = f"nearest: {', '.join(near)}" if near else f"settings are in {', '.join(groups)}"
    raise RecipeError(f"{path} does not exist; {why} (--print_recipe shows all)")


def _reasons(recipe: Recipe, path: str) -> Iterator[str]:
    """Why there is nothing at `path`, where the way there says it."""
    node: Any = recipe
    done: list[str] = []
    for part in path.split("."):
        at = ".".join(done)
        if isinstance(node, tuple) and node and dataclasses.is_dataclass(node[0]):
            if part not in map(str, range(len(node))):
                yield f"{at} has {len(node)}, numbered from 0"
                return
            node = node[int(part)]
        elif not dataclasses.is_dataclass(node):
            choice = settings.is_choice(kind := setting_kinds(recipe)[at])
            yield f"{at} is none; it can be {settings.expected(kind)}" if choice else f"{at} is a single value"
            return
        elif not hasattr(node, part) or part not in settings.hints(type(node)):
            if isinstance(node, settings.Member):
                yield from _elsewhere(node, at, part)
            return
        else:
            node = getattr(node, part)
        done.append(part)


def _elsewhere(node: settings.Member, at: str, name: str) -> Iterator[str]:
    """Other members of the node's door that have the field `name`."""
    kinds = [kind for kind in node.kinds() if name in settings.hints(node.member(kind))]
    if kinds:
        yield f"{at}={node.kind()} has no {name}; {', '.join(kinds)} {'has' if len(kinds) == 1 else 'have'}"
