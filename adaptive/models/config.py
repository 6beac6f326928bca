"""Shapes and routing of a model: plain data, importable without jax."""

import dataclasses
import itertools
from typing import Literal

from adaptive.errors import RecipeError
from adaptive.layers.moe_config import MoEConfig
from adaptive.models.hnet_config import HNetConfig


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How depth is decided in a Mixture-of-Recursions (MoR paper, sections 2.2 and 3; appendix on router design)."""

    kind: Literal["none", "expert_choice", "token_choice"] = "none"
    network: Literal["linear", "mlp", "wide_mlp"] = "linear"  # d->1, d->2d->1, d->4d->1 (N_r outputs for token choice)
    activation: Literal["sigmoid", "tanh", "softmax", "none"] = "sigmoid"
    alpha: float = 0.1  # the gate is alpha * activation(logit)
    temperature: float = 1.0  # divides the router's input
    gating: Literal["weighted", "additive"] = "weighted"  # additive: the gate does not scale the update
    random: bool = False  # ablation: uniform random scores
    z_coefficient: float = 0.0
    # expert choice
    capacities: tuple[float, ...] = ()  # fraction of the sequence per recursion; () is (N_r - r + 1) / N_r
    sampling: Literal["aux_loss", "aux_router", "none"] = "aux_loss"  # what makes the choice causal when sampling
    aux_coefficient: float = 0.001
    capacity_warmup_steps: int = 0
    # token choice
    balancing: Literal["loss", "loss_free", "none"] = "loss"
    balance_coefficient: float = 0.1
    bias_update_rate: float = 0.001
    balance_warmup_steps: int = 0
    execution: Literal["masked", "capacity"] = "masked"  # masked is exact; capacity computes at most `capacities`


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A Llama-style decoder whose middle may be a shared block applied `recursions` times (MoR paper, section 2).

    `num_layers` counts the unrolled (effective) layers. Recursions = 1 is a vanilla transformer; more with
    `router.kind` "none" is a recursive transformer; with a router it is a Mixture-of-Recursions. With `hnet.layout` all
    this describes the network inside an H-Net, if its layout asks for one; vocabulary, tied embeddings, norm_eps,
    rope_theta and init_std are the H-Net's too.
    """

    vocab_size: int = 320
    hidden_size: int = 128
    intermediate_size: int = 352
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    attention_bias: bool = False  # of the query, key, value and output projections (Qwen)
    qk_norm: Literal["none", "head", "full"] = "none"  # RMSNorm of queries and keys, per head (Qwen3) or whole (OLMoE)
    clip_qkv: float = 0.0  # bound on the absolute value of queries, keys and values (OLMoE); 0: none
    attention_window: int = 0  # positions of the row that a query sees, its own the last (Mistral); 0: all
    padding_token: int = -1  # token whose embedding the lookup does not train (PyTorch's padding_idx); -1: none
    tie_embeddings: bool = True
    init_std: float = 0.02
    recursions: int = 1
    sharing: Literal["cycle", "sequence", "middle_cycle", "middle_sequence"] = "middle_cycle"
    share_parameters: bool = True  # False: own parameters at every recursion, to share keys and values alone
    kv: Literal["per_recursion", "shared", "hybrid"] = "per_recursion"
    router: RouterConfig = RouterConfig()
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    hnet: HNetConfig = dataclasses.field(default_factory=HNetConfig)

    def at_phase(self, phase: int) -> "TransformerConfig":
        """The configuration with an H-Net's capacities of one phase of their schedule (-1: the last)."""
        if not self.hnet.capacity_steps:
            return self
        return dataclasses.replace(self, hnet=self.hnet.at_phase(phase % (len(self.hnet.capacity_steps) + 1)))

    @property
    def family(self) -> Literal["vanilla", "recursive", "mor", "hnet"]:
        if self.hnet.layout:
            return "hnet"
        if self.router.kind != "none":
            return "mor"
        return "recursive" if self.recursions > 1 and self.share_parameters else "vanilla"

    @property
    def unique_ends(self) -> bool:
        """Whether the first and the last layer are outside the recursion."""
        return self.recursions > 1 and self.sharing in ("middle_cycle", "middle_sequence")

    @property
    def block_size(self) -> int:
        """Layers of the block that a recursion applies once (all layers of a vanilla model)."""
        return (self.num_layers - 2 * self.unique_ends) // self.recursions

    @property
    def unique_layers(self) -> int:
        copies = 1 if self.share_parameters else self.recursions
        return copies * self.block_size + 2 * self.unique_ends

    @property
    def capacity_fractions(self) -> tuple[float, ...]:
        """Share of the sequence that each recursion computes; all 1 without a router."""
        n = self.recursions
        if self.router.kind == "none" or (self.router.kind == "token_choice" and self.router.execution == "masked"):
            return (1.0,) * n
        return self.router.capacities or tuple((n - r) / n for r in range(n))

    def capacities(self, seq_len: int) -> tuple[int, ...]:
        """Tokens per sequence that each recursion computes: `max(1, int(c * seq_len))`, as the released code rounds."""
        return tuple(max(1, int(c * seq_len)) for c in self.capacity_fractions)

    def parameter_index(self, layer: int) -> int:
        """Index of the parameter set that unrolled layer `layer` uses (MoR paper, table on sharing strategies)."""
        if not self.share_parameters or self.recursions == 1:
            return layer
        if self.unique_ends:
            if layer == 0:
                return 0
            if layer == self.num_layers - 1:
                return self.block_size + 1
            inner = layer - 1
            return 1 + (inner % self.block_size if self.sharing == "middle_cycle" else inner // self.recursions)
        return layer % self.block_size if self.sharing == "cycle" else layer // self.recursions

    def validate(self) -> None:
        """Raises RecipeError for the first setting that cannot work, with what would."""
        r = self.router
        self.hnet.validate(inner_width=self.hidden_size)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "recursions"):  # fmt: skip
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            fits = ", ".join(str(k) for k in range(1, self.num_heads + 1) if self.num_heads % k == 0)
            raise RecipeError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
                f"num_kv_heads can be {fits}"
            )
        if self.head_dim % 2:
            raise RecipeError(f"model.head_dim={self.head_dim}: rotary embeddings need an even head_dim")
        for name in ("clip_qkv", "attention_window"):
            if getattr(self, name) < 0:
                raise RecipeError(f"model.{name}={getattr(self, name):g}: must be at least 0, which is none")
        if not -1 <= self.padding_token < self.vocab_size:
            raise RecipeError(
                f"model.padding_token={self.padding_token}: must be a token, 0 to {self.vocab_size - 1}, or -1 for none"
            )
        inner = self.num_layers - 2 * self.unique_ends
        if inner < self.recursions or inner % self.recursions:
            ends = 2 * self.unique_ends
            near = sorted({max(1, inner // self.recursions) * self.recursions + ends,
                           (inner // self.recursions + 1) * self.recursions + ends})  # fmt: skip
            shape = "first + block * recursions + last" if ends else "block * recursions"
            raise RecipeError(
                f"model.recursions={self.recursions} does not divide the depth: model.num_layers={self.num_layers} "
                f"with sharing={self.sharing} must be {shape}; nearest num_layers: {', '.join(map(str, near))}"
            )
        self.moe.validate(self.num_layers)
        if self.moe.router != "none" and self.recursions > 1:
            if self.sharing not in ("cycle", "middle_cycle"):
                raise RecipeError(f"model.sharing={self.sharing}: experts need sharing=cycle or middle_cycle")
            if self.moe.dense_layers:
                raise RecipeError("model.moe.dense_layers is for models without recursions; leave it empty")
        if r.kind == "none":
            if self.kv == "hybrid":
                raise RecipeError("model.kv=hybrid needs an expert-choice router; use kv=shared or per_recursion")
            if self.kv == "shared" and self.sharing == "middle_sequence":
                raise RecipeError("model.kv=shared is undefined for sharing=middle_sequence; use middle_cycle")
            return
        if self.recursions < 2:
            raise RecipeError(f"model.router.kind={r.kind} needs model.recursions of at least 2")
        if not self.share_parameters:
            raise RecipeError("a routed model shares its block: model.share_parameters must be true")
        if self.sharing not in ("cycle", "middle_cycle"):
            raise RecipeError(
                f"model.sharing={self.sharing}: routing needs one contiguous block per recursion; "
                "use cycle or middle_cycle"
            )
        if self.kv == "hybrid" and (r.kind != "expert_choice" or self.sharing != "middle_cycle"):
            raise RecipeError("model.kv=hybrid is defined for expert_choice with sharing=middle_cycle only")
        if r.activation == "softmax" and r.kind == "expert_choice":
            raise RecipeError("model.router.activation=softmax is for token_choice; use sigmoid, tanh or none")
        if r.kind == "token_choice" and r.activation not in ("softmax", "sigmoid"):
            raise RecipeError(f"model.router.activation={r.activation}: token_choice takes softmax or sigmoid")
        c = self.capacity_fractions
        if len(c) != self.recursions:
            raise RecipeError(f"model.router.capacities has {len(c)} fractions for model.recursions={self.recursions}")
        if any(not 0 < x <= 1 for x in c) or any(b > a for a, b in itertools.pairwise(c)):
            raise RecipeError(
                f"model.router.capacities={','.join(f'{x:g}' for x in c)}: fractions must be in (0, 1] and must not "
                f"increase, because a token that left cannot come back; for example "
                f"{','.join(f'{x:g}' for x in sorted(c, reverse=True))}"
            )
        if self.kv != "per_recursion" and c[0] < 1:
            raise RecipeError(
                f"model.router.capacities starts with {c[0]:g}: model.kv={self.kv} shares the first recursion's keys "
                "and values of all tokens, so the first fraction must be 1; or use model.kv=per_recursion"
            )
