"""A recipe: everything that defines a run, as one tree of frozen dataclasses.

recipes/NAME.py has a function `recipe() -> Recipe`. Dotted overrides change leaves (`train.steps=100`), and what ran is
kept, fully resolved, as JSON that can be run again. Nothing here imports jax.
"""

import dataclasses
import importlib
import json
import math
import pkgutil
from dataclasses import field
from pathlib import Path
from typing import Any

from adaptive.data.config import DATA_PRESETS, DataConfig
from adaptive.errors import RecipeError
from adaptive.models.config import TransformerConfig
from adaptive.optim.config import OptimizerConfig, ScheduleConfig
from adaptive.overrides import leaf_kinds, leaf_values, nearest, parse, read, with_leaf
from adaptive.parallel.config import MeshConfig
from adaptive.runs.config import CheckpointConfig
from adaptive.training.config import EvalConfig, LogConfig, TrainConfig

FORMAT_VERSION = 3  # 1: before experts, 2: before H-Net; the settings that these lack had what is now their default
SHARED_MODULES = ("bases", "hnet_bases")  # modules of recipes/ that hold what families share


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
    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    published: Published = field(default_factory=Published)

    def with_(self, *overrides: str) -> "Recipe":
        """A copy with settings replaced, each given as `a.b=value`; `data=NAME` sets what a preset of data.NAME sets.

        Presets are applied before single settings, whatever the order. Raises RecipeError for a name that does not
        exist (with the nearest that do), a value of the wrong type, and a name given twice. The result is not
        validated: settings that belong together may be changed in several calls.
        """
        pairs = [_split(text) for text in overrides]
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                given = " and ".join(text for other, text in pairs if other == name)
                raise RecipeError(f"{name} is given more than once: {given}; keep one")
        out = self
        for name, text in sorted(pairs, key=lambda pair: pair[0] != "data"):
            if name == "data":
                out = dataclasses.replace(out, data=dataclasses.replace(out.data, **_preset(text)))
            else:
                out = with_leaf(out, name, parse(_kind(name), text, where=name))
        return out

    def validate(self) -> None:
        """Raises RecipeError for the first setting or combination that cannot work, as far as no device is needed."""
        for path, value in leaves(self).items():
            _check_range(path, value)
        self.model.validate()
        _check_combinations(self)

    def to_json(self) -> str:
        """All fields, resolved, as indented JSON; `from_json` gives back an equal recipe."""
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str, *, where: str = "recipe.json") -> "Recipe":
        """The recipe that `to_json` wrote. `where` names it in messages.

        Settings that a file of an older format lacks have their defaults. Raises RecipeError for malformed JSON, a
        newer format, and fields that are unknown, missing or of another type.
        """
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{where}, line {error.lineno}: not JSON ({error.msg})") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("format_version"), int):
            raise RecipeError(f"{where} is not a saved recipe: it has no format_version")
        version = tree.pop("format_version")
        if not 1 <= version <= FORMAT_VERSION:
            newer = "; update adaptive to read it" if version > FORMAT_VERSION else ""
            raise RecipeError(f"{where} has recipe format {version}, this version reads 1 to {FORMAT_VERSION}{newer}")
        return read(Recipe, tree, where=where, fill=version < FORMAT_VERSION)


def list_recipes() -> list[str]:
    """Names of all recipes in recipes/, sorted."""
    import recipes

    return sorted(m.name for m in pkgutil.iter_modules(recipes.__path__) if m.name not in SHARED_MODULES)


def load(name: str) -> Recipe:
    """The recipe recipes/NAME.py, or the one saved in the file NAME where NAME ends in .json.

    Raises RecipeError for an unknown name, with the nearest ones, and for a file that cannot be read.
    """
    if name.endswith(".json"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the saved recipe {name}: {error}") from None
        return Recipe.from_json(text, where=name)
    known = list_recipes()
    if name not in known:
        near = nearest(name, known)
        hint = f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(known)}"
        raise RecipeError(f"there is no recipe '{name}'; {hint} (--list_recipes shows all; a saved one ends in .json)")
    return importlib.import_module(f"recipes.{name}").recipe()


# Leaves

ABOUT = ("name", "description", "published")  # fields that are no settings


def setting_kinds() -> dict[str, Any]:
    """Dotted path -> type of every setting of a recipe."""
    return {path: kind for path, kind in leaf_kinds(Recipe).items() if path.partition(".")[0] not in ABOUT}


def leaves(recipe: Recipe) -> dict[str, Any]:
    """Dotted path -> value of every setting of a recipe."""
    return {path: value for path, value in leaf_values(recipe).items() if path.partition(".")[0] not in ABOUT}


