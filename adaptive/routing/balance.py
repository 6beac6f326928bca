"""Balancing losses of a mixture of experts, float32. n_e counts pairs before dropping and has no gradient.

form        formula                                                   balanced
switch      E sum_e P_e n_e / (T k)          Switch, Megatron, MegaBlocks     1
hf          E sum_e P_e n_e / T              over the tokens of all layers    k
maxtext     switch times k, per sequence, mean over the batch                k
flaxformer  E sum_e P_e n_e / T per group, mean over the groups              k
gshard      E sum_e P_e n1_e / T, n1 counts first choices alone              1
sequence    per sequence, P of scores normalised over experts (DeepSeek)     1

P_e is the mean over tokens of the softmax over all experts (sequence: of the normalised sigmoid where that scores), T
the tokens. Flaxformer's groups are sequences; over a whole batch as one group its form is that of hf. Tokens that are
not present count nowhere, nor do sequences without any.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from adaptive.routing.losses import Product, Sums, averaged
from adaptive.routing.select import top_choices
from adaptive.routing.types import Summed

Form = Literal["switch", "hf", "maxtext", "flaxformer", "gshard", "sequence"]


def balancing_loss(
    probabilities: jax.Array, index: jax.Array, valid: jax.Array, present: jax.Array | None, form: Form
) -> Summed:
    """One layer's balancing loss.

    probabilities  f32[batch, seq, choices]  normalised over the choices, with gradient
    index, valid   [batch, seq, k]           the choices of each token, best first, before dropping
    present        bool[batch, seq]          tokens that count; None: all
    """
    choices, k = probabilities.shape[-1], index.shape[-1]
    counted = valid if present is None else valid & present[..., None]
    if form == "gshard":
        counted = counted & (jnp.arange(k) == 0)
    scale = choices / k if form in ("switch", "sequence") else float(choices)
    n = claims(index, counted, choices)  # [batch, choices]
    where = jnp.ones(probabilities.shape[:2], jnp.float32) if present is None else present.astype(jnp.float32)
    p = (probabilities * where[..., None]).sum(1)  # [batch, choices]
    tokens = where.sum(1)
    if form in ("maxtext", "flaxformer", "sequence"):
        each = jax.vmap(Product(scale))({"weight": p, "claims": n, "tokens": tokens})
        return averaged(each, tokens > 0)
    return Summed({"weight": p.sum(0), "claims": n.sum(0), "tokens": tokens.sum()}, Product(scale))


def claims(index: jax.Array, valid: jax.Array, choices: int) -> jax.Array:
    """f32[batch, choices]: how many tokens of each sequence chose each."""
    ids = jnp.where(valid, index, choices).reshape(index.shape[0], -1)
    return jax.vmap(lambda row: jnp.zeros(choices + 1, jnp.float32).at[row].add(1.0))(ids)[:, :choices]


def importance_and_load(
    probabilities: jax.Array,
    noisy: jax.Array,
    values: jax.Array,
    k: int,
    noise: float,
    present: jax.Array | None = None,
) -> Summed:
    """(CV^2(importance) + CV^2(load)) / 2 (V-MoE, appendix A; Tutel's second loss).

    probabilities, noisy, values  f32[batch, seq, E]: the softmax without noise, the logits that were compared, and what
                                  the load compares with the k-th largest of those (V-MoE: the logits without noise;
                                  Tutel as released: the softmax)
    noise                         its standard deviation times E, above 0
    present                       bool[batch, seq]: tokens that count; None: all

    Sample variance, denominators + 1e-10. E must be at least 2.
    """
    experts = probabilities.shape[-1]
    where = jnp.ones(noisy.shape[:2], jnp.float32) if present is None else present.astype(jnp.float32)
    threshold = jnp.take_along_axis(noisy, top_choices(noisy, k)[..., -1:], axis=-1)
    load = jax.scipy.stats.norm.cdf((values - threshold) / (noise / experts))
    total = lambda shares: (shares * where[..., None]).sum((0, 1))  # noqa: E731
    return Summed({"importance": total(probabilities), "load": total(load)}, _variation)


def _variation(sums: Sums) -> jax.Array:
    cv2 = lambda total: jnp.var(total, ddof=1) / (jnp.square(jnp.mean(total)) + 1e-10)  # noqa: E731
    return 0.5 * (cv2(sums["importance"]) + cv2(sums["load"]))
