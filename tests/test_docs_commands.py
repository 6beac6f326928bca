"""Every command of the documents is executed, at the size of a test; but for those that need more than this package.

A command is read, looked up, checked and planned as it stands. What is reduced is what it then computes: widths, rows,
steps. A run that a command names and that none before it has made is made by its recipe.
"""

import dataclasses
import functools
import importlib
import json
import lzma
import shlex
import shutil
import types
from pathlib import Path

import jax
import pytest
import shapes
from documents import PAGES, blocks, module_and_arguments, ours, shown
from oracle import hnet as oracle

from adaptive import convert, targets, train
from adaptive.benchmarks import (
    aot,
    block_sparse_attention,
    ema,
    experts,
    grouped_matmul,
    hnet,
    kernel_cases,
    kernels,
    ssd,
    train_step,
)
from adaptive.data.corpus import embedded_file
from adaptive.data.tokenizer_export import tokenizer_files
from adaptive.data.tokenizers import load_tokenizer
from adaptive.evaluation import sets
from adaptive.interop import Whole
from adaptive.interop.files import write_safetensors
from adaptive.parallel import mesh
from adaptive.recipe import Recipe, list_recipes, load
from adaptive.training import fitting, program
from adaptive.training.program import Compiled

pytestmark = pytest.mark.compiles

# How commands begin that are not executed here, and why.
ELSEWHERE = {
    "git clone": "the address of a repository",
    "pip download": "a package index",
    "pip install": "a package index; tests/test_scripts.py and tests/test_packaging.py install",
    "./scripts/test": "these tests",
    "ADAPTIVE_AOT=all ./scripts/test": "these tests",
    "python3 scripts/gpu_check": "an accelerator; tests/test_bench_kernels.py reads what it says",
    ".ci/run": "these tests",
    ".venv/bin/ruff": "what .ci/run runs",
    "./scripts/lock": "a package index",
    "./scripts/chaos": "minutes; tests/training/test_several_processes.py runs it in small",
    "adaptive launch --restarts": "processes of their own; tests/training/test_several_processes.py starts some",
    "sbatch": "SLURM; tests/launch/test_targets.py carries the script out",
    "bash my-run.sh": "Cloud TPU; tests/launch/test_tpu.py carries the script out",
    "kubectl": "Kubernetes; tests/launch/test_targets.py reads the manifest",
    "sky ": "SkyPilot; tests/launch/test_targets.py carries out what it runs",
    "python -m adaptive.bench peers": "torch and transformers; it fails where the two sides do not agree",
    "python -m adaptive.convert --uptrain": "a run of SmolLM2; tests/interop/test_uptraining.py has one of its own",
    "python -m adaptive.train --recipe runs/mor_smol": "what that makes",
    "adaptive convert --to_expert_choice": "a trained run; tests/interop/test_retrofit.py has one of its own",
    "adaptive train --recipe runs/dlm_retrofit": "what that makes",
    "python -m adaptive.bench data": "half a minute of reading; tests/test_bench.py has one of it",
    "python -m adaptive.bench engine": "minutes; tests/test_bench_engine.py has its arithmetic",
    "adaptive compile --recipe": "minutes, and compilers; tests/test_compile.py compiles for devices of a CPU",
    "adaptive compile ...": "the same",
    "adaptive serve": "it ends when it is told to; tests/serving/test_server.py runs one",
    "python3 scripts/load": "a server; tests/serving/test_load.py has one",
    "adaptive compile --kept": "a folder of the repository; tests/test_compile.py makes its tables",
    "adaptive train --recipe mor_360m --compiled": "what that keeps; tests/test_compile.py trains one",
    "adaptive train --recipe runs/one/recipe.json --init_from": "compiles long; tests/models/test_low_rank.py",
    "adaptive study ladder --workdir": "hours; tests/sweeps/test_study.py makes a quick one of runs that it pretends",
    "adaptive launch --processes": "processes of their own; tests/parallel/test_two_processes.py starts some",
}
RELEASED = ["--kind", "hnet", "--tensors", "hnet_2stage_XL.safetensors", "--config", "hnet_2stage_XL.json"]
# What stands for something in a command, and files and steps that are another size or kind here.
FOR = {
    "NAME": ["mor_tiny"], "RUN": ["runs/hnet_tiny-1"], "WORKDIR": ["runs/one"], "...": RELEASED,
    "hnet_2stage_XL.pt": ["hnet_2stage_XL.safetensors"],  # tests/interop/test_files.py reads PyTorch's
    "runs/one@400": ["runs/one@2"], "4096": ["300"], "160": ["8"],
}  # fmt: skip
OF_OPERATIONS = {  # constants of the benchmarks of operations
    aot: {"compiled": lambda step, effort: aot.record(step, effort, {"fits": False, "needs": None})},
    targets: {"can_compile": lambda name: True},
    kernels: {
        "cases": lambda sizes, dtype: [("gather", lambda: kernel_cases.gather(sizes._replace(seq=6, width=4), dtype))],
        "rates": lambda dtype, repeats: kernels.Rates(1e9, 1e9),
    },
    block_sparse_attention: {"LENGTHS": (16,), "DIM": 8, "BLOCK": 16},
    ema: {"CASES": ((1, 16, 8),)},
    experts: {"SEQUENCES": 1, "SEQ": 16, "WIDTH": 8, "HIDDEN": 8, "EXPERTS": (4,)},
    grouped_matmul: {
        "MATMULS": (grouped_matmul.Case(8, 4, "balanced", 16, 8),),
        "SWIGLUS": (grouped_matmul.Case(8, 4, "skewed", 16, 8),),
    },
    hnet: {"RECIPES": ("hnet_tiny",), "SEQ": 32, "BATCH": 1, "PROMPT": 8, "BYTES": 4, "BATCHES": (1,), "ROWS": (0,)},
    ssd: {"CASES": ((1, 16, 2),), "DIM": 4, "STATE": 4, "BLOCKS": ()},
}


