"""Masked diffusion: some tokens of a text are hidden, and the model, which sees all positions, says what they are.

Losses of EC-DLM, LLaDA (arXiv 2502.09992) and MDLM (arXiv 2406.07524) as pure functions of logits (docs/diffusion.md).
"""

import jax
import jax.numpy as jnp

NEVER = -1e6  # the log-probability of what cannot be, as MDLM writes minus infinity
LEAST_KEPT = 1e-3  # MDLM's share of tokens that the log-linear schedule keeps at t = 1


def ecdlm_loss(logits: jax.Array, tokens: jax.Array, masked: jax.Array, stable: bool = False) -> jax.Array:
    """f32[]: the sum of masked tokens' cross entropy, over all positions, each divided by its row's masked share.

    logits  [batch, seq, vocab], not shifted: position i says token i
    tokens  i32[batch, seq], none hidden
    masked  bool[batch, seq], those that were hidden; a row without any adds nothing
    stable  without the division, for training whose gradients are to be alike whatever the share
    """
    share = jnp.mean(masked, axis=-1, dtype=jnp.float32, keepdims=True)
    weight = 1.0 if stable else 1 / jnp.where(share > 0, share, 1.0)
    return (_cross_entropy(logits, tokens) * masked * weight).mean()


def llada_loss(
    logits: jax.Array,
    tokens: jax.Array,
    masked: jax.Array,
    t: jax.Array,
    eps: float = 1e-3,
    prompt_length: jax.Array | None = None,
) -> jax.Array:
    """f32[]: masked tokens' cross entropy, each divided by the probability (1 - eps) t + eps of its being hidden.

    logits, tokens, masked  as of `ecdlm_loss`
    t              f32[batch] or f32[], uniform in 0 to 1
    prompt_length  i32[batch] or i32[]: tokens before it are given and do not count, and each row's sum is divided by
                   the number of the others (fine-tuning); None: by all positions
    """
    seq = tokens.shape[-1]
    hidden = (1 - eps) * _of_rows(t) + eps
    answer = jnp.ones(tokens.shape, bool)
    if prompt_length is not None:
        answer = jnp.broadcast_to(jnp.arange(seq) >= _of_rows(prompt_length), tokens.shape)
    summed = (_cross_entropy(logits, tokens) * (masked * answer) / hidden).sum(-1)
    return (summed / jnp.maximum(answer.sum(-1), 1)).mean()


def mdlm_loss(
    logits: jax.Array, noisy: jax.Array, tokens: jax.Array, t: jax.Array, mask_id: int
) -> jax.Array:  # fmt: skip
    """f32[]: MDLM's bound in continuous time: the mean over positions of -log p(token) sigma'(t) / (e^sigma(t) - 1).

    logits  [batch, seq, vocab], made into probabilities by `subs_log_probs`
    noisy   i32[batch, seq] that the model read, `mask_id` where a token is hidden
    tokens  i32[batch, seq], none hidden
    t       f32[batch] or f32[] above 0
    """
    log_p = jnp.take_along_axis(subs_log_probs(logits, noisy, mask_id), tokens[..., None], axis=-1)[..., 0]
    sigma, rate = log_linear_noise(_of_rows(t))
    return (-log_p * rate / jnp.expm1(sigma)).mean()


def log_linear_noise(t: jax.Array, eps: float = LEAST_KEPT) -> tuple[jax.Array, jax.Array]:
    """(sigma, its derivative by t), f32 as t: a token is hidden with probability 1 - exp(-sigma) = (1 - eps) t."""
    t = jnp.asarray(t, jnp.float32)
    return -jnp.log1p(-(1 - eps) * t), (1 - eps) / (1 - (1 - eps) * t)


def subs_log_probs(logits: jax.Array, noisy: jax.Array, mask_id: int) -> jax.Array:
    """f32[batch, seq, vocab]: MDLM's parameterisation, where no token is the mask and what is not hidden stays.

    Log-probabilities from `logits` [batch, seq, vocab] of what was read as `noisy` i32[batch, seq]; of what cannot be
    they are about `NEVER`.
    """
    vocab = jnp.arange(logits.shape[-1])
    allowed = logits.astype(jnp.float32) + jnp.where(vocab == mask_id, NEVER, 0.0)
    kept = jnp.where(vocab == noisy[..., None], 0.0, NEVER)
    return jnp.where(noisy[..., None] == mask_id, jax.nn.log_softmax(allowed, axis=-1), kept)


def _cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


def _of_rows(a: jax.Array) -> jax.Array:
    """[batch] or [] -> [batch, 1] or [1]."""
    return jnp.asarray(a)[..., None]