def difference(a: Recipe, b: Recipe) -> list[str]:
    """The settings that differ, each as "path: value in a -> value in b"."""
    before, after = leaves(a), leaves(b)
    return [f"{p}: {show(before[p])} -> {show(after[p])}" for p in before if before[p] != after[p]]


# Settings that may change when a run is resumed: they do not alter the mathematics of any step, only where it is
# computed, how fast, and what is kept and shown of it.
_FREE = (
    "mesh.", "eval.", "checkpoint.", "log.", "data.prefetch", "data.cache_dir", "train.device_batch_size",
    "train.remat", "train.loss_chunk", "train.max_bad_steps", "train.step_timeout_s",
)  # fmt: skip


def identity_difference(a: Recipe, b: Recipe) -> list[str]:
    """As `difference`, for the settings that define a run alone: model, data, optimizer, schedule, steps, batch, seed,
    compute dtype. Two recipes without such a difference may share a workdir."""
    return [line for line in difference(a, b) if not line.startswith(_FREE)]


def show(value: Any) -> str:
    """A leaf's value as an override spells it; text that is empty or ends in a space in quotes."""
    if isinstance(value, tuple):
        return ",".join(map(show, value)) or "()"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if value and value == value.strip() else f'"{value}"'
    return "none" if value is None else str(value)


def describe(recipe: Recipe) -> str:
    """Every setting in groups, as printed by --print_recipe; a star marks what differs from the recipe's file."""
    try:
        filed = leaves(load(recipe.name))
    except RecipeError:
        filed = leaves(recipe)
    lines = [f"{recipe.name}: {recipe.description}"]
    if recipe.published.result:
        lines.append(f"reproduces: {recipe.published.result} ({recipe.published.source})")
    if recipe.published.notes:
        lines.append(f"notes: {recipe.published.notes}")
    group = ""
    for path, value in leaves(recipe).items():
        head, _, rest = path.partition(".")
        if head != group:
            group = head
            lines += ["", head]
        changed = filed[path] != value
        was = f"   (recipe: {show(filed[path])})" if changed else ""
        lines.append(f"{'*' if changed else ' '} {rest:<30}{show(value)}{was}")
    return "\n".join(lines)


# Overrides


def _split(override: str) -> tuple[str, str]:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError(f"'{override}' is no override; write name=value, as in train.steps=100")
    return name.strip(), text


def _preset(name: str) -> dict[str, Any]:
    if name not in DATA_PRESETS:
        raise RecipeError(
            f"data={name}: there is no such preset; there are {', '.join(DATA_PRESETS)}. "
            f"To read files: data.source=files data.paths={name}"
        )
    return DATA_PRESETS[name]


def _kind(path: str) -> Any:
    kinds = setting_kinds()
    if path in kinds:
        return kinds[path]
    if path.partition(".")[0] in ABOUT:
        raise RecipeError(f"{path} tells of a recipe and is no setting; copy the recipe's file to change it")
    inside = [known for known in kinds if known.startswith(f"{path}.")]
    if inside:
        raise RecipeError(f"{path} is a group of settings; set one of {', '.join(inside)}")
    leaf = next((known for known in kinds if path.startswith(f"{known}.")), None)
    if leaf:
        raise RecipeError(f"{path} does not exist: {leaf} is a single value")
    near = nearest(path, kinds)
    groups = dict.fromkeys(known.partition(".")[0] for known in kinds)
    hint = f"nearest: {', '.join(near)}" if near else f"settings are in {', '.join(groups)}"
    raise RecipeError(f"{path} does not exist; {hint} (--print_recipe shows all)")


# Validation

_AT_LEAST = {
    "model.init_std": 0, "model.router.z_coefficient": 0, "model.router.aux_coefficient": 0,
    "model.router.capacity_warmup_steps": 0, "model.router.balance_coefficient": 0,
    "model.router.bias_update_rate": 0, "model.router.balance_warmup_steps": 0,
    "data.seq_len": 2, "data.validation_every": 2, "data.prefetch": 1, "data.shuffle_seed": 0,
    "optimizer.weight_decay": 0, "schedule.warmup_steps": 0, "mesh.fsdp": 1, "mesh.expert": 1,
    "mesh.tensor": 1, "mesh.expert_parallel.nodes": 1, "mesh.expert_parallel.overlap": 1,
    "train.steps": 1, "train.batch_size": 1, "train.device_batch_size": 0, "train.seed": 0, "train.loss_chunk": 0,
    "train.max_bad_steps": 1, "eval.every": 0, "eval.batches": 0, "checkpoint.every": 0, "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0, "log.every": 1, "log.profile_start": 0, "log.profile_steps": 0, "log.sample_tokens": 0,
}  # fmt: skip
_ABOVE_ZERO = (
    "model.norm_eps", "model.rope_theta", "model.router.temperature", "optimizer.learning_rate", "optimizer.eps",
    "optimizer.clip_norm", "train.step_timeout_s",
)  # fmt: skip
_FRACTIONS = ("schedule.decay_fraction", "schedule.floor")
_BELOW_ONE = ("optimizer.beta1", "optimizer.beta2")
_SELECTIONS = ("topk", "threshold")


