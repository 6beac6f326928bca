"""Files of a workdir that a report reads beside metrics.jsonl and recipe.json: plan.json and routing.json.

Both are written by the trainer as dataclasses and read leniently: a field that is missing has its default, an unknown
one is passed over, so that reports of older and of interrupted runs still open.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from adaptive.data.files import write_text_atomically
from adaptive.errors import UserError

PLAN_FILE, ROUTING_FILE, REPORT_FILE = "plan.json", "routing.json", "report.html"
FORMAT_VERSION = 1
SCORE_BINS = 20  # of equal width over [0, 1]
MOST_BYTES = 64  # chunks of so many bytes or more are counted together
END_MARK = "∎"  # stands for a token without text, such as the end of a document

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class AccountLine:
    """One line of the compute account, in useful FLOPs of a training step: as routed, and if every token took all."""

    part: str  # "first layer", "recursion 1", ..., "head"
    active: float
    dense: float


@dataclasses.dataclass(frozen=True)
class PlanRecord:
    """What was known before the first step.

    unique_parameters     of the model as stored, embeddings included; `embedding_parameters` of them are embeddings
    effective_parameters  of the unrolled model, shared layers counted at every use
    flops_per_step        useful (adaptive.account), forward and backward, with the capacities that are computed
    dense_flops_per_step  the same if every token took every layer, and every position were a chunk
    executed_flops_per_step  analytic, as executed: attention over all pairs, and what is recomputed
    paper_flops_per_token    forward FLOPs in the published accounting
    family, title         what the model is called, in a word and for people
    router                kind of the depth strategy; "none" where every position takes the same path
    capacities            tokens per sequence that each recursion computes; () without a router
    peak_flops_per_s      of all devices together; None: not known
    memory                bytes of the compiled step by kind ("arguments", "temporaries", "outputs", "code")
    remat                 what the backward pass recomputes and why, where that was left to be chosen
    kernels               operation -> implementation and reason
    cache                 policy of a recursion's cache -> bytes of generation's cache for a token; its own first, and
                          under the empty name where there is no recursion
    inexact               those of them with which generation is not the full forward pass
    """

    name: str = ""
    family: str = ""
    title: str = ""
    router: str = "none"
    unique_parameters: int = 0
    embedding_parameters: int = 0
    effective_parameters: int = 0
    unique_layers: int = 0
    effective_layers: int = 0
    recursions: int = 1
    capacities: tuple[int, ...] = ()
    seq_len: int = 0
    steps: int = 0
    tokens_per_step: int = 0
    bytes_per_token: float = 0.0
    flops_per_step: float = 0.0
    dense_flops_per_step: float = 0.0
    executed_flops_per_step: float = 0.0
    paper_flops_per_token: float | None = None
    account: tuple[AccountLine, ...] = ()
    device_kind: str = ""
    devices: int = 0
    processes: int = 1
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    compute_dtype: str = ""
    peak_flops_per_s: float | None = None
    compile_seconds: float | None = None
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    remat: str = ""
    kernels: dict[str, str] = dataclasses.field(default_factory=dict)
    cache: dict[str, float] = dataclasses.field(default_factory=dict)
    inexact: tuple[str, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    version: int = FORMAT_VERSION


@dataclasses.dataclass(frozen=True)
class RecursionRecord:
    """One recursion's decisions on held-out text.

    selected, unselected  how many candidates have their decision score in each of SCORE_BINS bins
    accuracy              share of candidates whose causal decision (score at least 0.5) agrees with the selection;
                          None where depth is one decision among several
    """

    recursion: int  # from 1
    selected: tuple[int, ...] = ()
    unselected: tuple[int, ...] = ()
    accuracy: float | None = None


@dataclasses.dataclass(frozen=True)
class TokenRecord:
    """One token of the passage: its text ("" for all but the last byte of a character), the passes it took through the
    shared block, and its loss in nats as the target of the token before; None where there is none.

    begins         how many chunking stages begin a chunk here, stage 0 first
    probabilities  that a chunk of each stage begins here; ends before the first stage that never sees this position
    """

    text: str
    depth: int
    loss: float | None = None
    begins: int = 0
    probabilities: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class ChunkRecord:
    """Chunks of one stage on held-out text.

    lengths   how many have 1, 2, 3, ... bytes; the last number is of those with so many or more
    mean      bytes per chunk, all chunks counted in full
    words     share of words at whose first letter, or the blank before it, a chunk begins; None: not known
    at_words  share of chunks that begin at such a place
    chance    share of all positions that are such a place
    """

    stage: int
    lengths: tuple[int, ...] = ()
    mean: float = 0.0
    words: float | None = None
    at_words: float | None = None
    chance: float | None = None


@dataclasses.dataclass(frozen=True)
class KindRecord:
    """Held-out tokens of one kind: `by` names the division, `name` the kind, depth is their mean number of passes."""

    by: str
    name: str
    tokens: int
    depth: float


@dataclasses.dataclass(frozen=True)
class ExpertRecord:
    """What one expert took of held-out text: tokens whose strongest expert it is.

    part    path of its routed feed-forward; layer: the layer's number in the body it is in
    counts  tokens of each class (`token_kinds.CLASSES`)
    top     texts of the tokens that it has more often than the others do; () where they were not counted
    """

    part: str
    layer: int
    expert: int
    counts: tuple[int, ...] = ()
    top: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SampleRecord:
    prompt: str
    text: str  # the continuation alone


@dataclasses.dataclass(frozen=True)
class RoutingRecord:
    """What routing did on held-out text at the newest evaluation, a passage of it, and a continuation.

    stops                 whether a recursion's scores are for stopping there, not for taking it
    recursions            () without a router
    depth_counts          tokens that took 0, 1, 2, ... passes through the shared block
    last_recursion_rate   per position, share of the rows that could take it to the last recursion and did
    rows                  held-out sequences counted
    dead_token_ratio      share of positions that reached the last recursion in none of them
    dead_token_ratio_by_chance  what that share would be if every position were as likely as any other
    chunks                of each chunking stage
    kinds                 of tokens, how deep they went; () without a router
    experts               what each took; () without experts that see all tokens
    """

    step: int = 0
    selection: str = "topk"  # how depth was chosen: topk | threshold
    router: str = "none"
    stops: bool = False
    recursions: tuple[RecursionRecord, ...] = ()
    depth_counts: tuple[int, ...] = ()
    last_recursion_rate: tuple[float, ...] = ()
    rows: int = 0
    dead_token_ratio: float | None = None
    dead_token_ratio_by_chance: float | None = None
    chunks: tuple[ChunkRecord, ...] = ()
    kinds: tuple[KindRecord, ...] = ()
    experts: tuple[ExpertRecord, ...] = ()
    passage: tuple[TokenRecord, ...] = ()
    sample: SampleRecord | None = None
    version: int = FORMAT_VERSION


def save_record(record: PlanRecord | RoutingRecord, workdir: str | Path) -> None:
    """Writes plan.json or routing.json into the workdir, atomically."""
    text = json.dumps(dataclasses.asdict(record), ensure_ascii=False)
    write_text_atomically(Path(workdir) / _file_of(type(record)), text + "\n")


def load_record(kind: type[T], workdir: str | Path) -> T | None:
    """The PlanRecord or RoutingRecord of a workdir; None where there is none.

    Raises UserError for a file that cannot be read as one, or whose format is newer.
    """
    path = Path(workdir) / _file_of(kind)
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise TypeError("it holds no object")
        if tree.get("version", FORMAT_VERSION) > FORMAT_VERSION:
            raise TypeError(f"its format {tree['version']} is newer than {FORMAT_VERSION}; update adaptive")
        return _read(kind, tree)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


_NESTED: dict[tuple[type, str], type] = {
    (PlanRecord, "account"): AccountLine,
    (RoutingRecord, "recursions"): RecursionRecord,
    (RoutingRecord, "chunks"): ChunkRecord,
    (RoutingRecord, "kinds"): KindRecord,
    (RoutingRecord, "experts"): ExpertRecord,
    (RoutingRecord, "passage"): TokenRecord,
    (RoutingRecord, "sample"): SampleRecord,
}


def _file_of(kind: type) -> str:
    return PLAN_FILE if kind is PlanRecord else ROUTING_FILE


def _read(kind: type[T], tree: dict[str, Any]) -> T:
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in tree:
            continue
        value, inner = tree[field.name], _NESTED.get((kind, field.name))
        if isinstance(value, list):
            value = tuple(_read(inner, item) if inner else item for item in value)
        elif inner and value is not None:
            value = _read(inner, value)
        values[field.name] = value
    return kind(**values)
