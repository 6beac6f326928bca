"""What a model costs: parameters and matmul FLOPs, by arithmetic from its configuration. Only models with experts,
whose routers know their own cost, import jax. H-Nets are counted in `adaptive.account_hnet`, in the same terms.

A matmul of [m, k] by [k, n] counts 2 m k n FLOPs; nothing else counts (norms, softmax, rotary tables, gathers, the
embedding lookup). Training does every forward matmul once and, for each, two more in the backward pass: the gradients
of its two inputs. That holds for projections, feed-forward, the two matmuls of attention and the output head, whose
loss is computed with its gradient (`adaptive.objectives.cross_entropy`), so a compiled train step contains three
matmuls for each forward one. The exceptions are small and counted: an auxiliary router's first matmul has no input
gradient, and a router without any gradient has its forward alone.

Attention has two costs. "Executed" multiplies all queries by all keys, as the reference implementation runs it.
"Useful" counts the (query, key) pairs that causality and a window allow, at most about half: what a perfect kernel
would do, and the numerator of utilisation. Document boundaries inside a row are not deducted.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from adaptive.errors import RecipeError
from adaptive.models.config import RouterConfig, TransformerConfig

_ROUTER_EXPANSION = {"linear": 0, "mlp": 2, "wide_mlp": 4}


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    layers     of one layer
    unique     all that is stored but embedding, output head and routers: the papers' "Param" column
    effective  the same were every unrolled layer stored by itself
    embedding  the table, which is also the head where tied; head: 0 where tied
    routers    over depth, auxiliary ones included; those of experts belong to their layers
    """

    layer: int
    unique: int
    effective: int
    embedding: int
    head: int
    routers: int

    @property
    def total(self) -> int:
        return self.unique + self.embedding + self.head + self.routers


@dataclasses.dataclass(frozen=True)
class Stage:
    """Forward matmul FLOPs of one stretch of the network for one sequence.

    layers, tokens    how many layers it runs, on how many tokens per sequence
    keys              keys that each query is multiplied with
    recursion         of the shared block, from 1; 0 outside it
    projections       query, key, value and output projections, grouped queries counted as they are; of Mamba-2 layers
                      too, and an H-Net's residual projection
    attention         scores and values over all pairs (executed); `attention_useful` over the causal pairs
    state_space       Mamba-2's scan in blocks, all pairs of a block and padding included; `state_space_useful` over the
                      causal pairs of positions that exist; `state_space_again`: what its backward pass always computes
                      a second time
    router            of this recursion (token choice: all of it at the first) and of the experts in its layers; of an
                      H-Net, the projections that decide where chunks begin; router_train: with its backward pass
    last              of all these what layer-wise recomputation leaves out: matmuls at the end of its units, whose
                      results no gradient needs, and those outside of any
    """

    name: str
    layers: int
    tokens: float
    keys: float
    recursion: int = 0
    projections: float = 0.0
    attention: float = 0.0
    attention_useful: float = 0.0
    state_space: float = 0.0
    state_space_useful: float = 0.0
    state_space_again: float = 0.0
    feed_forward: float = 0.0
    router: float = 0.0
    router_train: float = 0.0
    head: float = 0.0
    last: float = 0.0

    @property
    def forward(self) -> float:
        """FLOPs of a forward pass as executed."""
        return self.projections + self.attention + self.state_space + self.feed_forward + self.router + self.head

    @property
    def useful(self) -> float:
        """FLOPs of a forward pass over causal pairs alone."""
        return self.forward - self._idle

    @property
    def train(self) -> float:
        """FLOPs of forward and backward as executed under remat "none"."""
        return 3 * (self.forward - self.router) + self.router_train + self.state_space_again

    @property
    def train_useful(self) -> float:
        """FLOPs of forward and backward over causal pairs alone, nothing computed twice."""
        return self.train - self.state_space_again - 3 * self._idle

    @property
    def _idle(self) -> float:
        return self.attention - self.attention_useful + self.state_space - self.state_space_useful


