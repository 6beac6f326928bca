"""What an H-Net costs: parameters and matmul FLOPs, in the terms of `adaptive.account`, from its configuration alone.

Inner networks compute as many positions as the capacity has slots, whether chunks fill them or not: that is what is
paid. What the chunks needed is the account at their true number (`taken`). Capacities are those of each row; where the
rows of a device share them (model.hnet.packing=device), attention between rows, which is masked, is not counted.
"""

import dataclasses
import math
from collections.abc import Sequence

from adaptive.account import Account, Parameters, Stage
from adaptive.account import account as plain_account
from adaptive.account import parameters as plain_parameters
from adaptive.errors import RecipeError
from adaptive.layers.layout import Blocks, BlockShape, Run
from adaptive.models.config import TransformerConfig
from adaptive.models.hnet_config import HNetConfig

SCAN_BLOCK = 64  # positions of a block of the scan at most, as `kernels_pallas.ssd` has it in plain jax.numpy


def parameters(config: TransformerConfig) -> Parameters:
    """Numbers of parameters; `layer` is 0, since layers of several kinds make up the network. `routers` is what decides
    where chunks begin, and depth inside."""
    h = config.hnet
    inner = plain_parameters(inner_config(config)) if h.parsed().house else None
    table = config.vocab_size * h.shape(0).width
    chunkers = sum(2 * h.shape(s).width ** 2 for s in range(h.stages) if h.learned(s))
    routers = chunkers + (inner.routers if inner else 0)
    unique = sum(stage_parameters(config)) - routers
    return Parameters(
        layer=0,
        unique=unique,
        effective=unique + (inner.effective - inner.unique if inner else 0),
        embedding=table,
        head=0 if config.tie_embeddings else table,
        routers=routers,
    )


def stage_parameters(config: TransformerConfig) -> tuple[int, ...]:
    """Numbers of parameters of each stage, the innermost network last; embeddings and head belong to none.

    A chunking stage is its encoder, decoder, chunker, residual projection and the vector that widens its input.
    """
    h, layout, out = config.hnet, config.hnet.parsed(), []
    for s in range(h.stages + 1):
        shape = h.shape(s)
        total = shape.width - h.shape(s - 1).width if s else 0
        if s < h.stages:
            total += shape.width**2 * (1 + 2 * h.learned(s)) + shape.width
        if s == h.stages and layout.house:
            inner = plain_parameters(inner_config(config))
            total += inner.unique + inner.routers
        else:
            total += sum(shape.width + sum(_block_parameters(shape, run) for run in blocks) for blocks in layout.at(s))
        out.append(total)
    return tuple(out)


def layers(config: TransformerConfig) -> tuple[int, int]:
    """(layers as stored, layers that a chunk's bytes pass through): they differ where the model inside shares some."""
    layout = config.hnet.parsed()
    own = sum(run.count for s in range(layout.stages + 1) for blocks in layout.at(s) for run in blocks)
    return (own + config.unique_layers, own + config.num_layers) if layout.house else (own, own)


def account(
    config: TransformerConfig,
    seq_len: int,
    taken: Sequence[float] | None = None,
    inner_taken: Sequence[float] | None = None,
) -> Account:
    """The account of one H-Net on rows of `seq_len` bytes.

    taken        chunks per row that each chunking stage passes on, fractions allowed (averages): what was useful;
                 None: the capacities, which is what is paid. Of capacities on a schedule, the last ones.
    inner_taken  chunks that each recursion of the model inside computes; None: its capacities
    Raises RecipeError unless there is one number for each stage.
    """
    counts = chunk_counts(config.hnet, seq_len) if taken is None else tuple(taken)
    h, layout = config.hnet, config.hnet.parsed()
    if len(counts) != h.stages:
        raise RecipeError(f"{len(counts)} chunk counts for the {h.stages} chunking stages of {h.layout}: give one each")
    lengths = (float(seq_len), *counts)
    into, out = [], []
    for s in range(h.stages):
        encoder, decoder = layout.at(s)
        into.append(_blocks(f"encoder {s}", h.shape(s), encoder, lengths[s]))
        into.append(_chunking(f"chunking {s}", h.shape(s).width, lengths[s], learned=h.learned(s)))
        out.append(_blocks(f"decoder {s}", h.shape(s), decoder, lengths[s]))
    if layout.house:
        inner = plain_account(inner_config(config), lengths[-1], inner_taken)
        main = [stage for stage in inner.stages if not stage.head]
    else:
        main = [_blocks("main network", h.shape(h.stages), layout.main, lengths[-1])]
    head = Stage("head", 0, seq_len, 0, head=2.0 * seq_len * h.shape(0).width * config.vocab_size)
    return Account(parameters(config), seq_len, (*into, *main, *reversed(out), head))


