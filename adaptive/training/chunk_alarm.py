"""Says when chunking fails: everything or nothing is kept, slots run out, held-out text is cut otherwise than training
text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from adaptive.training.metrics import finite

EVALUATIONS = 3  # in a row, since routers sway while they learn where to cut
INTERVALS = 5  # of logging, in a row
EVERYTHING, NOTHING = 0.95, 0.02  # share of positions that begin a chunk
TOO_LONG = 8.0  # times the target: published models end within 0.65 to 1 of it (H-Net paper, section 3)
LOST = 0.1  # of the boundaries that were wanted
APART = 1.5  # times as many positions per chunk


class ChunkAlarm:
    """Reads the rows of a run in order; `chunking` is (dotted path, settings) of every chunking stage.

    What was said comes again only after its quantity was well away from the limit in between.
    """

    def __init__(self, chunking: Sequence[tuple[str, Any]]):
        self._chunking = tuple(chunking)
        self._latest: dict[int, float] = {}  # positions per chunk of each stage in the newest training row
        self._counts: dict[str, int] = {}
        self._standing: dict[str, str] = {}
        self._told: set[str] = set()

    def __call__(self, row: Mapping[str, Any]) -> list[str]:
        """What a row, of training or of an evaluation, gives new reason to say."""
        said = []
        for finding in self._findings(row):
            name = finding.name
            self._counts[name] = self._counts.get(name, 0) + 1 if finding.beyond else 0
            if finding.beyond and self._counts[name] >= finding.patience:
                self._standing[name] = finding.message
                if name not in self._told:
                    self._told.add(name)
                    said.append(finding.message)
            else:
                self._standing.pop(name, None)
                if not finding.near:
                    self._told.discard(name)
        return said

    def standing(self) -> list[str]:
        """All that holds at the newest row of each kind."""
        return list(self._standing.values())

    def _findings(self, row: Mapping[str, Any]) -> Iterator["_Finding"]:
        # Without capacities where there is such an evaluation: what was wanted, whatever found a slot.
        places = ("eval/threshold/routing/", "eval/routing/")
        place = next((p for p in places if f"{p}kept_0" in row), "routing/")
        for stage in range(len(self._chunking)):
            kept, lost = finite(row, f"{place}kept_{stage}"), finite(row, f"{place}overflow_{stage}") or 0.0
            if kept is None:
                continue
            wanted = min(1.0, kept / max(1 - lost, 1e-6))
            length = 1 / max(wanted, 1e-6)
            if place == "routing/":
                self._latest[stage] = length
                if row.get("step", 0) > max(self._chunking[stage][1].capacity_steps, default=0):
                    yield self._overflow(stage, lost)
            else:
                if self._chunking[stage][1].chunker.learned:
                    yield from self._collapse(stage, wanted, length)
                if stage in self._latest:
                    yield self._apart(stage, length, self._latest[stage])

    def _collapse(self, stage: int, kept: float, length: float) -> Iterator["_Finding"]:
        at, settings = self._chunking[stage]
        target = settings.chunker.expected()
        told = (
            f"chunking stage {stage} begins a chunk at {kept:.1%} of its positions (target {1 / target:.0%}) in "
            f"{EVALUATIONS} evaluations in a row"
        )
        coefficient = getattr(settings.chunker, "ratio_coefficient", None)
        harder = f"raise {at}.chunker.ratio_coefficient (now {coefficient:g}), " if coefficient is not None else ""
        relief = f"{harder}lower the stage's learning rate ({at}.rate) or optimizer.learning_rate"
        everything = f"{told}: nothing is compressed. To change: {relief}"
        limit = max(EVERYTHING, (1 + 1 / target) / 2)
        yield _Finding(f"everything {stage}", kept > limit, kept > 0.8 * limit, EVALUATIONS, everything)
        nothing = (
            f"{told}, {length:.0f} positions per chunk: the network inside sees next to nothing. To change: {relief}, "
            f"or lower {at}.chunker.target (now {target:g})"
        )
        few = max(1 / (TOO_LONG * target), NOTHING if target < 0.5 / NOTHING else 0.0)
        yield _Finding(f"nothing {stage}", kept < few, kept < 2 * few, EVALUATIONS, nothing)

    def _overflow(self, stage: int, lost: float) -> "_Finding":
        at, settings = self._chunking[stage]
        now = f" (now {settings.capacities[-1]:g})" if settings.capacities else ""
        message = (
            f"{lost:.0%} of the chunks that chunking stage {stage} wanted found no slot, above {LOST:.0%} in "
            f"{INTERVALS} logging intervals in a row, and joined the chunk before; raise {at}.capacities{now}, or "
            f"start with larger ones and shrink them later ({at}.capacity_steps)"
        )
        return _Finding(f"overflow {stage}", lost > LOST, lost > LOST / 2, INTERVALS, message)

    def _apart(self, stage: int, held_out: float, training: float) -> "_Finding":
        at, settings = self._chunking[stage]
        ratio = max(held_out, training) / min(held_out, training)
        noisy = hasattr(settings.chunker, "flip_temperature")
        noise = f", or lower {at}.chunker.flip_temperature" if noisy else ""
        message = (
            f"chunking stage {stage} puts {held_out:.2f} positions in a chunk on held-out text and {training:.2f} in "
            f"training, in {EVALUATIONS} evaluations in a row: what is held out is of another kind, or the model has "
            f"learnt its training text by heart; look at data.paths and how many passes train.steps makes{noise}"
        )
        return _Finding(f"apart {stage}", ratio > APART, ratio > (1 + APART) / 2, EVALUATIONS, message)


class _Finding(NamedTuple):
    """One thing to watch: whether it is beyond its limit or near it, and after how many rows in a row it is told."""

    name: str
    beyond: bool
    near: bool
    patience: int
    message: str