@dataclasses.dataclass(frozen=True)
class Account:
    """Forward matmul FLOPs per sequence of `seq_len` tokens, stage by stage."""

    parameters: Parameters
    seq_len: float
    stages: tuple[Stage, ...]

    @property
    def forward_flops(self) -> float:
        """Per sequence, as executed."""
        return sum(stage.forward for stage in self.stages)

    def train_flops(self, remat: Literal["none", "layer", "dots"] = "none") -> float:
        """Per sequence, forward, backward and what `remat` recomputes, as executed: what a compiled step contains."""
        return sum(stage.train + _recomputed(stage, remat) for stage in self.stages)

    @property
    def forward_flops_per_token(self) -> float:
        """Useful: causal pairs alone."""
        return sum(stage.useful for stage in self.stages) / self.seq_len

    @property
    def train_flops_per_token(self) -> float:
        """Useful forward and backward FLOPs, nothing recomputed: the numerator of model FLOP utilisation."""
        return sum(stage.train_useful for stage in self.stages) / self.seq_len

    def rows(self) -> list[tuple[str, ...]]:
        """A table as text, header first: stages and their sum, forward MFLOP per token of the sequence."""
        header = ("stage", "layers", "tokens", "keys", "projections", "attention", "(causal)", "state space",
                  "feed-forward", "router", "head", "total", "share")  # fmt: skip
        per_token = lambda value: f"{value / self.seq_len / 1e6:.3f}"  # noqa: E731
        table: list[tuple[str, ...]] = [header]
        for s in self.stages:
            parts = (*(getattr(s, name) for name in _PARTS), s.forward)
            share = f"{s.forward / self.forward_flops:.1%}"
            table.append((s.name, str(s.layers), f"{s.tokens:g}", f"{s.keys:g}", *map(per_token, parts), share))
        sums = [sum(getattr(s, name) for s in self.stages) for name in _PARTS]
        layers = str(sum(s.layers for s in self.stages))
        return [*table, ("all", layers, "", "", *map(per_token, (*sums, self.forward_flops)), "100.0%")]


_PARTS = ("projections", "attention", "attention_useful", "state_space", "feed_forward", "router", "head")


def parameters(config: TransformerConfig) -> Parameters:
    """Numbers of parameters that a model of this configuration has."""
    if config.hnet.layout:
        return _hnet().parameters(config)
    c, r = config, config.router
    width, heads = c.hidden_size, (c.num_heads + c.num_kv_heads) * c.head_dim
    layer = 2 * width * heads + 2 * width
    layer += {"none": 0, "head": 2 * c.head_dim, "full": heads}[c.qk_norm]
    if c.attention_bias:
        layer += heads + c.num_kv_heads * c.head_dim + width
    dense = 3 * width * c.intermediate_size
    routed = _routed_parameters(c) if c.moe.router != "none" else dense
    keep_dense = len(c.moe.dense_layers) if c.moe.router != "none" else 0

    def body(layers: int) -> int:
        """Parameters of the layers and the final norm where `layers` are stored."""
        return layers * layer + (layers - keep_dense) * routed + keep_dense * dense + width

    table = c.vocab_size * width
    count, choices = {"none": (0, 0), "expert_choice": (c.recursions, 1), "token_choice": (1, c.recursions)}[r.kind]
    if _has_auxiliary(r):
        count *= 2
    return Parameters(
        layer=layer + routed,
        unique=body(c.unique_layers),
        effective=body(c.num_layers),
        embedding=table,
        head=0 if c.tie_embeddings else table,
        routers=count * sum(_router_matmuls(r, width, choices)),
    )


def layer_counts(config: TransformerConfig) -> tuple[int, int]:
    """(layers that are stored, layers of the unrolled network)."""
    return _hnet().layers(config) if config.hnet.layout else (config.unique_layers, config.num_layers)


def recursion_capacities(config: TransformerConfig, seq_len: int) -> tuple[int, ...]:
    """Tokens per sequence that each recursion computes, of a model inside an H-Net chunks; () without a router."""
    if config.router.kind == "none":
        return ()
    if not config.hnet.layout:
        return config.capacities(seq_len)
    chunks = _hnet().chunk_counts(config.hnet, seq_len)
    return config.capacities(chunks[-1]) if config.hnet.parsed().house else ()


