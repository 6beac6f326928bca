"""Compiled train steps in a folder: `adaptive compile --save` makes it, `adaptive train --compiled` reads it.

about.json says what the steps were compiled for; each is a file beside it. A step is taken only where all of that is
the same: versions, the package's code, devices, mesh, and the settings that the step is made of. Loading executes what
the file holds: folders of others are to be trusted like their code.
"""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

import adaptive
import kernels_pallas
from adaptive import settings
from adaptive.errors import UserError
from adaptive.training.config import Remat
from adaptive.training.program import Compiled, Program

ABOUT = "about.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin"), "cuda": ("jax-cuda13-plugin",)}
# Settings of `train` that are no part of the compiled step; of `data` those that are.
_NOT_TRAIN = ("seed", "max_bad_steps", "step_timeout_s", "compute_dtype", "remat")
_OF_DATA = ("seq_len", "cross_document", "boundaries")


@dataclasses.dataclass(frozen=True)
class SavedSteps:
    """The steps of a folder, all for the same devices and settings. remat: what they recompute."""

    folder: Path
    remat: Remat
    phases: dict[int, dict[str, Any]]

    def load(self, program: Program, begin: int) -> Compiled | None:
        """The step of the phase that begins at step `begin` (from 0); None where the folder has none.

        Raises UserError where the devices cannot run it."""
        if begin not in self.phases:
            return None
        since, phase = time.perf_counter(), self.phases[begin]
        state, batch = program.abstract_state(), program.abstract_batch()
        arguments = jax.tree.structure(((state, batch), {}))
        results = jax.tree.structure((state, dict.fromkeys(phase["metrics"], 0)))
        devices = list(program.mesh.devices.flat)
        payload = (self.folder / phase["file"]).read_bytes()
        where = {"backend": devices[0].client, "execution_devices": devices}
        try:
            call = serialize_executable.deserialize_and_load(payload, arguments, results, **where)
        except jax.errors.JaxRuntimeError as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"--compiled: these devices cannot load {phase['file']}: {why}; leave it out") from None
        return Compiled(call, time.perf_counter() - since, True, devices[0].platform)


def save(folder: Path, program: Program, begin: int, compiled: Compiled) -> None:
    """Adds the step of the phase that begins at step `begin`. Raises UserError where it cannot be written."""
    payload, _, results = serialize_executable.serialize(compiled.call)
    metrics = jax.tree.unflatten(results, [None] * results.num_leaves)[1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step-{begin}.bin").write_bytes(payload)
        about = _read(folder) if begin else {}
        phase = {"file": f"step-{begin}.bin", "sha256": _hash(payload), "metrics": sorted(metrics)}
        phases = about.get("phases", {}) | {str(begin): phase}
        about = {"made_for": made_for(program), "remat": program.remat, "phases": phases}
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--save: {folder} cannot be written: {error.strerror or error}") from None


def saved_steps(folder: Path, program: Program) -> tuple[SavedSteps | None, str]:
    """The steps of a folder for a program, or why they are not for it. Raises UserError where there are none at all."""
    about = _read(folder)
    if not about:
        raise UserError(f"--compiled: {folder} holds no compiled steps ({ABOUT} is missing); adaptive compile --save")
    remat = about["remat"]
    if program.recipe.train.remat == "auto":
        program = Program(program.recipe, program.mesh, remat)
    theirs, ours = about["made_for"], made_for(program)
    differ = [f"{name} {theirs.get(name)}, here {ours[name]}" for name in ours if ours[name] != theirs.get(name)]
    if differ:
        return None, "it was made for " + "; ".join(differ)
    phases = {int(begin): phase for begin, phase in about["phases"].items()}
    for phase in phases.values():
        path = folder / phase["file"]
        if not path.is_file() or _hash(path.read_bytes()) != phase["sha256"]:
            return None, f"{path.name} is {'damaged' if path.is_file() else 'missing'}"
    return SavedSteps(folder, remat, phases), ""


def _hash(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def made_for(program: Program) -> dict[str, str]:
    """All that must be the same where a compiled step of a program is to run."""
    device, recipe = program.mesh.devices.flat[0], program.recipe
    packages = (*_PACKAGES, *_COMPILERS.get(device.platform, ()))
    versions = {name: _version(name) for name in packages}
    train = settings.to_tree(recipe.train)
    data = settings.to_tree(recipe.data)
    parts = {
        **{name: settings.to_tree(getattr(recipe, name)) for name in ("model", "objective", "optimizer", "schedule")},
        "train": {name: value for name, value in train.items() if name not in _NOT_TRAIN},
        "data": {name: data[name] for name in _OF_DATA},
        "experts": settings.to_tree(program.experts),
    }
    return {
        **{name: version for name, version in versions.items() if version},
        "code": _code(recipe),
        "devices": f"{program.mesh.size} x {device.device_kind}",
        "mesh": " ".join(f"{axis}={size}" for axis, size in program.mesh.shape.items()),
        "slices": str(recipe.mesh.slices),
        "compute": str(program.dtype),
        "remat": program.remat,
        "settings": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _code(recipe: Any) -> str:
    """A digest of the package's code, and of the modules of a user's own parts that the recipe names."""
    folders = [Path(inspect.getfile(package)).parent for package in (adaptive, kernels_pallas)]
    files = [(f"{folder.name}/{path.relative_to(folder)}", path) for folder in folders for path in folder.rglob("*.py")]
    tables = [(path.name, path) for folder in folders for path in folder.rglob("*.json")]
    modules = {type(node).__module__ for _, node in settings.nodes(recipe, "recipe")}
    own = [sys.modules[name].__file__ for name in modules if not name.startswith("adaptive.")]
    found = hashlib.sha256()
    for name, path in sorted([*files, *tables, *((Path(file).name, Path(file)) for file in own if file)]):
        found.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"--compiled: {folder / ABOUT} cannot be read: {error}") from None
