"""No arrow runs up: a room imports from the floors below it, and no files import each other in a circle."""

import ast
from pathlib import Path

from adaptive import __main__

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"kernels_pallas"},
    {"routing"},
    {"parallel"},
    {"layers"},
    {"models", "objectives"},
    {"account", "data", "interop", "optim"},
    {"runs"},
    {"inference"},
    {"evaluation", "serving"},
    {"training"},
    {"benchmarks"},
    {"sweeps"},
    {"studies"},
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def imports() -> dict[str, set[str]]:
    """module -> modules of this repository that it imports, anywhere in the file."""
    files = {path: path.relative_to(ROOT).with_suffix("") for room in ("adaptive", "kernels_pallas")
             for path in (ROOT / room).rglob("*.py")}  # fmt: skip
    names = {path: ".".join(name.parts).removesuffix(".__init__") for path, name in files.items()}
    known, found = set(names.values()), {}
    for path, name in names.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                within = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= (within & known) or {node.module}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        found[name] = (targets & known) - {name}
    return found


def room(module: str) -> str:
    return module.removeprefix("adaptive.").split(".")[0]


def test_rooms_import_from_the_floors_below():
    plain = "config"  # settings without code: a recipe, which every floor reads, is a tree of them
    up = [
        f"{module} -> {target}"
        for module, targets in imports().items()
        for target in targets
        if FLOOR.get(room(module), 99) < FLOOR.get(room(target), -1) and not target.endswith(plain)
    ]
    assert not up


def test_rooms_import_no_command():
    commands = {f"adaptive.{name}" for name in __main__.COMMANDS} - {"adaptive.data", "adaptive.launch"}
    up = [f"{module} -> {target}" for module, targets in imports().items() if room(module) in FLOOR
          for target in targets & commands]  # fmt: skip
    assert not up


def test_training_knows_no_model():
    found = {target for module, targets in imports().items() if room(module) == "training" for target in targets}
    parts = ("adaptive.models.", "adaptive.layers.")
    of_all = {"models.language_model", "models.bodies", "layers.call", "layers.where", "layers.staged"}
    assert {target.removeprefix("adaptive.") for target in found if target.startswith(parts)} <= of_all


def test_no_circles():
    graph = imports()

    def reached(module: str) -> set[str]:
        seen, due = set(), [module]
        while due:
            new = graph[due.pop()] - seen
            seen |= new
            due += new
        return seen

    assert not {module for module in graph if module in reached(module)}
