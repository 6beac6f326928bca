"""Runs with a small model and a text of a few documents, as training leaves them."""

import jax
import shapes

from adaptive.optim.build import make_optimizer
from adaptive.recipe import Recipe
from adaptive.runs.checkpoint import Checkpoints
from adaptive.runs.state import initial_state

SMALL = {"vocab_size": 320, "width": 16, "hidden": 16, "heads": 2}
PLAIN = shapes.plain(1, **SMALL)
MOR = shapes.mor(5, 3, **SMALL)
TEXTS = [
    f"Call me {name}. {i} whales, {i * 7} ships; über alles!" * (1 + i % 3) for i, name in enumerate("abcdefghijkl")
]


def made(folder, model, *settings: str, step: int = 3, seq: int = 32):
    """The recipe of a run in the folder, which holds out every second of its documents."""
    (folder / "texts").mkdir(parents=True)
    (folder / "texts" / "own.txt").write_text("".join(f"{text}\n<|endoftext|>\n" for text in TEXTS))
    data = (f"data.paths={folder / 'texts' / 'own.txt'}", "data.source=files", "data.validation_every=2")
    recipe = Recipe(name="made", model=model).with_(
        "train.compute_dtype=float32", "train.batch_size=3", f"data.seq_len={seq}", *data, *settings
    )
    recipe.validate()
    (folder / "recipe.json").write_text(recipe.to_json())
    tx = make_optimizer(recipe.optimizer, recipe.schedule, recipe.train.steps)
    state = jax.jit(lambda key: initial_state(model.build, tx, key))(jax.random.key(step))
    checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint, {})
    checkpoints.save(step, state, {})
    checkpoints.close()
    return recipe
