"""What recipes of H-Nets and of their baselines share: the released networks, their training, and a tiny family.

Sources: "H-Net paper" is arXiv 2507.07955 v2; "released" is its code and configurations. UNCONFIRMED marks what neither
tells.
"""

import math
from collections.abc import Sequence

from adaptive.account import account
from adaptive.recipe import Published, Recipe
from recipes.bases import tokens_per_step

GPT2_BYTES = 4.6  # bytes of FineWeb-Edu per GPT-2 token (H-Net paper, section 3)
STEPS = 219_345  # of 256 x 8192 bytes: one pass over 100B GPT-2 tokens; derived, no number of steps is printed
BPE_STEPS = 217_983  # the same of 256 x 1792 tokens
CHINESE_STEPS, CODE_STEPS = 79_403, 78_526  # 46B tokens of 3.62 and 3.58 bytes (table on Chinese and code); derived
RATE_L, RATE_XL = "6.25e-4", "5e-4"  # 2.5 times those of GPT-3 (H-Net paper, section 3)
WINDOW = "1023"  # positions to the left; 1024 with the query's own (released configurations)
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


# The released networks


def stack(
    layout: str,
    widths: Sequence[int],
    intermediates: Sequence[int],
    *,
    windows: Sequence[str] = (),
    heads: str = "16",
) -> Recipe:
    """A network of the released kind on bytes. windows: of each stage; () is 1024 positions, the innermost sees all."""
    windows = windows or (WINDOW,) * (len(widths) - 1) + ("-1",)
    return Recipe(name="").with_(
        "model.vocab_size=256",
        f"model.hnet.layout={layout}",
        f"model.hnet.widths={_listed(widths)}",
        f"model.hnet.intermediates={_listed(intermediates)}",
        f"model.hnet.heads={heads}",
        f"model.hnet.rotary_dims={_listed(_rotary(widths, heads))}",
        f"model.hnet.windows={_listed(windows)}",
        "model.hnet.expand=2",  # released configurations, here and in the next eight
        "model.hnet.d_state=128",
        "model.hnet.d_conv=4",
        "model.hnet.ssm_head_dim=64",
        "model.hnet.ssm_block=256",
        "model.hnet.embedding_std=1",
        "model.init_std=0.02",
        "model.norm_eps=1e-5",
        "model.tie_embeddings=false",
    )


def trained(recipe: Recipe, rate: str, steps: int = STEPS) -> Recipe:
    """The recipe with the training of the H-Net paper (section 3), on FineWeb-Edu unless it reads something else.

    AdamW's betas, epsilon, weight decay and clipping, the form of the decay, and how documents are packed are
    UNCONFIRMED: these are the customary ones, 1 - sqrt(progress), and documents that do not see each other.
    """
    return recipe.with_(
        "data=fineweb_edu_bytes",
        "data.seq_len=8192",
        f"optimizer.learning_rate={rate}",
        "optimizer.beta1=0.9",
        "optimizer.beta2=0.95",
        "optimizer.eps=1e-8",
        "optimizer.weight_decay=0.1",
        "optimizer.clip_norm=1.0",
        "schedule.kind=trapezoid",
        f"schedule.warmup_steps={round(0.1 * steps)}",
        "schedule.decay_fraction=0.2",
        "schedule.decay_shape=sqrt",
        "schedule.floor=0",
        f"train.steps={steps}",
        "train.batch_size=256",
        "train.device_batch_size=8",  # ours, here and in the next four
        "train.remat=layer",
        "eval.every=1000",
        "checkpoint.every=1000",
        "log.every=10",
    )


def chunked(recipe: Recipe, targets: Sequence[float], wide: Sequence[float], settled: Sequence[float]) -> Recipe:
    """The recipe with learned chunks, of `targets` positions each, and the learning rates that follow.

    wide     share of each stage's positions that can be chunks in the first 2,000 steps, while routers keep 0.35 to
             0.45 of the bytes and 0.65 to 0.75 of a second stage's positions
    settled  and afterwards. The release has no such limit; trained models keep about 1.25 / target
    """
    return recipe.with_(
        "model.hnet.chunkers=dynamic",
        f"model.hnet.ratio_targets={_listed(targets)}",
        "model.hnet.ratio_coefficient=0.03",
        "model.hnet.ratio_over=device",  # released code; the paper averages over a device's mini-batch
        f"model.hnet.capacities={_listed((*wide, *settled))}",
        "model.hnet.capacity_steps=2000",
        f"optimizer.stage_rates={_rates(targets, recipe.model.hnet.widths)}",
    )


