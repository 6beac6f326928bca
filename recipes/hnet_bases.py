"""What recipes of H-Nets and of their baselines share: the released networks, their training, and a tiny family.

Sources: "H-Net paper" is arXiv 2507.07955 v2; "released" is its code and configurations. UNCONFIRMED marks what neither
tells.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from adaptive.account import account
from adaptive.data.config import DATA_PRESETS
from adaptive.layers import block, stack
from adaptive.layers.chunkers import Chunker, dynamic
from adaptive.layers.feed_forwards import dense
from adaptive.layers.mixers import attention, mamba2
from adaptive.models import language_model
from adaptive.models.bodies import Body, hnet, plain
from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import changed, steps, tokens_per_step

GPT2_BYTES = 4.6  # bytes of FineWeb-Edu per GPT-2 token (H-Net paper, section 3)
STEPS = 219_345  # of 256 x 8192 bytes: one pass over 100B GPT-2 tokens; derived, no number of steps is printed
BPE_STEPS = 217_983  # the same of 256 x 1792 tokens
CHINESE_STEPS, CODE_STEPS = 79_403, 78_526  # 46B tokens of 3.62 and 3.58 bytes (table on Chinese and code); derived
RATE_L, RATE_XL = 6.25e-4, 5e-4  # 2.5 times those of GPT-3 (H-Net paper, section 3)
WINDOW = 1024  # positions, the query's own included (released configurations, which leave that out)
TINY_FLOPS = 9e12  # that the tiny H-Nets and their baseline train for: minutes on two cores
TABLES = "H-Net paper, tables of the main results"


def learning_rate_multipliers(
    targets: Sequence[float], widths: Sequence[int], n_gpt: float = GPT2_BYTES
) -> tuple[float, ...]:
    """Each stage's multiple of the learning rate, the innermost network last (H-Net paper, equation 11).

    sqrt(n_gpt * share * widest / width): `share` of the bytes is what one of the stage's positions stands beside, 1 for
    the bytes themselves, and one over all the targets' product for the innermost chunks.

    targets  positions per chunk of each chunking stage; widths: of each stage and of the innermost network
    """
    shares = [1 / math.prod(targets[:stage]) for stage in range(len(widths))]
    return tuple(math.sqrt(n_gpt * share * widths[-1] / width) for share, width in zip(shares, widths, strict=True))


# Blocks and stacks of the release


def attends(width: int, hidden: int, *, heads: int = 16, window: int = 0, repeat: int = 1) -> block.Settings:
    """A transformer block: half of each head rotates (released configurations). window=0: all positions."""
    mixer = attention.Settings(
        heads=heads, head_dim=width // heads, rotary_dim=width // (2 * heads), rope_theta=1e4, window=window
    )
    return block.Settings(mixer, dense.Settings(hidden), repeat)


def scans(*, d_state: int = 128, head_dim: int = 64, ssm_block: int = 256, repeat: int = 1) -> block.Settings:
    """A Mamba-2 block without a feed-forward (released configurations)."""
    mixer = mamba2.Settings(expand=2, d_state=d_state, d_conv=4, head_dim=head_dim, block=ssm_block)
    return block.Settings(mixer, None, repeat)


def stacked(*blocks: block.Settings) -> stack.Settings:
    """Blocks one after another, as the release adds them up and initialises them."""
    return stack.Settings(blocks, stream="float32", scale_residual=True)


def repeated(one: block.Settings) -> stack.Settings:
    """A stack of equal blocks."""
    return stack.Settings((replace(one, repeat=1),), one.repeat, stream="float32", scale_residual=True)


def on_bytes(width: int, body: Body) -> Recipe:
    """A network of the released kind; width: of the bytes' stream."""
    model = language_model.Settings(
        vocab_size=256,
        width=width,
        body=body,
        tie_embeddings=False,
        norm_eps=1e-5,
        init_std=0.02,
        embedding_std=1.0,  # released configurations
    )
    return Recipe(name="", model=model)


# Training


