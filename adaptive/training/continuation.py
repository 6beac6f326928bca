"""What a trained model writes after the recipe's prompt."""

from collections.abc import Callable

import jax
from flax import nnx

from adaptive.data.tokenizers import Tokenizer
from adaptive.inference.diffusion.texts import written
from adaptive.inference.sampling import marker_of, prompt_tokens, sample
from adaptive.runs.load import Trained
from adaptive.runs.state import TrainState
from adaptive.training.program import Program
from adaptive.training.report.schema import SampleRecord


def continuation(
    program: Program, tokenizer: Tokenizer, state: TrainState, say: Callable[[str], None]
) -> SampleRecord | None:
    """Made on one device; None where the recipe wants none, the model cannot write, which is said, or the state is
    spread over processes."""
    recipe = program.recipe
    log = recipe.log
    if not log.sample_tokens or jax.process_count() > 1:
        return None
    fills = recipe.objective.denoising() is not None
    if (reason := program.refuse_generation) and not fills:
        say(f"no sample: {reason}")
        return None
    model = nnx.merge_state(*jax.device_put((state.params, state.buffers), jax.local_devices()[0]))
    prompt, key = prompt_tokens(tokenizer, log.sample_prompt), jax.random.key(recipe.train.seed)
    if reason:
        trained = Trained(recipe, int(state.step), program.graphdef, model, tokenizer, reason)
        ids = written(trained, prompt, log.sample_tokens, key)
        return SampleRecord(log.sample_prompt, tokenizer.decode(ids))
    ids = sample(
        program.graphdef,
        model,
        prompt,
        log.sample_tokens,
        key,
        vocab=tokenizer.vocab_size,
        end=tokenizer.eos_id,
        marker=marker_of(recipe, tokenizer),
    )
    return SampleRecord(log.sample_prompt, tokenizer.decode(ids))