def ruled(recipe: Recipe, chunker: str, capacity: float) -> Recipe:
    """The recipe with chunks of about 6 bytes that a rule begins, and learning rates as for learned ones."""
    return recipe.with_(
        f"model.hnet.chunkers={chunker}",
        "model.hnet.ratio_targets=6",
        f"model.hnet.capacities={capacity:g}",
        f"optimizer.stage_rates={_rates((6,), recipe.model.hnet.widths)}",
    )


def one_stage(layers: int, width: int, intermediate: int, rate: str) -> Recipe:
    """m4 at width 1024 around T`layers` (released configurations hnet_1stage_L and hnet_1stage_XL)."""
    network = stack(f'["m4", ["T{layers}"], "m4"]', (1024, width), (0, intermediate))
    return chunked(trained(network, rate), (6,), (0.6,), (0.29,))


def two_stages(
    layers: int,
    widths: tuple[int, int],
    intermediates: tuple[int, int],
    rate: str,
    *,
    steps: int = STEPS,
    settled: float = 0.5,
) -> Recipe:
    """m4 at width 1024 around T1m4 ... m4T1 around T`layers` (released configurations hnet_2stage_*)."""
    layout = f'["m4", ["T1m4", ["T{layers}"], "m4T1"], "m4"]'
    network = stack(layout, (1024, *widths), (0, *intermediates))
    return chunked(trained(network, rate, steps), (3, 3), (0.6, 0.8), (settled, settled))


def published(result: str, notes: str = "") -> Published:
    """What the main results of the H-Net paper print; a run reads 100B GPT-2 tokens of FineWeb-Edu."""
    return Published(result=result, source=TABLES, notes=notes)


def elsewhere(result: str, notes: str = "") -> Published:
    """What the paper prints for Chinese and code."""
    return Published(result=result, source="H-Net paper, table on Chinese and code", notes=notes)


# The tiny family: our own choice of every number


def tiny(
    layout: str, widths: Sequence[int], intermediates: Sequence[int], *overrides: str, flops: float = TINY_FLOPS
) -> Recipe:
    """A network that learns the embedded text on a laptop's CPU in minutes, trained for so many FLOPs.

    overrides  of the model, which its price depends on
    """
    windows = ("127",) * (len(widths) - 1) + ("-1",)
    network = stack(layout, widths, intermediates, windows=windows, heads=_listed([width // 32 for width in widths]))
    return budgeted(
        network.with_(
            "model.hnet.d_state=32",
            "model.hnet.ssm_head_dim=32",
            "model.hnet.ssm_block=64",
            "data=embedded",
            "data.tokenizer=hnet-bytes",
            "data.seq_len=256",
            "optimizer.learning_rate=2e-3",
            "schedule.kind=trapezoid",
            "schedule.decay_shape=sqrt",
            "train.batch_size=8",
            "eval.every=100",
            "checkpoint.every=200",
            "log.every=20",
        ).with_(*overrides),
        flops,
    )


def chunks(chunkers: str, targets: Sequence[float], capacities: Sequence[float]) -> tuple[str, ...]:
    """Overrides that chunk. So short a run keeps its first capacities: a second compilation would cost more."""
    by_hand = {1: "2,1", 2: "2,1.5,1"}  # the paper calls 2.0, 1.5, 1.0 a reasonable choice (section 2.3)
    return (
        f"model.hnet.chunkers={chunkers}",
        f"model.hnet.ratio_targets={_listed(targets)}",
        f"model.hnet.capacities={_listed(capacities)}",
        f"optimizer.stage_rates={by_hand[len(targets)]}",
    )


def budgeted(recipe: Recipe, flops: float) -> Recipe:
    """Steps that `flops` buy, forward and backward, by the compute account; a tenth of them warm up."""
    per_step = account(recipe.model, recipe.data.seq_len).train_flops_per_token * tokens_per_step(recipe)
    steps = round(flops / per_step)
    return recipe.with_(f"train.steps={steps}", f"schedule.warmup_steps={round(0.1 * steps)}")


def _rates(targets: Sequence[float], widths: Sequence[int]) -> str:
    return _listed([f"{rate:.4g}" for rate in learning_rate_multipliers(targets, widths)])


def _rotary(widths: Sequence[int], heads: str) -> list[int]:
    """Half of each head rotates (released configurations)."""
    each = [int(n) for n in heads.split(",")]
    return [width // (2 * n) for width, n in zip(widths, each * len(widths), strict=False)]


def _listed(values: Sequence[object]) -> str:
    return ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