def dense_equivalent(config: TransformerConfig, seq_len: int) -> Account:
    """The account were every position a chunk, and every chunk to take every recursion of the model inside."""
    depth = (seq_len,) * config.recursions if config.hnet.parsed().house else None
    return account(config, seq_len, (seq_len,) * config.hnet.stages, depth)


def at_depths(config: TransformerConfig, seq_len: int, reached: Sequence[float]) -> Account:
    """The account were `reached[r]` of the innermost chunks to take recursion r + 1 of the model inside."""
    chunks = chunk_counts(config.hnet, seq_len)[-1]
    return account(config, seq_len, inner_taken=tuple(chunks * share for share in reached))


def chunk_counts(hnet: HNetConfig, seq_len: int) -> tuple[int, ...]:
    """Slots for chunks of each chunking stage on rows of `seq_len` bytes, at the end of their schedule."""
    final, counts, positions = hnet.at_phase(len(hnet.capacity_steps)), [], seq_len
    for s in range(hnet.stages):
        positions = final.capacity(s, positions)
        counts.append(positions)
    return tuple(counts)


def inner_config(config: TransformerConfig) -> TransformerConfig:
    """The model inside, as if it stood alone. Its vocabulary is of no account: the H-Net has embeddings and head."""
    return dataclasses.replace(config, hnet=HNetConfig(), tie_embeddings=True)


def paper_flops_per_byte(
    config: TransformerConfig, seq_len: int, ratios: Sequence[float] | None = None, bytes_per_token: float = 1.0
) -> float:
    """Forward FLOPs per byte in the accounting of the H-Net paper (appendix B), attention over all pairs of the window.

    ratios           positions per chunk of each stage; None: the targets
    bytes_per_token  of a network without chunking on tokens

    Two corrections, without which the paper's own figures do not come out: Mamba-2's output projection has its 2 D
    inputs, and the three square matrices of router and residual projection are counted. A model inside is counted as
    `adaptive.account` counts it, attention over all pairs.
    """
    h, layout = config.hnet, config.hnet.parsed()
    ratios = [h.target(s) for s in range(h.stages)] if ratios is None else ratios
    total, share = 4.0 * config.vocab_size * h.shape(0).width, 1.0
    for s in range(h.stages + 1):
        shape, positions = h.shape(s), seq_len * share
        if s < h.stages:
            total += share * 2 * (1 + 2 * h.learned(s)) * shape.width**2
        if s == h.stages and layout.house:
            inner = plain_account(inner_config(config), max(1, round(positions)))
            total += sum(stage.forward for stage in inner.stages if not stage.head) / seq_len
        total += share * sum(_paper_block(shape, run, positions) for blocks in layout.at(s) for run in blocks)
        share /= ratios[s] if s < h.stages else 1
    return total / bytes_per_token


# Parts


def _block_parameters(shape: BlockShape, run: Run) -> int:
    width, (inner, heads) = shape.width, _inner(shape)
    if run.attends:
        mixer = 4 * width**2
    else:
        channels = inner + 2 * shape.d_state
        mixer = width * (inner + channels + heads) + channels * (shape.d_conv + 1) + 3 * heads + inner + inner * width
    feed_forward = 3 * width * shape.feed_forward + width if run.has_feed_forward else 0
    return run.count * (width + mixer + feed_forward)


