"""What a prediction cost, by the account: what is paid for, and what was active by the trace."""

import itertools
from typing import Any

from adaptive.account import account, at_depths, dense_equivalent
from adaptive.errors import RecipeError
from adaptive.evaluation.predictions import Computed
from adaptive.models.bodies.recursive import Settings as Recursive
from adaptive.models.language_model import Settings
from adaptive.recipe import Recipe
from adaptive.settings import nodes


def recursion_of(model: Settings) -> Recursive | None:
    """The settings of its recursion; None where every token goes through all layers once."""
    at = model.facts().recursion
    return next((node for path, node in nodes(model, "model") if path == at and isinstance(node, Recursive)), None)


def compute_per_token(recipe: Recipe, rule: str, passes: int | None, computed: Computed) -> dict[str, Any]:
    """Forward MFLOP per token of a row, causal pairs alone (`adaptive.account`).

    paid    by the rule "train" the capacities; by "causal" as if every token took every pass and began a chunk, since
            routers decide under a mask
    active  what the tokens' own depths and chunks amount to; None where they do not say
    """
    model, seq = recipe.model, recipe.data.seq_len
    body = recursion_of(model)
    told: dict[str, Any] = {}
    if body is not None and len(model.body.stages()) == 1:
        shares = computed.depths[1:] / max(computed.depths[1:].sum(), 1)
        told["mean_depth"] = float(sum((i + 1) * share for i, share in enumerate(shares)))
        told["depth_shares"] = [round(float(share), 6) for share in shares]
        paid, active = _of_recursion(model, body, seq, rule, passes, shares)
    elif len(computed.chunks):
        chunks = [float(seq * c / max(computed.read, 1)) for c in computed.chunks]
        told["tokens_per_chunk"] = [
            a / b if b else None for a, b in itertools.pairwise([float(computed.read), *computed.chunks])
        ]
        whole = account(model, seq) if rule == "train" else dense_equivalent(model, seq)
        paid = whole.forward_flops_per_token
        active = account(model, seq, chunks).forward_flops_per_token if min(chunks) > 0 else None
    else:
        paid = active = account(model, seq).forward_flops_per_token
    shown = lambda flops: None if flops is None else round(flops / 1e6, 6)  # noqa: E731
    return {"mflop_per_token": {"paid": shown(paid), "active": shown(active)}, **told}


def _of_recursion(
    model: Settings, body: Recursive, seq: int, rule: str, passes: int | None, shares: Any
) -> tuple[float, float | None]:
    most = body.recursions
    taken = most if passes is None else passes
    if body.depth.equal_passes:
        whole = dense_equivalent(model, seq).forward_flops_per_token
        if taken == most:
            return whole, whole
        if taken < most:
            counts = tuple(float(seq) if r < taken else 0.0 for r in range(most))
            paid = account(model, seq, counts).forward_flops_per_token
            return paid, paid
        one = sum(c.useful for c in account(model, seq).stages if c.recursion == most) / seq
        return whole + (taken - most) * one, whole + (taken - most) * one
    counts = tuple(seq for _ in range(most)) if rule == "causal" else body.pass_counts(seq)
    paid = account(
        model, seq, tuple(float(n) if r < taken else 0.0 for r, n in enumerate(counts))
    ).forward_flops_per_token
    try:
        active = at_depths(model, seq, [*shares, *[0.0] * (most - len(shares))]).forward_flops_per_token
    except RecipeError:  # a depth does not say which passes they were
        active = None
    return paid, active
