"""`adaptive compile`: what is said of machines that are not here, and a step that is compiled ahead and trained."""

import hashlib
import json
import os
from pathlib import Path

import jax
import pytest

from adaptive import compile as compiling
from adaptive import targets, train
from adaptive.benchmarks import aot, moves, pods
from adaptive.errors import MeshError, UserError
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import load
from adaptive.targets import Topology, topology
from adaptive.training import saved
from adaptive.training.program import Program

ROOT = Path(__file__).resolve().parents[1]
FACTS = {
    "fits": True, "needs": 5 * 2**30, "accumulation": 1, "mesh": {"data": 4, "fsdp": 64, "tensor": 1},
    "arguments": 2**30, "outputs": 2**30, "in_place": 2**30, "temporaries": 4 * 2**30, "code": 2**20, "peak": 5 * 2**30,
    "compile_s": 12.3, "collectives": {"all-gather": {"number": 2, "runs": 64, "bytes": 2**30}},
    "received": {"all-gather": {"inside": 2**30, "between": 0.0}},
    "least": [{"name": "gathers", "formula": "2 x parameters", "bytes": 2**29}], "custom_calls": {},
    "largest": [{"array": "f32[4,8]", "bytes": 2**20, "number": 2, "scope": "forward, layers/block.py"}],
    "square": None, "unknown_loops": 0,
}  # fmt: skip


@pytest.mark.parametrize(("name", "slices", "expected"), [
    ("v5e-256", None, Topology("v5e", 256)),
    ("v5p-128", None, Topology("v5p", 64)),  # cores, two of which are one device
    ("v7x-128", None, Topology("v7x", 128)),  # cores, each a device
    ("v6e-256x2", None, Topology("v6e", 512, 2)),
    ("v5p-128", 4, Topology("v5p", 256, 4)),
    ("h200-64", None, Topology("h200", 64, 8)),
    ("cpu-8", None, Topology("cpu", 8)),
])  # fmt: skip
def test_names_are_those_that_users_of_such_machines_know(name, slices, expected):
    found = topology(name, slices)
    assert found == expected
    assert topology(found.name) == found
    assert str(found.devices) in str(found)


def test_all_topologies_are_listed(capsys):
    assert compiling.main(["--topology", "list"]) == 0
    shown = capsys.readouterr().out
    for name in ("v5e-256", "v5p-128", "v6e-256", "v7x-64", "h200-64", "v5e-256x2", "cpu-1"):
        assert name in shown
    assert "cores, two of a chip, which are one device" in shown


@pytest.mark.parametrize(("given", "says"), [
    (["--topology", "v9-8"], "--topology=v9-8 is none that is known"),
    (["--topology", "v5e"], "--topology list names all"),
    (["--topology", "v5e-24"], "v5e has v5e-1, v5e-4, v5e-8, v5e-16"),
    (["--topology", "v5e-8x2", "--slices", "3"], "--slices=3, but v5e-8x2 has 2"),
    (["--topology", "h200-8x2"], "h200-16"),
    (["--topology", "cpu-9999"], "from cpu-1 to cpu-512"),
    ([], "--topology v5e-256 for example"),
    (["--topology", "v5e-16", "mesh.fsdp=512"], "does not fit 16 devices"),
    (["--topology", "v5e-16", "train.batch_size=24"], "nearest that do: 16, 32"),
    (["--topology", "v5e-16", "mesh.fsdp=0"], "mesh.fsdp=0"),
    (["--topology", "cpu-8", "--sweep"], "how much memory a CPU has is not known"),
    (["--topology", "v5e-16", "--save", "/tmp/x", "--sweep"], "--sweep: one step is kept"),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_compiled(given, says, capsys, monkeypatch):
    monkeypatch.setattr(targets, "can_compile", lambda name: True)
    assert compiling.main(["--recipe", "mor_360m", *given]) == 2
    shown = capsys.readouterr()
    assert says in shown.err and "Traceback" not in shown.err and not shown.out


def test_a_missing_compiler_is_named(capsys, monkeypatch):
    monkeypatch.setattr(targets, "can_compile", lambda name: False)
    assert compiling.main(["--recipe", "mor_360m", "--topology", "h200-8"]) == 2
    assert "needs jax-cuda13-plugin, of the version that jax names" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "where", "settings", "mesh"), [
    ("mor_360m", "v5e-256", (), "mesh.fsdp=64"),  # a width of 960 has no more
    ("hnet_2stage_xl", "v6e-256", (), "mesh.fsdp=256"),
    ("mor_360m", "h200-64", (), "mesh.fsdp=8"),  # within a node
    ("mor_360m", "v5e-256", ("mesh.tensor=5", "mesh.data=-1"), None),
])  # fmt: skip
def test_the_mesh_that_is_taken_where_none_is_given(name, where, settings, mesh):
    try:
        step = compiling.step_of(name, settings, topology(where))
    except MeshError as error:
        assert mesh is None and "tensor=5" in str(error)  # given ones stand as they are
        return
    assert mesh in step.settings and step.recipe.train.compute_dtype == "bfloat16"
    assert step.recipe.mesh.slices == topology(where).slices


