"""Block diffusion (Arriola et al., arXiv 2503.09573): blocks one after another, the tokens of each in any order.

Attention is causal over blocks and full inside them. A pass reads every row twice, as it is and with hidden tokens: a
hidden token sees earlier blocks as they are and its own block with what is hidden in it. So all blocks are trained at
once, each as it is decoded.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.feed_forwards import experts
from adaptive.layers.mixers import attention
from adaptive.layers.moe.routers import expert_choice as expert_choice_of_experts
from adaptive.layers.reach import blocks_of, paired_blocks
from adaptive.models.depth import expert_choice, mixture_of_depths, token_choice
from adaptive.objectives import Denoising, Inputs, Standing, masked_diffusion
from adaptive.objectives.noise import Noise, Units, ratios
from adaptive.settings import nodes, ranged


@dataclasses.dataclass(frozen=True)
class Settings(masked_diffusion.Settings):
    """What hidden tokens of a block are, given earlier blocks and the others of its own. Each block has a share of
    hidden tokens of its own.

    block      tokens of a document that form one, counted from where it begins; 1: token after token, as next_token
    alignment  same: position i says token i; shifted: position i says the token after it, as a model of next tokens
               does, so that the first position of a block is never hidden. Then block=1 is next_token, to the bit
    """

    block: int = ranged(4, least=1)
    alignment: Literal["same", "shifted"] = "same"

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        for path, node in nodes(model, "model"):
            if reason := _competes(node):
                raise RecipeError(
                    f"objective=block_diffusion with {path}={node.kind()}: {reason}, later blocks among them; "
                    "use token choice, or objective=masked_diffusion"
                )
            if isinstance(node, attention.Settings) and node.window:
                raise RecipeError(
                    f"objective=block_diffusion with {path}.window={node.window}: blocks see all earlier ones; set "
                    f"{path}.window=0"
                )

    def denoising(self) -> Denoising:
        return Denoising(self.mask_id, self.block, self.alignment == "shifted")

    def refuse_generation(self) -> str:
        next_tokens = self.block == 1 and self.alignment == "shifted"
        return "" if next_tokens else super().refuse_generation()

    def forward_flops(self, stages: Sequence[Any]) -> float:
        # Twice as many positions, of which each sees half of as many as there are in a row, and half are predicted.
        once = sum(stage.attention + stage.head for stage in stages)
        return 2 * super().forward_flops(stages) - float(once)

    def counted(self, batch: Any) -> jax.Array:
        return jnp.asarray(batch.mask) > 0 if self.alignment == "shifted" else super().counted(batch)

    def units(self, batch: Any) -> Units:
        return Units(*blocks_of(jnp.asarray(batch.positions), self.block))

    def shares(self, key: jax.Array, batch: Any) -> jax.Array:
        rows, seq = batch.tokens.shape
        number = self.units(batch).first // self.block
        most = -(-seq // self.block)
        t = ratios(key, rows * most, self.draws).reshape(rows, most)
        return jnp.take_along_axis(t, number, axis=1)

    def read(self, batch: Any, noise: Noise, counted: jax.Array) -> Inputs:
        tokens, number = jnp.asarray(batch.tokens), jnp.asarray(batch.positions)
        own = super().read(batch, noise, counted)
        hidden, targets, before = noise.hidden, tokens, own.before
        if self.alignment == "shifted":
            inside = jnp.arange(tokens.shape[1]) > self.units(batch).first
            hidden = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0))) & inside
            targets, before = jnp.asarray(batch.targets), tokens
        twice = lambda a: jnp.concatenate([a, a], axis=1)  # noqa: E731
        return Inputs(
            jnp.concatenate([tokens, jnp.where(hidden, self.mask_id, tokens)], axis=1),
            targets,
            noise.weights,
            standing=Standing(
                twice(number), twice(jnp.asarray(batch.segment_ids)), None, paired_blocks(number, self.block)
            ),
            counted=own.counted,
            before=before,
        )


def _competes(node: Any) -> str:
    """Why a part's decision about a position depends on others of the row; empty where it does not."""
    if isinstance(node, expert_choice.Settings | mixture_of_depths.Settings):
        return "it chooses among the positions of a row"
    if isinstance(node, token_choice.Settings) and node.execution == "capacity":
        return "with execution=capacity positions compete for room"
    if isinstance(node, experts.Settings) and isinstance(node.router, expert_choice_of_experts.Settings):
        return "experts of expert choice choose among the positions of a row"
    return ""
