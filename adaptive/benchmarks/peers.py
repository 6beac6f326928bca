"""Our side and Hugging Face's transformers (PyTorch, eager and compiled), in turns in one process, on a CPU.

The same weights on both sides where transformers has the model: the first loss and the generated tokens must agree, so
that both are seen to compute the same. Times are the least of the repeats; theirs over ours above 1 means that we are
faster. Beside them what a matmul and a copy reach in the same process.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from adaptive.benchmarks import experts as layers
from adaptive.benchmarks import options
from adaptive.benchmarks.timing import Run, fastest, seconds
from adaptive.benchmarks.train_step import TimedStep, matmul_timer, random_batch
from adaptive.command import number
from adaptive.data.batch import Batch
from adaptive.errors import CheckpointError, UserError
from adaptive.inference.drawing import Drawing
from adaptive.inference.sampling import Sampler
from adaptive.interop import to_official
from adaptive.interop.huggingface import config_of
from adaptive.layers.feed_forwards import experts as expert_layer
from adaptive.layers.feed_forwards.dense import Dense
from adaptive.layers.moe.routers import token_choice
from adaptive.layers.site import Site
from adaptive.recipe import Recipe, load

PROMPT, NEW = 32, 96  # tokens of generation


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work: seconds of ours, and of theirs by how it runs; `agree` says what was seen equal."""

    name: str
    runs: dict[str, Run]
    agree: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """Least seconds of a case by way; ratios: theirs over ours, least over least."""

    name: str
    seconds: dict[str, float]
    agree: str

    @property
    def ratios(self) -> dict[str, float]:
        return {way: s / self.seconds["ours"] for way, s in self.seconds.items() if way != "ours"}


def main(arguments: Sequence[str]) -> int:
    """Prints the table, or with --json a line of JSON."""
    made = options.options("peers", __doc__ or "", 6, "rounds, of which the least time counts")
    made.add_argument("--recipes", nargs="*", default=["vanilla_tiny", "vanilla_bench"], help="plain transformers")
    made.add_argument("--rows", nargs="*", type=number(int, least=1), default=[1, 8], help="of generation")
    made.add_argument("--experts", nargs="*", type=number(int, least=2), default=[8, 64], help="of a layer")
    made.add_argument("--compiled", action="store_true", help="also what torch.compile makes of theirs (minutes)")
    made.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    given = made.read(arguments)
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"bench peers needs {package}, which is not installed: pip install 'adaptive-lm[peers]'")
    recipes = [load(name) for name in given.recipes]
    for recipe in recipes:
        _check(recipe)
    console = Console(stderr=given.json)
    with console.status("") as status:
        found = list(_measured(recipes, given, status.update))
        matmul, copy = machine()
    about = _about(matmul, copy)
    if given.json:
        print(json.dumps({"cases": [dataclasses.asdict(f) | {"ratios": f.ratios} for f in found], **about}))
    else:
        wide = Console(width=max(console.width, 130))
        wide.print(_table(found))
        wide.print(", ".join(f"{name} {value}" for name, value in about.items()))
    return 0


def _measured(
    recipes: Sequence[Recipe], given: argparse.Namespace, progress: Callable[[str], None]
) -> Iterator[Measured]:
    for recipe in recipes:
        progress(f"{recipe.name}: training")
        yield _least(training(recipe, given.compiled), given.repeats)
        for rows in given.rows:
            progress(f"{recipe.name}: generation, rows: {rows}")
            yield _least(generation(recipe, rows), given.repeats)
    for count in given.experts:
        progress(f"{count} experts")
        yield _least(experts(count, given.compiled), given.repeats)


def _least(case: Case, repeats: int) -> Measured:
    for run in case.runs.values():
        run()
    found = fastest({way: [run] for way, run in case.runs.items()}, repeats, seconds)
    least = {way: one for way, (one,) in found.items()}
    return Measured(case.name, least, case.agree)


def training(recipe: Recipe, compiled: bool) -> Case:
    """A step on the recipe's rows of random tokens: gradients, clipping, AdamW. Raises UserError where the first losses
    do not agree."""
    import torch

    batch = random_batch(recipe)
    step = TimedStep(recipe, jax.devices()[:1])
    model = step.program.build(jax.random.key(0))
    theirs = llama(recipe, model).train()
    tokens, targets = (torch.from_numpy(np.ascontiguousarray(a)).long() for a in (batch.tokens, batch.targets))

    def update(network: Any) -> Run:
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, fused=True)

        def run() -> None:
            logits = network(tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    with torch.no_grad():
        logits = theirs(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    own = _loss(model, batch)
    if abs(own - loss) > 1e-4:
        raise UserError(f"{recipe.name}: the losses differ, {own:.6f} and theirs {loss:.6f}")
    runs: dict[str, Run] = {"ours": lambda: step.seconds(1), "eager": update(theirs)}
    if compiled:
        runs["compiled"] = update(torch.compile(theirs))
    rows, n = batch.tokens.shape
    return Case(f"{recipe.name}: training step, {rows} x {n}", runs, f"loss {own:.5f}, {loss:.5f}")


def _loss(model: nnx.Module, batch: Batch) -> float:
    def loss(state: Any) -> jax.Array:
        logits = nnx.merge(graphdef, state)(jnp.asarray(batch.tokens)).logits
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch.targets)[..., None], -1).mean()

    graphdef, state = nnx.split(model)
    return float(jax.jit(loss)(state))


