"""What a model costs: parameters and matmul FLOPs, by arithmetic from its settings. Each part's settings say what the
part costs (`adaptive.layers.cost`); here that is added up.

A matmul of [m, k] by [k, n] counts 2 m k n FLOPs; nothing else counts (norms, softmax, rotary tables, gathers, the
embedding lookup). Training does every forward matmul once and, for each, two more in the backward pass: the gradients
of its two inputs. That holds for projections, feed-forward, the two matmuls of attention and the output head, whose
loss is computed with its gradient (`adaptive.objectives.cross_entropy`), so a compiled train step contains three
matmuls for each forward one. The exceptions are small and counted: an auxiliary router's first matmul has no input
gradient, a router without any gradient has its forward alone, and a scan's backward pass computes a part of it again.

Attention has two costs. "Executed" multiplies all queries by all keys, as the reference implementation runs it.
"Useful" counts the (query, key) pairs that causality and a window allow, at most about half: what a perfect kernel
would do, and the numerator of utilisation. Kernels and long rows on CPUs are in between: they pass over tiles that no
query sees, and compute scores again in the backward pass. Document boundaries inside a row are not deducted.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from adaptive.account.papers import paper_flops_per_byte, paper_flops_per_token
from adaptive.errors import RecipeError
from adaptive.layers.cost import Cost, Taken
from adaptive.layers.remat import Remat
from adaptive.models import low_rank
from adaptive.models.language_model import Settings

__all__ = [
    "Account",
    "Cost",
    "Parameters",
    "account",
    "at_depths",
    "chunk_counts",
    "dense_equivalent",
    "layer_counts",
    "paper_flops_per_byte",
    "paper_flops_per_token",
    "parameters",
    "recursion_capacities",
    "stage_parameters",
]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    unique     all that is stored but embedding, output head and routers: the papers' "Param" column
    effective  the same were every unrolled layer stored by itself
    embedding  the table, which is also the head where tied, and that of places; head: 0 where tied
    routers    what decides about depth, auxiliary ones included, and where chunks begin; routers of experts belong to
               their layers
    """

    unique: int
    effective: int
    embedding: int
    head: int
    routers: int

    @property
    def total(self) -> int:
        return self.unique + self.embedding + self.head + self.routers


@dataclasses.dataclass(frozen=True)
class Account:
    """Forward matmul FLOPs per sequence of `seq_len` tokens, stretch by stretch in the order they run."""

    parameters: Parameters
    seq_len: float
    stages: tuple[Cost, ...]

    @property
    def forward_flops(self) -> float:
        """Per sequence, as executed."""
        return sum(stage.forward for stage in self.stages)

    def train_flops(self, remat: Remat = "none") -> float:
        """Per sequence, forward, backward and what `remat` recomputes, as executed: what a compiled step contains."""
        return sum(stage.train + stage.recomputed(remat) for stage in self.stages)

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


def parameters(model: Settings) -> Parameters:
    """Numbers of parameters that a model of these settings has."""
    routers, table = model.body.router_parameters(model.width), model.vocab_size * model.width
    added = 0 if model.low_rank is None else low_rank.parameters(model.low_rank, model.body, model.site)
    return Parameters(
        unique=model.body.parameters(model.width) - routers + added,
        effective=model.body.unrolled_parameters(model.width) - routers + added,
        embedding=table + model.positions * model.width,
        head=0 if model.tie_embeddings else table,
        routers=routers,
    )


def stage_parameters(model: Settings) -> tuple[int, ...]:
    """Numbers of parameters of each chunking stage and, last, of the network inside all of them; embedding and head
    belong to none, the vector that widens a stage's input to that stage."""
    widths = model.body.widths(model.width)
    wider = [0, *(b - a for a, b in itertools.pairwise(widths))]
    inwards = [
        body.parameters(width) + more for body, width, more in zip(model.body.stages(), widths, wider, strict=True)
    ]
    return tuple(a - b for a, b in zip(inwards, [*inwards[1:], 0], strict=True))


def layer_counts(model: Settings) -> tuple[int, int]:
    """(layers that are stored, layers of the unrolled network)."""
    return model.body.stored_layers, model.body.layers


def chunk_counts(model: Settings, seq_len: int) -> tuple[int, ...]:
    """Slots for chunks of each chunking stage on rows of `seq_len` positions, at the end of their schedule."""
    return model.body.chunk_counts(seq_len)


def recursion_capacities(model: Settings, seq_len: int) -> tuple[int, ...]:
    """Tokens per sequence that each recursion computes, of a model inside an H-Net chunks; () where no router
    decides."""
    return model.body.pass_counts(seq_len)


def account(
    model: Settings,
    seq_len: float,
    taken: Sequence[float] | None = None,
    inner_taken: Sequence[float] | None = None,
) -> Account:
    """The account of one model on rows of `seq_len` tokens, under top-k selection as in training.

    taken        tokens per sequence that each recursion computes, fractions allowed (averages): what was useful. Of an
                 H-Net, chunks per sequence that each chunking stage passes on. None: the capacities, which is what is
                 paid; those of masked token choice are all tokens, and of capacities on a schedule the last ones hold
    inner_taken  of an H-Net, chunks that each recursion of the network inside computes; None: its capacities

    Raises RecipeError unless there is one number for each recursion or stage.
    """
    stages = len(model.body.stages()) - 1
    counts = Taken(taken, inner_taken) if stages else Taken(passes=taken)
    if counts.chunks is not None and len(counts.chunks) != stages:
        raise RecipeError(
            f"{len(counts.chunks)} chunk counts for {stages} chunking stage{'s' * (stages > 1)}: give one each"
        )
    if counts.passes is not None and len(counts.passes) != model.body.passes:
        raise RecipeError(f"{len(counts.passes)} token counts for {model.body.passes} recursions: give one each")
    head = Cost("head", tokens=seq_len, head=2.0 * seq_len * model.width * model.vocab_size)
    return Account(parameters(model), seq_len, (*model.body.cost(model.width, seq_len, counts), head))


def dense_equivalent(model: Settings, seq_len: int) -> Account:
    """The account as it would be if every position were a chunk and every token took every recursion; keys, values and
    routers as configured."""
    passes = (seq_len,) * model.body.passes
    stages = len(model.body.stages()) - 1
    return account(model, seq_len, (seq_len,) * stages, passes) if stages else account(model, seq_len, passes)


def at_depths(model: Settings, seq_len: int, shares: Sequence[float]) -> Account:
    """The account were `shares[i]` of all tokens to take i + 1 recursions: what adaptive depth cost in fact. The tokens
    of a model inside an H-Net are its innermost chunks.

    Raises RecipeError unless there is one share per recursion and they sum to 1, and where a token may take a pass
    after one that it did not take, so that its depth does not say which it took.
    """
    passes = model.body.passes
    counts = model.body.pass_counts(seq_len)
    if any(later > earlier for earlier, later in itertools.pairwise(counts)):
        raise RecipeError(
            "depths of tokens do not tell which passes they took: later ones compute more than earlier ones"
        )
    if len(shares) != passes or abs(sum(shares) - 1) > 1e-3:
        raise RecipeError(f"depth shares {', '.join(f'{s:g}' for s in shares)}: expected {passes} that sum to 1")
    chunks = model.body.chunk_counts(seq_len)
    tokens = (seq_len, *chunks)[-1]
    reached = tuple(tokens * sum(shares[r:]) for r in range(passes))
    return account(model, seq_len, inner_taken=reached) if chunks else account(model, seq_len, reached)