def account(config: TransformerConfig, seq_len: float, taken: Sequence[float] | None = None) -> Account:
    """The account of one model on rows of `seq_len` tokens, under top-k selection as in training.

    taken  tokens per sequence that each recursion computes, fractions allowed (averages); None: the capacities of the
           configuration, which under masked token choice are all tokens. Of an H-Net, chunks per sequence that each
           chunking stage passes on; see `account_hnet.account`
    """
    if config.hnet.layout:
        return _hnet().account(config, seq_len, taken)
    c = config
    counts = tuple(c.capacities(int(seq_len)) if taken is None else taken)
    if len(counts) != c.recursions:
        raise RecipeError(f"{len(counts)} token counts for model.recursions={c.recursions}: give one per recursion")
    ends = 1 if c.unique_ends else 0
    stages = [_layers(c, "first layer", [0], seq_len, seq_len, seq_len)] * ends
    for r, tokens in enumerate(counts):
        reuses = r > 0 and c.kv != "per_recursion"
        name = f"recursion {r + 1}" if c.recursions > 1 else "layers"
        stage = _layers(
            c,
            name,
            range(ends, ends + c.block_size),
            tokens,
            counts[0] if reuses else tokens,
            seq_len,
            own_keys=not reuses or c.kv == "hybrid",
        )
        router, router_train = _router(c, r, seq_len if r == 0 else counts[r - 1])
        inside = c.sharing in ("sequence", "middle_sequence") and r + 1 < c.recursions
        stages.append(
            dataclasses.replace(
                stage,
                recursion=r + 1,
                router=stage.router + router,
                router_train=stage.router_train + router_train,
                last=0.0 if inside else stage.last,
            )
        )
    stages += [_layers(c, "last layer", [c.num_layers - 1], seq_len, seq_len, seq_len)] * ends
    head = 2.0 * seq_len * c.hidden_size * c.vocab_size
    stages.append(Stage("head", 0, seq_len, 0, head=head))
    return Account(parameters(c), seq_len, tuple(stages))


def dense_equivalent(config: TransformerConfig, seq_len: int) -> Account:
    """The account were every token to take every recursion and every position a chunk; keys, values and routers as
    configured."""
    if config.hnet.layout:
        return _hnet().dense_equivalent(config, seq_len)
    return account(config, seq_len, (seq_len,) * config.recursions)


def at_depths(config: TransformerConfig, seq_len: int, shares: Sequence[float]) -> Account:
    """The account were `shares[i]` of all tokens to take i + 1 recursions: what adaptive depth cost in fact. The tokens
    of a model inside an H-Net are its innermost chunks.

    Raises RecipeError unless there is one share per recursion and they sum to 1.
    """
    if len(shares) != config.recursions or abs(sum(shares) - 1) > 1e-3:
        raise RecipeError(
            f"depth shares {', '.join(f'{s:g}' for s in shares)}: expected {config.recursions} that sum to 1"
        )
    reached = tuple(sum(shares[r:]) for r in range(config.recursions))
    if config.hnet.layout:
        return _hnet().at_depths(config, seq_len, reached)
    return account(config, seq_len, tuple(seq_len * share for share in reached))


def paper_flops_per_token(config: TransformerConfig, seq_len: int) -> float:
    """FLOPs per token in the accounting behind the budgets of the MoR paper.

    Forward alone, embedding and head excluded, keys and values counted as if each query head had its own, attention
    causal: a layer is 8 d^2 + 6 d d_ff, attention 2 d S. Capacity c scales the layer by c and attention by c^2; shared
    keys and values leave out their 4 d^2 after the first recursion and scale attention by c. Token choice counts as
    expert choice, perfectly balanced. Reconstructed from the released step counts, all of which it gives within one
    step. The paper has no such figure for hybrid keys and values; here they cost their projections at capacity c.
    H-Nets have the accounting of their own paper (`account_hnet.paper_flops_per_byte`), chunks as many as the ratio
    targets ask for.
    """
    if config.hnet.layout:
        return _hnet().paper_flops_per_byte(config, seq_len)
    c, n = config, config.recursions
    d = c.hidden_size
    linear, attention = 8 * d * d + 6 * d * c.intermediate_size, 2 * d * seq_len
    fractions: Sequence[float] = (1.0,) * n
    if c.router.kind != "none":
        fractions = c.router.capacities or [(n - r) / n for r in range(n)]
    total = 2.0 * c.unique_ends * (linear + attention)
    for r, fraction in enumerate(fractions):
        first = r == 0 or c.kv == "per_recursion"
        saved = 4 * d * d if r > 0 and c.kv == "shared" else 0
        total += c.block_size * (fraction * (linear - saved) + fraction ** (2 if first else 1) * attention)
    return total


# Parts


def _hnet() -> Any:
    """The module for H-Nets, which is made of this one's classes."""
    from adaptive import account_hnet

    return account_hnet