def small(recipe: Recipe, *, shrink: bool = True) -> Recipe:
    """The recipe with two steps of a few short rows, and nothing from a hub; shrink: its model's sizes as well."""
    rows = max(2, recipe.mesh.fsdp * recipe.mesh.expert)
    settings = [
        "data.seq_len=32", f"train.batch_size={rows}", "train.device_batch_size=0", "train.loss_chunk=0",
        "train.steps=2", "eval.rows=2", "eval.selection=topk", "log.sample_tokens=0", "log.wandb=disabled",
    ]  # fmt: skip
    if recipe.data.source == "huggingface":
        settings = ["data.source=embedded", "data.paths=english", *settings]
        if "/" in recipe.data.tokenizer:
            settings.append("data.tokenizer=bytes")
    if shrink:
        model = shapes.reduced(recipe.model, layers=1, vocab_size=320)
        recipe, settings = dataclasses.replace(recipe, model=model), [*settings, "train.ema=0.9"]
    return recipe.with_(*settings)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the documents' commands find there."""
    folder = tmp_path_factory.mktemp("desk")
    texts = folder / "my" / "texts"
    texts.mkdir(parents=True)
    text = lzma.decompress(embedded_file("english.txt.xz").read_bytes()).decode()[:40_000]
    (texts / "a.txt").write_text(text, encoding="utf-8")
    (folder / "my" / "tasks").mkdir()
    item = json.dumps({"query": "The sky is", "choices": ["blue", "black"], "gold": 0})
    (folder / "my" / "tasks" / "sky.jsonl").write_text(f"{item}\n" * 3)
    rows = [json.dumps({"content": part}) for part in text.split("<|endoftext|>")]
    (folder / "my" / "records.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (own,) = blocks(next(page for page in PAGES if page.name == "your-own.md"), "json")
    (folder / "mine.json").write_text(own)
    config = oracle.official(["T1", ["T1", ["T1"], "T1"], "T1"], [8, 12, 16], vocab=256, ff=[8, 8, 8], heads=[2, 3, 2])
    (folder / RELEASED[-1]).write_text(json.dumps(config))
    write_safetensors(folder / RELEASED[-3], oracle.random_tensors(config, 0))
    shutil.copytree(Path(__file__).parent / "interop" / "fixtures" / "tiny_llama_bytes", folder / "SmolLM2-135M")
    for name, text in tokenizer_files(load_tokenizer("bytes")).items():
        (folder / "SmolLM2-135M" / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def reducing(desk, monkeypatch):
    """Makes commands small, from where they have read and checked their settings on.

    What has a workdir is run. All else ends before the first step; on one device, what is a dry run and what has other
    parts than every recipe is compiled before, as tests/test_every_recipe.py and tests/parallel compile all others.
    """
    monkeypatch.chdir(desk)
    monkeypatch.setenv("ADAPTIVE_CACHE", str(desk / "cache"))
    whole_train, whole_save, whole_measure = train.train, convert.save, train_step.measure
    whole_mesh, whole_steps = mesh.make_mesh, program.Steps

    def short_train(recipe, folder, arguments=(), compiled=None):
        converted = arguments[1].startswith("runs/")  # tests/test_convert.py trains one
        run = "--workdir" in arguments and not converted
        new = "--dry_run" in arguments or parts(recipe.model) not in known_parts()
        alone = recipe.mesh.data == -1 and recipe.mesh.fsdp == recipe.mesh.tensor == recipe.mesh.expert == 1
        monkeypatch.setattr(fitting, "Steps", whole_steps if run or (new and alone) else NotCompiled)
        less = small(recipe, shrink=not converted)
        return whole_train(less, folder if run else None, arguments, compiled)

    def short_measure(recipes, **how):
        return whole_measure([small(recipe) for recipe in recipes], **how | {"repeats": 1, "steps_per_repeat": 1})

    def few_devices(config, devices=None):
        count = max(1, config.data) * config.fsdp * config.expert * config.tensor
        return whole_mesh(config, jax.devices()[:count])

    whole_set = sets.EvaluationSet.first
    monkeypatch.setattr(sets.EvaluationSet, "first", lambda one, most: whole_set(one, 2))
    monkeypatch.setattr(train, "train", short_train)
    monkeypatch.setattr(convert, "save", lambda recipe, *rest: whole_save(small(recipe, shrink=False), *rest))
    monkeypatch.setattr(mesh, "make_mesh", few_devices)
    monkeypatch.setattr(train_step, "measure", short_measure)
    monkeypatch.setattr(train_step, "TimedStep", NotTimed)
    monkeypatch.setitem(train_step.MATMUL_SIDE, "cpu", 32)
    monkeypatch.setattr(hnet, "load", lambda name: Recipe(name, model=shapes.hnet(("T1", ("T1",), "T1"))))
    for module, constants in OF_OPERATIONS.items():
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)


class NotCompiled:
    """In place of the steps of a program."""

    def __init__(self, program):
        self.first = Compiled(types.SimpleNamespace(memory_analysis=lambda: None), 0.0)


class NotTimed:
    """In place of a timed step; tests/test_bench.py times some."""

    def __init__(self, recipe, devices):
        recipe.validate()
        self.recipe, self.program = recipe, program.Program(recipe, mesh.make_mesh(recipe.mesh))
        self.compiled = Compiled(types.SimpleNamespace(memory_analysis=lambda: None), 0.0)

    def seconds(self, steps):
        return 1.0


def parts(node) -> tuple:
    """The tree of the kinds of parts, without their numbers."""
    if isinstance(node, tuple):
        return tuple(dict.fromkeys(parts(each) for each in node if dataclasses.is_dataclass(each)))
    if not dataclasses.is_dataclass(node):
        return ()
    return (type(node), *(parts(getattr(node, field.name)) for field in dataclasses.fields(node)))


@functools.cache
def known_parts() -> set[tuple]:
    return {parts(load(name).model) for name in list_recipes()}


def execute(line: str) -> None:
    words = shlex.split(line, comments=True)
    text = words.index("--prompt") + 1 if "--prompt" in words else -1
    words = [part for at, word in enumerate(words) for part in ([word] if at == text else FOR.get(word, [word]))]
    name, arguments = module_and_arguments(words)
    for run in (Path(word) for word in arguments if word.startswith("runs/") and word.endswith("-1")):
        if not run.exists():
            recipe = small(load(run.name.removesuffix("-1")))
            model = jax.jit(recipe.model.build)(jax.random.key(0))
            convert.save(recipe, Whole(recipe.model, model), run)
    if name in ("adaptive.data", "adaptive.launch"):
        name += ".__main__"
    if name == "adaptive.bench" and arguments[0] not in ("train", "aot"):
        arguments += ["--repeats", "1"]
    assert importlib.import_module(name).main(arguments) == 0, line


@pytest.mark.parametrize("page", [page for page in PAGES if shown(page)], ids=lambda page: page.name)
def test_commands_run(page, desk, reducing):
    """Those of a page in their order; what is not of this package is listed above."""
    for line in dict.fromkeys(line for whole, line in shown(page) if whole):
        if not line.startswith(tuple(ELSEWHERE)):
            assert ours(shlex.split(line, comments=True)), f"what is this? {line}"
            execute(line)