def _check_range(path: str, value: Any) -> None:
    least = _AT_LEAST.get(path, -math.inf)
    for wrong, rule in (
        (isinstance(value, int | float) and value < least, f"must be at least {least}"),
        (path in _ABOVE_ZERO and value <= 0, "must be above 0"),
        (path in _FRACTIONS and not 0 <= value <= 1, "must be from 0 to 1"),
        (path in _BELOW_ONE and not 0 <= value < 1, "must be from 0 to below 1"),
    ):
        if wrong:
            raise RecipeError(f"{path}={show(value)}: {rule}")


def _check_combinations(r: Recipe) -> None:
    _check_stage_rates(r)
    if r.mesh.data == 0 or r.mesh.data < -1:
        raise RecipeError(f"mesh.data={r.mesh.data}: must be at least 1, or -1 for the devices the other axes leave")
    experts = r.model.moe.experts if r.model.moe.router != "none" else 0
    ragged = {"capacity": False, "ragged": True}.get(r.model.moe.execution)
    r.mesh.expert_parallel.validate(devices=r.mesh.expert, experts=experts, ragged=ragged)
    if ("words" in r.model.hnet.chunkers and r.model.hnet.stages > 0) != (r.data.boundaries == "words"):
        raise RecipeError(
            f"model.hnet.chunkers={show(r.model.hnet.chunkers)} with data.boundaries={r.data.boundaries}: the chunker "
            "words needs data.boundaries=words, and nothing else reads it"
        )
    if not r.data.paths or not all(r.data.paths):
        raise RecipeError("data.paths is empty: name what to read, as in data.paths=corpus/ or data=embedded")
    if r.data.weights and len(r.data.weights) != len(r.data.paths):
        raise RecipeError(
            f"data.weights has {len(r.data.weights)} numbers for {len(r.data.paths)} data.paths "
            f"({show(r.data.paths)}): give one per path, or none to mix by size (data.weights=)"
        )
    if any(weight <= 0 for weight in r.data.weights):
        raise RecipeError(
            f"data.weights={show(r.data.weights)}: each must be above 0; leave out what is not to be read"
        )
    if not r.data.tokenizer:
        raise RecipeError("data.tokenizer is empty: bytes, hnet-bytes, bpe-4096, or a tokenizer.json")
    if r.train.loss_chunk and r.data.seq_len % r.train.loss_chunk:
        raise RecipeError(
            f"train.loss_chunk={r.train.loss_chunk} does not divide data.seq_len={r.data.seq_len}; "
            f"nearest that does: {_nearest_divisor(r.data.seq_len, r.train.loss_chunk)}; 0 chooses one"
        )
    unknown = [name for name in r.eval.selection if name not in _SELECTIONS]
    if unknown or not r.eval.selection:
        raise RecipeError(f"eval.selection={show(r.eval.selection)}: expected one or both of {', '.join(_SELECTIONS)}")


def _check_stage_rates(r: Recipe) -> None:
    rates, hnet = r.optimizer.stage_rates, r.model.hnet
    for name, used in (("stage_rates", bool(rates)), ("decay", r.optimizer.decay == "official")):
        if used and not hnet.layout:
            raise RecipeError(
                f"optimizer.{name}={show(getattr(r.optimizer, name))} is for H-Nets, and model.hnet.layout is empty"
            )
    if rates and len(rates) != hnet.stages + 1:
        raise RecipeError(
            f"optimizer.stage_rates has {len(rates)} numbers for the {hnet.stages + 1} stages of "
            f"model.hnet.layout={hnet.layout}: give one for each, the innermost last, or none (optimizer.stage_rates=)"
        )
    if any(rate <= 0 for rate in rates):
        raise RecipeError(f"optimizer.stage_rates={show(rates)}: each must be above 0")


def _nearest_divisor(n: int, to: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - to))