def _layers(
    c: TransformerConfig,
    name: str,
    numbers: Sequence[int],
    tokens: float,
    keys: float,
    seq_len: float,
    *,
    own_keys: bool = True,
) -> Stage:
    """Decoder layers `numbers` of `tokens` queries on `keys` keys, which they project themselves if `own_keys`."""
    # A query among ascending positions sees on average half of the keys and itself.
    visible = (keys + 1) / 2
    if 0 < c.attention_window < seq_len:  # fewer, the keys being spread evenly over the row
        reach = c.attention_window * keys / seq_len
        visible = reach - reach * (reach - 1) / (2 * max(keys, 1))
    dense, experts, router, router_train = _experts(c, numbers, tokens)
    heads, layers = c.num_heads * c.head_dim, len(numbers)
    feed_forward = 6.0 * dense * tokens * c.hidden_size * c.intermediate_size + experts
    projected = 2 * heads + 2 * own_keys * c.num_kv_heads * c.head_dim
    per_pair = 4.0 * heads  # two matmuls: scores, and values
    return Stage(
        name,
        layers,
        tokens,
        keys,
        projections=2.0 * layers * tokens * c.hidden_size * projected,
        attention=layers * per_pair * tokens * keys,
        attention_useful=layers * per_pair * tokens * visible,
        feed_forward=feed_forward,
        router=router,
        router_train=router_train,
        last=feed_forward / 3,
    )


def _routed_layer(c: TransformerConfig, numbers: Sequence[int]) -> Any:
    """The routed feed-forward of the layers `numbers`, without arrays. Models with experts alone import jax here."""
    from adaptive.layers.moe.layer import abstract_layer
    from adaptive.layers.site import Site

    site = Site(c.hidden_size, c.init_std, (len(numbers),), 0, tuple(numbers), c.num_layers)
    return abstract_layer(c.moe, c.intermediate_size, site)


def _routed_parameters(c: TransformerConfig) -> int:
    """Parameters of one routed feed-forward, its router's included."""
    import jax
    from flax import nnx

    sizes = jax.tree.leaves(nnx.state(_routed_layer(c, (0,)), nnx.Param))
    return sum(leaf.size for leaf in sizes)


def _experts(c: TransformerConfig, numbers: Sequence[int], tokens: float) -> tuple[int, float, float, float]:
    """Of the layers `numbers`: how many are dense; FLOPs of the experts, the routers, and those with the backward."""
    if c.moe.router == "none" or not numbers:
        return len(numbers), 0.0, 0.0, 0.0
    routed = [n for n in numbers if n not in c.moe.dense_layers]
    layer, width, n = _routed_layer(c, routed), c.hidden_size, len(routed)
    router, experts = layer.flops(tokens, width)
    return len(numbers) - n, n * experts, n * router, n * layer.router_train_flops(tokens, width)


def _router(c: TransformerConfig, r: int, candidates: float) -> tuple[float, float]:
    """(forward, forward and backward) FLOPs of the routers that decide before recursion `r`, with auxiliary ones."""
    cfg = c.router
    if cfg.kind == "none" or (cfg.kind == "token_choice" and (r > 0 or cfg.random)):
        return 0.0, 0.0
    matmuls = _router_matmuls(cfg, c.hidden_size, 1 if cfg.kind == "expert_choice" else c.recursions)
    forward = 2.0 * candidates * sum(matmuls)
    train = forward * (3 if _learns(cfg) else 1)
    if not _has_auxiliary(cfg):
        return forward, train
    # Its input is cut off from the gradient, which spares the first matmul's input gradient.
    return 2 * forward, train + 3 * forward - 2.0 * candidates * matmuls[0]


def _router_matmuls(cfg: RouterConfig, width: int, choices: int) -> tuple[int, ...]:
    """Weights of each of a router's matmuls."""
    inner = _ROUTER_EXPANSION[cfg.network] * width
    return (width * inner, inner * choices) if inner else (width * choices,)


def _has_auxiliary(cfg: RouterConfig) -> bool:
    return cfg.kind == "expert_choice" and cfg.sampling == "aux_router"


def _learns(cfg: RouterConfig) -> bool:
    """Whether any loss reaches the main router: through the gate, or through a loss on its logits."""
    by_loss = cfg.sampling == "aux_loss" if cfg.kind == "expert_choice" else cfg.balancing == "loss"
    gate = cfg.gating == "weighted" and not cfg.random
    return gate or cfg.z_coefficient > 0 or (by_loss and not cfg.random)


def _recomputed(stage: Stage, remat: str) -> float:
    """FLOPs of the second forward pass: under "layer" all matmuls of the layers but `Stage.last`; under "dots" those of
    attention and of the scans, which are not kept."""
    match remat:
        case "layer":
            return stage.projections + stage.attention + stage.state_space + stage.feed_forward - stage.last
        case "dots":
            return stage.attention + stage.state_space
    return 0.0
