"""Masked diffusion: some tokens of a text are hidden, and the model, which sees all positions, says what they are.

Losses of EC-DLM, LLaDA (arXiv 2502.09992) and MDLM (arXiv 2406.07524) as pure functions of logits (docs/diffusion.md).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.mixers import Mixer
from adaptive.objectives import Denoising, Inputs, Loss, Objective, Standing
from adaptive.objectives.cross_entropy import NEVER
from adaptive.objectives.next_token import weighted_loss
from adaptive.objectives.noise import (
    LEAST_KEPT,
    Draws,
    Noise,
    Units,
    Weighting,
    by_chance,
    by_number,
    complement,
    log_linear_noise,
    ratios,
    whole_rows,
)
from adaptive.routing.types import Output
from adaptive.settings import nodes, ranged

__all__ = ["Settings", "ecdlm_loss", "llada_loss", "log_linear_noise", "mdlm_loss", "subs_log_probs"]


@dataclasses.dataclass(frozen=True)
class Settings(Objective):
    """What hidden tokens are, given all others. Attention sees both ways, and position i says token i.

    Each row has a share of hidden tokens of its own; prompts are never hidden. Evaluation is an upper bound on the
    nats of the text, whatever is trained: of each row's n tokens 1 + floor(t n) are hidden, and their cross entropies
    count n over that number.

    weighting      exact: one over the exact share of hidden tokens (EC-DLM); llada: one over the probability of being
                   hidden (LLaDA); mdlm: 1 / t, with MDLM's log-linear noise and the mask never predicted
    stable         training leaves that weight out, so that rows with few hidden tokens count less (EC-DLM)
    draws          of shares in a batch; antithetic: a row's and 1 less that follow each other
    complementary  every row is read twice, the second time with hidden what was not
    eps            the least share
    mask_id        the token that stands for hidden ones; -1: the tokenizer's own, or the first id behind its tokens
    """

    causal: ClassVar[bool] = False
    noisy: ClassVar[bool] = True

    weighting: Weighting = "exact"
    stable: bool = False
    draws: Draws = "stratified"
    complementary: bool = False
    eps: float = ranged(LEAST_KEPT, above=0, below=1)
    mask_id: int = ranged(-1, least=-1)

    def check(self, vocab: int) -> None:
        if self.mask_id >= vocab:
            raise RecipeError(
                f"objective.mask_id={self.mask_id}: the model has the ids 0 to {vocab - 1}; set model.vocab_size="
                f"{self.mask_id + 1} or more"
            )
        if self.weighting != "exact" and (self.complementary or self.stable):
            name = "complementary" if self.complementary else "stable"
            raise RecipeError(f"objective.{name}=true is for objective.weighting=exact, not {self.weighting}")

    def check_model(self, model: Any) -> None:
        check_both_ways(self, model)

    def denoising(self) -> Denoising:
        return Denoising(self.mask_id, 0, False)

    def unread(self) -> dict[str, str]:
        return {"eps": "weighting=exact hides one token at least"} if self.weighting == "exact" else {}

    def inputs(self, batch: Any, key: jax.Array | None) -> Inputs:
        assert key is not None
        share, chance = jax.random.split(key)
        counted, units = self.counted(batch), self.units(batch)
        t = self.shares(share, batch)
        noise = by_chance(chance, t, counted, units, self.weighting, self.eps, stable=self.stable)
        if not self.complementary:
            return self.read(batch, noise, counted)
        other = complement(noise, counted, units, stable=self.stable)
        twice = Noise(
            *(jnp.stack(pair, axis=1).reshape(-1, pair[0].shape[1]) for pair in zip(noise, other, strict=True))
        )
        batch = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), batch)
        return self.read(batch, twice._replace(weights=twice.weights / 2), jnp.repeat(counted, 2, axis=0))

    def held_out(self, batch: Any, key: jax.Array | None) -> Inputs:
        assert key is not None
        share, chance = jax.random.split(key)
        counted, units = self.counted(batch), self.units(batch)
        stratified = dataclasses.replace(self, draws="stratified")
        noise = by_number(chance, stratified.shares(share, batch), counted, units)
        return self.read(batch, noise, counted)

    def count(self, batch: Any) -> jax.Array:
        return jnp.maximum(self.counted(batch).sum(dtype=jnp.float32), 1.0)

    def loss(self, model: Any, out: Output, inputs: Inputs, chunk: int) -> Loss:
        return weighted_loss(model, out, inputs, chunk, self.never)

    @property
    def never(self) -> int:
        """The token that is never predicted; -1: there is none."""
        return self.mask_id if self.weighting == "mdlm" else -1

    @property
    def readings(self) -> int:
        return 1 + self.complementary

    def forward_flops(self, stages: Sequence[Any]) -> float:
        return float(sum(stage.forward for stage in stages))  # all pairs of positions

    # What is drawn of a batch, and what is read of it

    def counted(self, batch: Any) -> jax.Array:
        """bool[batch, seq]: tokens that may be hidden: no padding and, but for what opens a document, no prompt."""
        predicted = jnp.asarray(batch.mask) > 0  # of the token that follows each
        after = jnp.pad(predicted[:, :-1], ((0, 0), (1, 0)))
        opens = jnp.asarray(batch.positions) == 0
        return (jnp.asarray(batch.segment_ids) > 0) & jnp.where(opens, predicted, after)

    def units(self, batch: Any) -> Units:
        """What has a share of hidden tokens of its own."""
        return whole_rows(batch.tokens.shape)

    def shares(self, key: jax.Array, batch: Any) -> jax.Array:
        """f32[batch, seq], the same within a unit: uniform on 0 to 1."""
        rows, seq = batch.tokens.shape
        return jnp.broadcast_to(ratios(key, rows, self.draws)[:, None], (rows, seq))

    def read(self, batch: Any, noise: Noise, counted: jax.Array) -> Inputs:
        """The batch with hidden tokens, and how positions stand."""
        tokens = jnp.asarray(batch.tokens)
        present = jnp.maximum((jnp.asarray(batch.segment_ids) > 0).sum(-1, dtype=jnp.float32), 1.0)
        return Inputs(
            jnp.where(noise.hidden, self.mask_id, tokens),
            tokens,
            noise.weights,
            mask_ratio=noise.hidden.sum(-1, dtype=jnp.float32) / present,
            standing=Standing(batch.positions, batch.segment_ids, batch.boundaries),
            counted=counted.astype(jnp.float32),
            before=jnp.concatenate([tokens[:, :1], tokens[:, :-1]], axis=1),
        )


def check_both_ways(aim: Objective, model: Any) -> None:
    """Raises RecipeError for a model with parts that see the past alone."""
    if len(model.body.stages()) > 1:
        raise RecipeError(f"objective={aim.kind()} sees both ways, and chunks of an H-Net are decided from the past")
    for path, node in nodes(model, "model"):
        if isinstance(node, Mixer) and not node.both_ways:
            raise RecipeError(
                f"objective={aim.kind()} sees both ways, and {path}={node.kind()} the past alone: use attention"
            )


# Losses as functions of logits


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
