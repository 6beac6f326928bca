"""FLOPs as papers count them: for comparison with what they print, not for what is executed."""

from collections.abc import Sequence
from typing import Any

from adaptive.layers import block as blocks
from adaptive.layers import stack as stacks
from adaptive.layers.cost import Span
from adaptive.layers.mixers import attention, mamba2
from adaptive.layers.site import Site
from adaptive.models.bodies import hnet, plain, recursive
from adaptive.models.language_model import Settings


def paper_flops_per_token(model: Settings, seq_len: int) -> float:
    """Forward FLOPs per token in the accounting of the MoR paper, of H-Nets in that of their own
    (`paper_flops_per_byte`), with as many chunks as the chunkers aim at.

    MoR paper: embedding and head excluded, keys and values counted as if each query head had its own, attention causal:
    a layer is 8 d^2 + 6 d d_ff, attention 2 d S. Capacity c scales the layer by c and attention by c^2; shared keys and
    values leave out their 4 d^2 after the first recursion and scale attention by c. Token choice counts as expert
    choice, perfectly balanced. Reconstructed from the released step counts, all of which it gives within one step. The
    paper has no such figure for hybrid keys and values; here they cost their projections at capacity c. Other mixers
    and feed-forwards count as executed, routers of experts left out.
    """
    body = model.body
    if isinstance(body, recursive.Settings):
        total = sum(_mor_layers(part, model.width, seq_len) for part in body.ends)
        for r, share in enumerate(body.depth.paper_fractions(body.recursions)):
            first = r == 0 or body.keys_values == "per_recursion"
            saved = r > 0 and body.keys_values == "shared"
            total += _mor_layers(body.core, model.width, seq_len, share, 2 if first else 1, saved)
        return total
    if isinstance(body, plain.Settings):
        return _mor_layers(body.stack, model.width, seq_len)
    return paper_flops_per_byte(model, seq_len)


def paper_flops_per_byte(
    model: Settings, seq_len: int, ratios: Sequence[float] | None = None, bytes_per_token: float = 1.0
) -> float:
    """Forward FLOPs per byte in the accounting of the H-Net paper (appendix B), attention over all pairs of the window.

    ratios           positions per chunk of each stage; None: what the chunkers aim at
    bytes_per_token  of a network without chunking on tokens

    Two corrections, without which the paper's own figures do not come out: Mamba-2's output projection has its 2 D
    inputs, and the three square matrices of router and residual projection are counted. What the paper has no formula
    for, a recursion inside or another mixer, counts as executed.
    """
    total, share, stage = 4.0 * model.vocab_size * model.width, 1.0, 0
    for body, width in zip(model.body.stages(), model.body.widths(model.width), strict=True):
        positions = seq_len * share
        if isinstance(body, hnet.Settings):
            total += share * 2 * (body.chunker.parameters(width) + width**2)
            total += share * sum(_hnet_layers(part, width, positions) for part in (body.encoder, body.decoder))
            share /= body.chunker.expected() if ratios is None else ratios[stage]
            stage += 1
        elif isinstance(body, plain.Settings):
            total += share * _hnet_layers(body.stack, width, positions)
        else:
            total += sum(part.forward for part in body.cost(width, max(1, round(positions)))) / seq_len
    return total / bytes_per_token


# Parts


def _mor_layers(
    stack: stacks.Settings, width: int, seq_len: int, share: float = 1.0, power: int = 2, saved: bool = False
) -> float:
    """FLOPs per token of a stack at capacity `share`, whose attention grows with this power of it; saved: whether it
    leaves out keys and values."""
    total = 0.0
    for one in stack.blocks:
        linear, attends = _feed_forward(one, width, seq_len), 0.0
        if isinstance(one.mixer, attention.Settings):
            linear += (4 if saved else 8) * width * width
            attends = 2.0 * width * seq_len
        elif one.mixer is not None:
            linear += one.mixer.cost(width, Span.whole(seq_len)).forward / seq_len
        total += stack.repeats * one.repeat * (share * linear + share**power * attends)
    return total


def _hnet_layers(stack: stacks.Settings, width: int, positions: float) -> float:
    """FLOPs per position of a stack, as the H-Net paper prints them."""
    total = 0.0
    for one in stack.blocks:
        own = _hnet_mixer(one.mixer, width, positions)
        if one.feed_forward is not None:
            own += _feed_forward(one, width, positions) + 5 * width
        total += stack.repeats * one.repeat * own
    return total


def _hnet_mixer(mixer: Any, width: int, positions: float) -> float:
    if mixer is None:
        return 0.0
    if isinstance(mixer, attention.Settings):
        keys = min(positions, mixer.window) if mixer.window else positions
        return 8 * width * width + 4 * keys * width + 3 * mixer.heads * keys
    if isinstance(mixer, mamba2.Settings):
        heads, n = mixer.heads(width), mixer.d_state
        inner = heads * mixer.head_dim
        projected = 2 * width * (2 * inner + 2 * n + heads) + 2 * inner * width
        return projected + 6 * inner * n + 2 * width * mixer.d_conv + 5 * width
    return mixer.cost(width, Span.whole(positions)).forward / positions


def _feed_forward(one: blocks.Settings, width: int, positions: float) -> float:
    """FLOPs per position, without a router's."""
    if one.feed_forward is None:
        return 0.0
    return one.feed_forward.cost(positions, Site(width)).feed_forward / positions
