"""What a trained model writes after the recipe's prompt."""

from collections.abc import Callable

import jax
from flax import nnx

from adaptive.data.tokenizers import Tokenizer
from adaptive.inference.sampling import marker_of, prompt_tokens, sample
from adaptive.runs.state import TrainState
from adaptive.training.program import Program
from adaptive.training.report.schema import SampleRecord


def continuation(
    program: Program, tokenizer: Tokenizer, state: TrainState, say: Callable[[str], None]
) -> SampleRecord | None:
    """Made on one device; None where the recipe wants none, the model has no cached generation, which is said, or the
    state is spread over processes."""
    recipe = program.recipe
    log = recipe.log
    if not log.sample_tokens or jax.process_count() > 1:
        return None
    if reason := program.refuse_generation:
        say(f"no sample: {reason}")
        return None
    params, buffers = jax.device_put((state.params, state.buffers), jax.local_devices()[0])
    ids = sample(
        program.graphdef,
        nnx.merge_state(params, buffers),
        prompt_tokens(tokenizer, log.sample_prompt),
        log.sample_tokens,
        jax.random.key(recipe.train.seed),
        vocab=tokenizer.vocab_size,
        end=tokenizer.eos_id,
        marker=marker_of(recipe, tokenizer),
    )
    return SampleRecord(log.sample_prompt, tokenizer.decode(ids))
