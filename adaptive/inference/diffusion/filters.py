"""What a learned filter is fitted to: calls of a decoder that decodes plainly."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.inference.diffusion.decoder import Decoder, laid_out
from adaptive.inference.diffusion.loop import start


class Observed(NamedTuple):
    """Arguments of `adaptive.inference.diffusion.policies.learned.fit`, [calls, block] each."""

    confidence: np.ndarray
    final: np.ndarray
    free: np.ndarray


def observed(decoder: Decoder, prompts: Sequence[np.ndarray], key: jax.Array | None = None) -> Observed:
    """Every call on every row's block: how sure the proposals were, which are what was written in the end, and which
    positions were not written yet."""
    plan = decoder.plan
    tokens, _, begin = laid_out(prompts, plan, int(decoder.network.shifted))
    before, calls = start(jnp.asarray(tokens), begin, plan=plan), []
    for step in decoder.steps(prompts, key):
        calls.append((before, step.proposal))
        before = step.progress
    last, found = np.asarray(before.tokens), []
    for progress, proposal in calls:
        block = np.asarray(progress.block)
        places = (begin + block * plan.block)[:, None] + np.arange(plan.block)
        rows = np.flatnonzero((block < plan.blocks) & (places[:, -1] < last.shape[1]))
        at = rows[:, None], places[rows]
        free = np.asarray(progress.tokens)[at] == plan.mask
        sure = np.where(free, np.asarray(proposal.confidence)[at], 1.0)
        found.append((sure.astype(np.float32), np.asarray(proposal.token)[at] == last[at], free))
    return Observed(*map(np.concatenate, zip(*found, strict=True)))
