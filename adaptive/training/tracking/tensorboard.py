"""TensorBoard: event files in the run's folder, written by the tensorboardX package, where log.tensorboard asks."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaptive.training.tracking.base import About, Say, distributions, scalars

FOLDER = "tensorboard"


def start(about: About, say: Say) -> "TensorBoardTracker | None":
    """Begins event files below the run's folder; None where the package is missing or they cannot be written, which is
    said."""
    if importlib.util.find_spec("tensorboardX") is None:
        say("TensorBoard: not written, the tensorboardX package is missing: pip install 'adaptive-lm[tensorboard]'")
        return None
    return TensorBoardTracker(about, say)


class TensorBoardTracker:
    """One curve for all starts of a run: what an earlier one wrote after the step it is resumed from is not shown."""

    def __init__(self, about: About, say: Say):
        self._say: Say | None = say
        self._writer: Any = None
        self._write(lambda: self._open(about, say))

    def _open(self, about: About, say: Say) -> None:
        from tensorboardX import SummaryWriter

        folder = about.workdir / FOLDER
        # Rows of the step that a run is resumed from are there already, unless it is the beginning.
        self._writer = SummaryWriter(str(folder), purge_step=about.start + 1 if about.start else None, flush_secs=10)
        if about.notes:
            self._writer.add_text("notes", about.notes, about.start)
        lines = "\n".join(f"    {name}: {value}" for name, value in about.facts.items())
        self._writer.add_text("run", f"{about.title} {' '.join(about.tags)}\n\n{lines}", about.start)
        say(f"TensorBoard: look with `tensorboard --logdir {folder}`")

    def log(self, row: Mapping[str, Any]) -> None:
        step = int(row["step"])

        def write() -> None:
            for name, value in scalars(row).items():
                if name != "step":
                    self._writer.add_scalar(name, value, step)
            for name, shares in distributions(row).items():
                self._add_histogram(name, shares, step)

        self._write(write)

    def text(self, name: str, step: int, text: str) -> None:
        indented = "\n".join("    " + line for line in text.splitlines())  # shown as it is
        self._write(lambda: self._writer.add_text(name, indented, step))

    def report(self, path: Path, step: int) -> None:
        self._write(lambda: self._writer.add_text("report", str(path), step))

    def checkpoint(self, path: Path, step: int) -> None:
        self._write(lambda: self._writer.add_text("checkpoint", str(path), step))

    def finish(self) -> None:
        self._write(lambda: self._writer.close())

    def _add_histogram(self, name: str, shares: list[float], step: int) -> None:
        """Bars around 0, 1, 2, ..."""
        total = sum(i * share for i, share in enumerate(shares))
        squares = sum(i * i * share for i, share in enumerate(shares))
        limits = [i + 0.5 for i in range(len(shares))]
        self._writer.add_histogram_raw(
            name, min=0, max=len(shares) - 1, num=sum(shares), sum=total, sum_squares=squares,
            bucket_limits=limits, bucket_counts=shares, global_step=step,
        )  # fmt: skip

    def _write(self, task: Callable[[], None]) -> None:
        """Does it unless something failed before; a failure is said once."""
        if self._say is None:
            return
        try:
            task()
        except Exception as error:  # the package raises many kinds; none may reach the run
            say, self._say = self._say, None
            say(f"TensorBoard: stopped ({type(error).__name__}: {error}); everything is in metrics.jsonl")