def record_of(name: str, where: str, **facts) -> tuple[dict, aot.Step]:
    step = compiling.step_of(name, (), topology(where))
    about = {"topology": where, "slices": step.topology.slices, "mesh_given": False}
    return {**aot.record(step, -1.0, {**FACTS, **facts}), **about}, step


def test_all_that_is_known_is_said():
    record, step = record_of("mor_360m", "v5e-256")
    shown = "\n".join(pods.lines(record, step.recipe, step.topology))
    for part in (
        "mesh       data=4 fsdp=64 (none was given",
        "1,024 rows of 2,048: 4 of each device",
        "needs 5.00 GiB of a device",
        "f32[4,8], 1 MiB, 2 times: forward, layers/block.py",
        "all-gather: 64 times a step, results 1,024 MiB; a device receives 1,024 MiB",
        "least      512 MiB that a device has to receive, of 1,024 MiB: 2.00 times",
        "peak 197 TFLOP/s, of which matmuls reach 62%",
        "links 200 GB/s into a device",
        "verdict    fits: 5.00 GiB of 15.75 GiB, 10.75 GiB to spare",
    ):
        assert part in shown, part
    guess = record["estimated"]
    assert guess["communication"] == pytest.approx(2**30 / 200e9)
    hidden, alone = pods.times(record)
    assert hidden == max(guess["step"], guess["communication"]) and alone == guess["step"] + guess["communication"]


def test_what_does_not_fit_is_told_what_would():
    needs = 40 * 2**30
    record, step = record_of("vanilla_360m", "v5e-16", fits=False, needs=needs, accumulation=4, remat="none")
    found = moves.that_fit(moves.moves(record, step.recipe, step.topology), step.topology)
    assert found and all(move.needs <= 0.95 * record["device_memory"] for move in found)
    assert found[0].settings[0] in ("train.remat=none", "train.remat=attention")  # fewer rows at once, no layer again
    shown = "\n".join(pods.lines(record, step.recipe, step.topology))
    assert "verdict    does not fit: needs 40.00 GiB of 15.75 GiB" in shown
    assert "would fit, by estimate: train.remat=attention train.device_batch_size=" in shown
    untold = {name: value for name, value in record.items() if name not in ("temporaries", "arguments")}
    shown = "\n".join(pods.lines({**untold, "needs": None}, step.recipe, step.topology))
    assert "needs more than it has of 15.75 GiB" in shown and "largest" not in shown


def test_a_sweep_takes_the_fastest_that_fits(monkeypatch, capsys):
    asked = []

    def compiled(step, effort, save=""):
        train = step.recipe.train
        asked.append((train.remat, train.device_batch_size))
        size = {"none": 3.0, "attention": 1.6, "dots": 1.5, "layer": 0.4}[train.remat] * (train.device_batch_size or 16)
        fits = size < 16
        accumulation = 64 // train.device_batch_size
        return aot.record(step, effort, {**FACTS, "fits": fits, "needs": size * 2**30, "accumulation": accumulation})

    monkeypatch.setattr(targets, "can_compile", lambda name: True)
    monkeypatch.setattr(aot, "compiled", compiled)
    assert compiling.main(["--recipe", "vanilla_360m", "--topology", "v5e-16", "--sweep"]) == 0
    shown = capsys.readouterr().out
    assert asked[0] == ("layer", 16) and asked[-1][0] != "layer" and len(asked) <= 1 + compiling.TRIES
    (line,) = [line for line in shown.splitlines() if "recommended" in line]
    assert asked[-1][0] in line and "ms" in line