def trained(recipe: Recipe, rate: float, count: int = STEPS) -> Recipe:
    """The recipe with the training of the H-Net paper (section 3), on FineWeb-Edu unless it reads something else.

    AdamW's betas, epsilon, weight decay and clipping, the form of the decay, and how documents are packed are
    UNCONFIRMED: these are the customary ones, 1 - sqrt(progress), and documents that do not see each other.
    """
    return changed(
        steps(recipe, count, round(0.1 * count)),
        data={**DATA_PRESETS["fineweb_edu_bytes"], "seq_len": 8192},
        optimizer={
            "learning_rate": rate, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0,
        },
        schedule={"kind": "trapezoid", "decay_fraction": 0.2, "decay_shape": "sqrt", "floor": 0.0},
        train={"batch_size": 256, "device_batch_size": 8, "remat": "layer"},  # the last two and below: ours
        eval={"every": 1000, "rows": 2048},
        checkpoint={"every": 1000},
        log={"every": 10},
    )  # fmt: skip


def chunks(target: float) -> dynamic.Settings:
    """Learned chunks of about so many positions, whose loss averages over a device's mini-batch (released code)."""
    return dynamic.Settings(target=target, ratio_coefficient=0.03, ratio_over="device")


def settling(wide: float, settled: float) -> dict[str, Any]:
    """Share of a stage's positions that can be chunks in the first 2,000 steps, while routers keep 0.35 to 0.45 of the
    bytes and 0.65 to 0.75 of a second stage's positions, and afterwards. The release has no such limit; trained models
    keep about 1.25 / target."""
    return {"capacities": (wide, settled), "capacity_steps": (2000,)}


def one_stage(layers: int, width: int, hidden: int, rate: float) -> Recipe:
    """m4 at width 1024 around T`layers` (released configurations hnet_1stage_L and hnet_1stage_XL)."""
    outer, inner = _rates((6,), (1024, width))
    body = hnet.Settings(
        encoder=repeated(scans(repeat=4)),
        chunker=chunks(6.0),
        inner=plain.Settings(repeated(attends(width, hidden, repeat=layers))),
        inner_width=width,
        decoder=repeated(scans(repeat=4)),
        rate=outer,
        inner_rate=inner,
        **settling(0.6, 0.29),
    )
    return trained(on_bytes(1024, body), rate)


def two_stages(
    layers: int,
    widths: tuple[int, int],
    hidden: tuple[int, int],
    rate: float,
    *,
    count: int = STEPS,
    settled: float = 0.5,
) -> Recipe:
    """m4 at width 1024 around T1m4 ... m4T1 around T`layers` (released configurations hnet_2stage_*)."""
    outer, middle, inner = _rates((3, 3), (1024, *widths))
    side = attends(widths[0], hidden[0], window=WINDOW)
    second = hnet.Settings(
        encoder=stacked(side, scans(repeat=4)),
        chunker=chunks(3.0),
        inner=plain.Settings(repeated(attends(widths[1], hidden[1], repeat=layers))),
        inner_width=widths[1],
        decoder=stacked(scans(repeat=4), side),
        rate=middle,
        inner_rate=inner,
        **settling(0.8, settled),
    )
    body = hnet.Settings(
        encoder=repeated(scans(repeat=4)),
        chunker=chunks(3.0),
        inner=second,
        inner_width=widths[0],
        decoder=repeated(scans(repeat=4)),
        rate=outer,
        **settling(0.6, settled),
    )
    return trained(on_bytes(1024, body), rate, count)


def ruled(
    side: block.Settings, width: int, inside: block.Settings, inner_width: int, chunker: Chunker, capacity: float
) -> Recipe:
    """A network around chunks of about 6 bytes that a rule begins, and learning rates as for learned ones.

    side, width           blocks of encoder and decoder, and the width of their stream
    inside, inner_width   blocks of the network inside, and its width
    """
    outer, inner = _rates((6,), (width, inner_width))
    body = hnet.Settings(
        encoder=repeated(side),
        chunker=chunker,
        inner=plain.Settings(repeated(inside)),
        inner_width=inner_width,
        decoder=repeated(side),
        capacities=(capacity,),
        rate=outer,
        inner_rate=inner,
    )
    return trained(on_bytes(width, body), RATE_L)