def generation(recipe: Recipe, rows: int) -> Case:
    """Greedy continuations with a cache. Raises UserError where the tokens are others."""
    import torch

    # Weights of the usual size repeat one token, whatever the cache does.
    lively = dataclasses.replace(recipe.model, init_std=5 * recipe.model.init_std)
    model = lively.build(jax.random.key(0), dtype=jnp.float32)
    theirs = llama(recipe, model).eval()
    sampler = Sampler(*nnx.split(model), how=Drawing(temperature=0))
    prompt = np.random.default_rng(0).integers(0, recipe.model.vocab_size, (rows, PROMPT), dtype=np.int32)

    def ours() -> np.ndarray:
        pieces = sampler(list(prompt), NEW, jax.random.key(0))
        return np.concatenate([piece.tokens for piece in pieces if not piece.prompt], axis=1)

    def them() -> np.ndarray:
        with torch.inference_mode():
            made = theirs.generate(
                torch.from_numpy(prompt).long(), attention_mask=torch.ones(rows, PROMPT), do_sample=False,
                min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        return made[:, PROMPT:].numpy()

    same = float((ours() == them()).mean())
    if same < 0.9:  # near ties are decided by rounding, and what follows a tie that fell otherwise is another text
        raise UserError(f"{recipe.name}: of the generated tokens {same:.0%} are the same")
    name = f"{recipe.name}: {NEW} tokens after {PROMPT}, rows: {rows}"
    return Case(name, {"ours": ours, "eager": them}, f"{same:.0%} of tokens")


def llama(recipe: Recipe, model: nnx.Module) -> Any:
    """transformers' Llama with the weights of `model`, in float32 and in its default form of attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    longest = max(recipe.data.seq_len, PROMPT + NEW)
    config = LlamaConfig(**config_of("llama", recipe.model) | {"max_position_embeddings": longest})
    torch.set_num_threads(os.cpu_count() or 1)
    made = LlamaForCausalLM(config)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in to_official("llama", model).items()}
    missing, unexpected = made.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise UserError(f"{recipe.name}: transformers' Llama lacks {unexpected}, and these are missing: {missing}")
    made.tie_weights()
    return made.float()


def _check(recipe: Recipe) -> None:
    """Raises UserError for a recipe that is no plain transformer of Llama's kind."""
    try:
        config_of("llama", recipe.model)
    except CheckpointError:
        raise UserError(
            f"bench peers: {recipe.name} is no plain transformer; vanilla_tiny and vanilla_bench are"
        ) from None


def experts(count: int, compiled: bool) -> Case:
    """A layer of SwiGLU experts, two of them per token, forward and backward: dropless token choice, and a dense layer
    of equal active FLOPs, beside Mixtral's block with grouped products."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=layers.WIDTH, intermediate_size=layers.HIDDEN, num_local_experts=count,
        num_experts_per_tok=layers.PER_TOKEN,
        experts_implementation="grouped_mm",
    )  # fmt: skip
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config).float()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(layers.SEQUENCES, layers.SEQ, layers.WIDTH, requires_grad=True)

    def step(network: Any) -> Run:
        def run() -> None:
            block.zero_grad(set_to_none=True)
            x.grad = None
            out = network(x)
            out = out[0] if isinstance(out, tuple) else out
            (out * out).sum().backward()

        return run

    layer = expert_layer.Settings(token_choice.Settings(experts_per_token=layers.PER_TOKEN), count, layers.HIDDEN)
    own = {
        "ours": layers.routed(layer, "auto"),
        "our dense layer": lambda key: Dense(Site(layers.WIDTH), layers.PER_TOKEN * layers.HIDDEN, key),
    }
    runs: dict[str, Run] = {name: layers.case(name, build).call for name, build in own.items()}
    runs["eager"] = step(block)
    if compiled:
        runs["compiled"] = step(torch.compile(block))
    tokens = layers.SEQUENCES * layers.SEQ
    return Case(f"{count} experts, {layers.PER_TOKEN} of them for {tokens} tokens", runs, "other weights")


def machine() -> tuple[float, float]:
    """FLOP/s of a square matmul, and bytes per second read and written by a copy: the best of a few."""
    matmul, copied = matmul_timer(jax.devices()[0], jnp.dtype("float32")), np.ones(2**26, np.float32)
    into, copy = np.empty_like(copied), 0.0
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(into, copied)
        copy = max(copy, 2 * copied.nbytes / (time.perf_counter() - begin))
    return max(matmul() for _ in range(5)), copy


def _about(matmul: float, copy: float) -> dict[str, str]:
    import torch
    import transformers

    return {
        "matmul": f"{matmul / 1e9:.0f} GFLOP/s",
        "copy": f"{copy / 1e9:.1f} GB/s",
        "cores": str(os.cpu_count()),
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _table(found: Sequence[Measured]) -> Table:
    out = Table("", "ours, ms", "beside", "ms", "over ours", "seen equal", padding=(0, 1))
    for case in found:
        for i, (way, ratio) in enumerate(case.ratios.items()):
            first = (case.name, f"{case.seconds['ours'] * 1e3:.1f}") if i == 0 else ("", "")
            out.add_row(*first, way, f"{case.seconds[way] * 1e3:.1f}", f"{ratio:.2f}", case.agree if i == 0 else "")
    return out