def test_json_is_what_is_known(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(targets, "can_compile", lambda name: True)
    monkeypatch.setattr(aot, "compiled", lambda step, effort, save="": aot.record(step, effort, FACTS))
    run = ["--recipe", "mor_360m", "--topology", "v5e-256", "--json"]
    assert compiling.main([*run, "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["topology"] == "v5e-256" and found["needs"] == FACTS["needs"]
    assert compiling.main([*run, str(tmp_path / "new" / "one.json")]) == 0
    assert json.loads((tmp_path / "new" / "one.json").read_text()) == found
    assert compiling.main([*run, "/proc/no/one.json"]) == 2
    assert "--json: /proc/no/one.json cannot be written" in capsys.readouterr().err


def test_the_documented_tables_are_those_of_the_records(capsys):
    assert compiling.main(["--kept", str(ROOT / "benchmarks" / "pods")]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
    assert compiling.main(["--kept", "/nowhere"]) == 2
    assert "no .json file in /nowhere" in capsys.readouterr().err


# Compiled for real

BLOCK = ("mixer.heads=2", "mixer.kv_heads=2", "mixer.head_dim=8", "feed_forward.hidden=16")
SMALL = (
    "--recipe", "vanilla_tiny", "model.width=16", "model.body.stack.repeats=2",
    *(f"model.body.stack.blocks.0.{text}" for text in BLOCK), "data.seq_len=32", "train.batch_size=8", "train.steps=2",
    "schedule.warmup_steps=1", "train.remat=auto", "mesh.fsdp=8", "log.wandb=disabled", "eval.rows=8", "log.every=1",
    "log.sample_tokens=0",
)  # fmt: skip


@pytest.mark.compiles
def test_a_step_that_is_compiled_ahead_is_trained(tmp_path, monkeypatch, capfd):
    """To the same losses as one that a run compiles for itself; which it does where anything differs, and says why."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "compiled"
    assert compiling.main([*SMALL, "--topology", "cpu-8", "--save", str(folder)]) == 0
    assert "vanilla_tiny on cpu-8: 8 emulated devices" in capfd.readouterr().out

    def trained(name: str, *settings: str) -> tuple[str, list[float]]:
        assert train.main([*SMALL, *settings, "--workdir", name, "--compiled", str(folder)]) == 0
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return capfd.readouterr().out, [row["loss"] for row in rows if "loss" in row]

    shown, losses = trained("one")
    assert f", from {folder}" in shown and "remat     none: as it was compiled" in shown and "anew" not in shown
    about = json.loads((folder / "about.json").read_text())
    changed = about | {"made_for": about["made_for"] | {"jax": "0.0.1"}}
    (folder / "about.json").write_text(json.dumps(changed))
    shown, again = trained("two")
    assert "compiled  anew, not taken from" in shown and "it was made for jax 0.0.1, here" in shown
    assert losses == pytest.approx(again, rel=1e-6) and len(losses) == 2


def test_steps_are_for_what_they_were_made_for_alone(tmp_path, monkeypatch):
    program = Program(load("mor_tiny").with_("train.steps=3"), make_mesh(MeshConfig(data=8)))
    (tmp_path / "step-0.bin").write_bytes(b"a program")
    phases = {"0": {"file": "step-0.bin", "sha256": hashlib.sha256(b"a program").hexdigest(), "metrics": []}}
    about = {"made_for": saved.made_for(program), "remat": "none", "phases": phases}
    (tmp_path / "about.json").write_text(json.dumps(about))

    def why_not(*settings: str) -> str:
        found, why = saved.saved_steps(tmp_path, Program(program.recipe.with_(*settings), program.mesh))
        assert (found is None) == bool(why)
        return why

    assert not why_not("train.seed=7", "log.every=3", "data.paths=other.txt", "eval.every=1")
    for setting in ("train.steps=4", "train.batch_size=16", "model.body.depth.alpha=0.5", "optimizer.beta1=0.8"):
        assert why_not(setting).startswith("it was made for settings ")
    assert "remat none, here layer" in why_not("train.remat=layer")
    assert "mesh stage=1 data=8 fsdp=1" in saved.saved_steps(
        tmp_path, Program(program.recipe, make_mesh(MeshConfig(data=4, fsdp=2))))[1]  # fmt: skip

    def refused(*given, **where):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: another machine")

    monkeypatch.setattr(saved.serialize_executable, "deserialize_and_load", refused)
    found, _ = saved.saved_steps(tmp_path, program)
    with pytest.raises(UserError, match="these devices cannot load"):
        found.load(program, 0)
    assert found.load(program, 7) is None
    (tmp_path / "step-0.bin").write_bytes(b"another")
    assert why_not() == "step-0.bin is damaged"
    (tmp_path / "step-0.bin").unlink()
    assert why_not() == "step-0.bin is missing"
    with pytest.raises(UserError, match="holds no compiled steps"):
        saved.saved_steps(tmp_path / "nowhere", program)


@pytest.mark.compiles
@pytest.mark.skipif(os.environ.get("ADAPTIVE_AOT") != "all", reason="on demand: ADAPTIVE_AOT=all")
def test_a_small_step_compiles_for_two_slices(capsys):
    if not targets.can_compile("v5e"):
        pytest.skip("compiling for v5e needs libtpu, which is not installed")
    small = ["model.width=128", "model.body.stack.repeats=2", "data.seq_len=256", "train.batch_size=8"]
    run = ["--recipe", "vanilla_tiny", "--topology", "v5e-4x2", "--json", "-", *small, "train.remat=layer"]
    assert compiling.main(run) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["mesh"]["fsdp"] == 4 and found["mesh"]["data"] == 2 and not found["unknown_loops"]
    between = sum(one["between"] for one in found["received"].values())
    inside = sum(one["inside"] for one in found["received"].values())
    assert 0 < between < inside / 4  # gathers stay within a slice, shares of gradients are summed between them
    assert any("layers/" in one["scope"] or "cross_entropy" in one["scope"] for one in found["largest"])
