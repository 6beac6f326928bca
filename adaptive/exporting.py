"""A run's model as a folder of Hugging Face's library, and to its hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptive.errors import CheckpointError, UserError
from adaptive.recipe import Recipe
from adaptive.settings import leaf_values, show


def export_folder(
    workdir: Path, folder: Path, kind: str, dtype: str, shard_bytes: int, repository: str, step: int | None = None
) -> None:
    """Writes the model of a run's newest checkpoint, or that of `step`, and says what it wrote; repository: on the
    hub, that gets it, "": none. Raises UserError where that cannot be."""
    import jax
    from flax import nnx

    from adaptive.data.tokenizer_export import tokenizer_files
    from adaptive.interop.export import About, check_kind, export, planned
    from adaptive.runs.load import find, load

    check_kind(kind)
    found = find(workdir, step)
    if reason := found.recipe.objective.refuse_generation():
        raise UserError(
            f"{found.recipe.name} cannot be exported, as others would have it predict next tokens: {reason}"
        )
    settings = found.recipe.model.summed()
    plan = planned(settings, kind)
    api = hub() if repository else None
    trained = load(found)
    shapes = nnx.eval_shape(lambda: settings.build(jax.random.key(0)))
    model = nnx.merge(nnx.graphdef(shapes), trained.state)  # computes in float32, whatever training did
    tokenizer, card = trained.tokenizer, model_card(found.recipe, workdir, found.step, plan.kind, dtype)
    longest = found.recipe.data.seq_len
    about = About(longest, tokenizer.bos_id, tokenizer.eos_id, tokenizer_files(tokenizer), card)
    off = export(folder, model, plan, about, dtype=dtype, shard_bytes=shard_bytes)
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"wrote     {folder}: {plan.kind}, step {found.step}, {dtype}: {names}")
    print(f"read back logits are within {off:.2g} of the run's", flush=True)
    if api is not None:
        push(api, repository, folder)
        print(f"pushed    {repository}")


def push(api: Any, repository: str, folder: Path) -> None:
    """Uploads a folder with the hub's client. Raises UserError with what that says."""
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:  # the client has errors of many kinds
        raise UserError(f"--push {repository}: {error}") from None


def hub() -> Any:
    """The hub's client. Raises UserError without the package."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("--push needs the package huggingface_hub: pip install 'adaptive-lm[hf]'") from None
    return HfApi()


def model_card(recipe: Recipe, workdir: Path, step: int, kind: str, dtype: str) -> str:
    """README.md of a model: what it is, what it was trained on, how well it does, and by which code."""
    from adaptive.runs.origin import starts

    data = {name: value for name, value in leaf_values(recipe.data).items() if value not in ("", (), None)}
    commit = next((s["package"]["commit"] for s in reversed(starts(workdir)) if s.get("package")), "not known")
    code = "" if kind != "adaptive" else ", trust_remote_code=True"
    head = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [adaptive, {recipe.model.body.family()}]
---

# {recipe.name}

{recipe.description}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{code})
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

| | |
| --- | --- |
"""
    rows = {"steps": f"{step:,} of {recipe.train.steps:,}", "weights": dtype, "code": f"adaptive, commit {commit}"}
    rows |= {f"data.{name}": show(value) for name, value in data.items()}
    rows |= {name: f"{value:.6g}" for name, value in _metrics(workdir, step).items()}
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"{head}{table}\n## Recipe\n\n```json\n{recipe.to_json()}```\n"


def _metrics(workdir: Path, step: int) -> Mapping[str, float]:
    """The last losses that the run logged up to this step."""
    from adaptive.training.log import read_rows

    try:
        rows = [row for row in read_rows(workdir) if row.get("step", 0) <= step]
    except (OSError, ValueError, CheckpointError):
        return {}
    found: dict[str, float] = {}
    for row in rows:
        found |= {k: v for k, v in row.items() if isinstance(v, int | float) and k.startswith(("loss", "eval/"))}
    return dict(sorted(found.items())[:40])