def published(result: str, notes: str = "") -> Published:
    """What the main results of the H-Net paper print; a run reads 100B GPT-2 tokens of FineWeb-Edu."""
    return Published(result=result, source=TABLES, notes=notes)


def elsewhere(result: str, notes: str = "") -> Published:
    """What the paper prints for Chinese and code."""
    return Published(result=result, source="H-Net paper, table on Chinese and code", notes=notes)


# The tiny family: our own choice of every number


def tiny_attends(width: int, hidden: int, *, window: int = 0, repeat: int = 1) -> block.Settings:
    return attends(width, hidden, heads=width // 32, window=window, repeat=repeat)


def tiny_scans(repeat: int) -> block.Settings:
    return scans(d_state=32, head_dim=32, ssm_block=64, repeat=repeat)


def tiny(body: Body, *, width: int = 128, flops: float = TINY_FLOPS) -> Recipe:
    """A network that learns the embedded text on a laptop's CPU in minutes, trained for so many FLOPs."""
    recipe = changed(
        on_bytes(width, body),
        data={**DATA_PRESETS["embedded"], "tokenizer": "hnet-bytes", "seq_len": 256},
        optimizer={"learning_rate": 2e-3},
        schedule={"kind": "trapezoid", "decay_shape": "sqrt"},
        train={"batch_size": 8},
        eval={"every": 100},
        checkpoint={"every": 200},
        log={"every": 20},
    )
    return budgeted(recipe, flops)


def tiny_stage(
    chunker: Chunker,
    capacity: float,
    *,
    side: stack.Settings | None = None,
    inner: Body | None = None,
    merge: Literal["boundary", "sum"] = "boundary",
) -> hnet.Settings:
    """Two Mamba-2 layers, or `side`, before and behind chunks; inside four transformer layers of width 192, or `inner`.

    So short a run keeps its first capacities: a second compilation would cost more. Rates: the paper calls 2.0, 1.5,
    1.0 a reasonable choice for two stages (section 2.3).
    """
    side = side or repeated(tiny_scans(2))
    return hnet.Settings(
        encoder=side,
        chunker=chunker,
        inner=inner or plain.Settings(repeated(tiny_attends(192, 512, repeat=4))),
        inner_width=192,
        decoder=side,
        merge=merge,
        capacities=(capacity,),
        rate=2.0,
    )


def tiny_two_stages(inner: Body) -> hnet.Settings:
    """Two Mamba-2 layers around a transformer and a Mamba-2 layer around `inner`, of width 192: chunks of about 3 by 3
    bytes, and rates as in `tiny_stage`."""
    side = tiny_attends(128, 384, window=128)
    second = hnet.Settings(
        encoder=stacked(side, tiny_scans(1)),
        chunker=dynamic.Settings(target=3.0),
        inner=inner,
        inner_width=192,
        decoder=stacked(tiny_scans(1), side),
        capacities=(0.65,),
        rate=1.5,
    )
    return hnet.Settings(
        encoder=repeated(tiny_scans(2)),
        chunker=dynamic.Settings(target=3.0),
        inner=second,
        inner_width=128,
        decoder=repeated(tiny_scans(2)),
        capacities=(0.5,),
        rate=2.0,
    )


def budgeted(recipe: Recipe, flops: float) -> Recipe:
    """Steps that `flops` buy, forward and backward, by the compute account; a tenth of them warm up."""
    per_step = account(recipe.model, recipe.data.seq_len).train_flops_per_token * tokens_per_step(recipe)
    count = round(flops / per_step)
    return steps(recipe, count, round(0.1 * count))


def _rates(targets: Sequence[float], widths: Sequence[int]) -> list[float]:
    return [float(f"{rate:.4g}") for rate in learning_rate_multipliers(targets, widths)]