def _blocks(name: str, shape: BlockShape, blocks: Blocks, tokens: float) -> Stage:
    """Forward FLOPs of one stack of blocks on `tokens` positions per row."""
    width, (inner, heads) = shape.width, _inner(shape)
    visible = _visible(tokens, shape.window + 1)
    scan, causal, again = _scan(shape, tokens)
    total = Stage(name, 0, tokens, 0)
    for run in blocks:
        n = run.count * tokens
        feed_forward = 6.0 * n * width * shape.feed_forward if run.has_feed_forward else 0.0
        if run.attends:
            out = 2.0 * n * width**2
            own = Stage(
                name,
                run.count,
                tokens,
                tokens,
                projections=4 * out,
                attention=4.0 * n * tokens * width,
                attention_useful=4.0 * n * visible * width,
            )
        else:
            out = 2.0 * n * inner * width
            own = Stage(
                name,
                run.count,
                tokens,
                0,
                projections=2.0 * n * width * (2 * inner + 2 * shape.d_state + heads) + out,
                state_space=run.count * scan,
                state_space_useful=run.count * causal,
                state_space_again=run.count * again,
            )
        last = feed_forward / 3 if run.has_feed_forward else out
        total = _sum(total, dataclasses.replace(own, feed_forward=feed_forward, last=last))
    return total


def _sum(a: Stage, b: Stage) -> Stage:
    """One stage of the blocks of two, on the same positions."""
    costs = [f.name for f in dataclasses.fields(Stage) if f.default == 0.0 and f.name != "recursion"]
    more = {name: getattr(a, name) + getattr(b, name) for name in costs}
    return dataclasses.replace(a, layers=a.layers + b.layers, keys=max(a.keys, b.keys), **more)


def _chunking(name: str, width: int, positions: float, *, learned: bool) -> Stage:
    """The residual projection, and the two projections whose cosine decides, if it is learned."""
    square = 2.0 * positions * width**2
    router = 2 * square * learned
    return Stage(name, 0, positions, 0, projections=square, router=router, router_train=3 * router, last=square)


def _visible(tokens: float, window: int) -> float:
    """Keys that a query sees on average, of which `window` at most, its own included; 0: all before it."""
    reach = tokens if not window else min(window, tokens)
    return reach - reach * (reach - 1) / (2 * max(tokens, 1))


def _scan(shape: BlockShape, tokens: float) -> tuple[float, float, float]:
    """FLOPs of one Mamba-2 layer's scan: as executed, over causal pairs alone, and what its backward pass repeats.

    In blocks of q positions (`kernels_pallas.ssd.chunked`; on accelerators q is 64 or 128): which position reads which
    [q, q], once for all heads; what they read [q, q] by [q, dim] for each; reading from the state and writing to it.
    The backward pass keeps the inputs alone: it computes the states again, and of each block the first and the third.
    """
    (inner, _), n = _inner(shape), shape.d_state
    q = block_of(math.ceil(tokens), min(shape.ssm_block, SCAN_BLOCK))
    blocks = math.ceil(tokens / q)
    match_, mixed, state = 2.0 * q * q * n, 2.0 * q * q * inner, 2.0 * q * inner * n
    pairs = tokens * (q + 1) / 2
    causal = 2.0 * pairs * (n + inner) + 4.0 * tokens * inner * n
    return blocks * (match_ + mixed + 2 * state), causal, blocks * (match_ + 2 * state)


def block_of(positions: int, most: int) -> int:
    """The length of the fewest equal blocks of at most `most` positions, as the scan cuts them."""
    count = math.ceil(positions / most)
    return positions if count == 1 else min(most, math.ceil(positions / (count * 8)) * 8)


def _inner(shape: BlockShape) -> tuple[int, int]:
    """(inner channels, heads) of a Mamba-2 layer."""
    inner = shape.expand * shape.width
    return inner, inner // shape.ssm_head_dim


def _paper_block(shape: BlockShape, run: Run, positions: float) -> float:
    """FLOPs per position of a run of blocks, as the H-Net paper prints them."""
    d, (inner, heads) = shape.width, _inner(shape)
    if run.attends:
        k = min(positions, shape.window + 1) if shape.window >= 0 else positions
        mixer = 8 * d * d + 4 * k * d + 3 * shape.heads * k
    else:
        projected = 2 * d * (2 * inner + 2 * shape.d_state + heads) + 2 * inner * d
        mixer = projected + 6 * inner * shape.d_state + 2 * d * shape.d_conv + 5 * d
    feed_forward = 6 * d * shape.feed_forward + 5 * d if run.has_feed_forward else 0
    return run.count * (mixer + feed_forward)
