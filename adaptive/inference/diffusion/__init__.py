"""Decoding of masked-diffusion language models: a call of a denoiser proposes a token for every position, and a policy
says which of them are written."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.errors import UserError
from adaptive.inference.diffusion.loop import Plan, advance, proposed, row_keys, start, with_blind
from adaptive.inference.diffusion.policies import Policy, confidence
from adaptive.inference.diffusion.policies import threshold as thresholds

Denoise = Callable[[jax.Array], Any]


def decode(
    denoise: Denoise,
    prompt: Any,
    length: int,
    *,
    mask_id: int,
    steps: int,
    block: int,
    guidance: float = 0.0,
    threshold: float | None = None,
    policy: str | Policy = "confidence",
    key: jax.Array | None = None,
    temperature: float = 0.0,
    trace: bool = False,
) -> Any:
    """Writes `length` tokens behind each prompt, as LLaDA's released generate.py (Nie et al. 2025, arXiv 2502.09992)
    and, with a threshold, Fast-dLLM's (Wu et al. 2025, arXiv 2505.22618).

    denoise      tokens i32[rows, n] -> logits f32[rows, n, vocab], called with n = p + length; under guidance with
                 twice as many rows, of which the second half has the mask at every place that the prompt had given
    prompt       i32[rows, p]; masks in it are written too, as places before the block that is written
    mask_id      is never proposed: its logits count as -inf
    steps        calls of all blocks together; of a block with m masks and s calls, call i writes m // s positions and
                 one more while i < m % s. Read by the policies "confidence" and "random" alone
    block        positions of a block, which divides length; blocks are written from left to right
    guidance     w > 0: logits become u + (w + 1) (logits - u), u being those of the second half
    threshold    writes at each call every position of the block whose proposal has at least this probability, and the
                 likeliest, until the block is written, in place of a schedule
    policy       "confidence": the likeliest proposals; "random": places at random; another member of
                 adaptive/inference/diffusion/policies by name, or its settings
    key          of draws: row r draws with jax.random.fold_in(key, r); or keys [rows], one for each
    temperature  0: proposals are the likeliest tokens, the lowest id of equals; above 0: drawn with Gumbel noise in
                 float64. Confidence is the proposal's probability by logits without noise, in float32; of places with
                 equal confidence the earlier is written
    trace        whether the ids at every call are returned as well

    Returns (tokens i32[rows, p + length], calls of denoise), with trace (tokens, calls, ids i32[calls, rows,
    p + length] after each call). Raises UserError for numbers that cannot work, with those that would.
    """
    plan = Plan(mask_id, length, steps, block, guidance, temperature, _policy(policy, threshold), together=True).check()
    given = np.asarray(prompt, np.int32)
    if given.ndim != 2:
        raise UserError(f"prompt has the shape {given.shape}: must be [rows, tokens]")
    tokens = np.pad(given, ((0, 0), (0, length)), constant_values=mask_id)
    begin = jnp.full(len(tokens), given.shape[1], jnp.int32)
    keys, known = row_keys(plan, key, len(tokens)), jnp.asarray(tokens != mask_id)
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    progress, seen = start(jnp.asarray(tokens), begin, plan=plan), []
    calls = 0
    while np.asarray(progress.block).min(initial=plan.blocks) < plan.blocks:
        logits = jnp.asarray(denoise(with_blind(progress.tokens, known, plan=plan)))
        proposal = proposed(plan, progress, logits, keys, places)
        progress = advance(progress, proposal, begin, keys, plan=plan)
        calls += 1
        if trace:
            seen.append(np.asarray(progress.tokens))
    if trace:
        return progress.tokens, calls, np.stack(seen) if seen else np.zeros((0, *tokens.shape), np.int32)
    return progress.tokens, calls


def _policy(policy: str | Policy, threshold: float | None) -> Policy:
    found = Policy.member(policy, where="policy")() if isinstance(policy, str) else policy
    if threshold is None:
        return found
    if type(found) not in (confidence.Settings, thresholds.Settings):
        raise UserError(f"threshold={threshold} is of the policies confidence and threshold, not of {found.kind()}")
    return thresholds.Settings(threshold)
