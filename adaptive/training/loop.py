"""The training loop: step, late metrics, now and then an evaluation or a checkpoint, until done or asked to stop."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
import numpy as np

from adaptive.data.pipeline import Data
from adaptive.errors import CheckpointError, NonFiniteError
from adaptive.optim.schedule import make_schedule
from adaptive.parallel.cluster import anywhere, meet
from adaptive.printable import printable
from adaptive.runs import initial
from adaptive.runs.checkpoint import Checkpoints, digest
from adaptive.runs.config import InitConfig
from adaptive.runs.folder import RunFolder
from adaptive.runs.origin import starts
from adaptive.runs.state import TrainState
from adaptive.training.alarms import alarms, health_warnings
from adaptive.training.continuation import continuation
from adaptive.training.data_alarm import PREFIX, DataAlarm
from adaptive.training.evaluation import Evaluator
from adaptive.training.goodput import Account
from adaptive.training.log import MetricsLog, WorkdirLostError, is_evaluation, read_rows, shown_gaps, steps_without_row
from adaptive.training.metrics import Measured, Meter, OneStepLate
from adaptive.training.plan import cost_of
from adaptive.training.position import position_of_job
from adaptive.training.program import Program, Steps, profiled
from adaptive.training.progress import Progress
from adaptive.training.repeat import repeated
from adaptive.training.report.page import write_report
from adaptive.training.report.passage import print_chunks, print_passage
from adaptive.training.report.schema import PlanRecord, RoutingRecord, SampleRecord, save_record
from adaptive.training.stopping import PREEMPTED, GivenUpError, StopRequest
from adaptive.training.stragglers import Stragglers
from adaptive.training.tracking import About, Several, Tracker, start_tracking
from adaptive.training.watchdog import Watchdog

Say = Callable[[str], None]
FAILED = 1
TOLD = (  # of the plan, to dashboards
    "family", "unique_parameters", "embedding_parameters", "flops_per_step", "dense_flops_per_step", "tokens_per_step",
    "device_kind", "devices", "processes", "mesh", "compute_dtype", "peak_flops_per_s",
)  # fmt: skip


class Loop:
    """One attempt at a run, from the newest checkpoint of its folder or from the beginning, to the end or a stop."""

    def __init__(
        self,
        program: Program,
        steps: Steps,
        data: Data,
        plan: PlanRecord,
        folder: RunFolder,
        watchdog: Watchdog,
        stop: StopRequest,
        account: Account,
        say: Say,
    ):
        self.program, self.recipe, self.steps, self.data = program, program.recipe, steps, data
        self.plan, self.folder, self.watchdog, self.stop = plan, folder, watchdog, stop
        self.account = account
        self.saved_at = time.monotonic()
        self.primary = jax.process_index() == 0
        self.say = say
        self.evaluator = Evaluator(program, data)
        self.facts = program.facts
        self.alarms = [*alarms(self.facts), DataAlarm(self.recipe.data.paths)]
        self.late, self.bad_in_row = OneStepLate(), 0
        self.read_s: list[float] = []  # that each source of data has taken, and had at the row before
        self.read_before, self.stragglers = self.read_s, Stragglers()
        self.tracker: Tracker = Several()
        self.worried: set[str] = set()  # what the last evaluation warned of: it is said once while it lasts
        self.told_saved = -1  # step of the newest checkpoint that dashboards know
        self.first_row = True  # the first step of a run is logged, so that there is something to see at once
        self.failure: OSError | None = None  # why nothing more can be written into the folder; known to process 0 alone
        self.schedule = make_schedule(
            self.recipe.schedule, self.recipe.optimizer.learning_rate, self.recipe.train.steps
        )

    def run(self) -> int:
        """Trains; the exit code: 0 done, 75 stopped when asked, 1 if the last checkpoint could not be written."""
        try:
            return self.run_tracked()
        finally:
            with self.watchdog.limit("ending the dashboards", self.recipe.train.shutdown_timeout_s):
                self.tracker.finish()

    def run_tracked(self) -> int:
        recipe = self.recipe
        resolved = json.loads(recipe.to_json())
        self.checkpoints = Checkpoints(self.folder.checkpoints, recipe.checkpoint, resolved, say=self.say)
        with self.stop.at_once(self.folder.close):
            with self.account.of("restore"):
                state, begin, data_state = self.restore_or_start()
            self.account.begins_at(begin, self.folder.path if self.primary else None)
            if begin >= recipe.train.steps and not anywhere(self.primary and self.folder.finished < begin):
                self.say(f"this run is complete at step {begin}; a new --workdir starts another")
                return 0
            self.log = self.opened_log(begin)
        self.recall_losses()
        if self.primary:
            self.keep(self.plan)
        seconds = self.log.kept[-1].get("seconds") if self.log.kept else None
        self.meter = Meter(cost_of(self.plan), seconds or 0.0, experts=self.facts.experts)
        self.first_row = begin == 0
        batches = self.data.train(data_state)
        with contextlib.ExitStack() as at_exit:
            at_exit.callback(batches.close)
            self.progress = at_exit.enter_context(Progress(recipe.train.steps, begin, enabled=self.primary))
            self.say = self.progress.say
            if self.primary:
                self.tracker = start_tracking(recipe.log, self.about(resolved, begin), self.say)
            with self.stop.at_once(self.folder.close):
                self.catch_up(state, begin)
            self.account.becomes("step")
            stopped, state, step = self.train(state, begin, batches)
            limit = recipe.train.shutdown_timeout_s
            with self.watchdog.limit("saving the last checkpoint", limit), self.account.of("save"):
                self.checkpoints.close()
            self.note_saved()
        self.account.becomes("end")
        self.account.note(step, stopped=True)
        if anywhere(self.failure is not None):
            return self.failed(step)
        if stopped:
            kept = f"saved at step {step}" if not self.checkpoints.failed else f"step {step} could not be saved"
            again = f"run the same command with --workdir {self.folder} to resume"
            self.last_words(f"stopped on request, {kept}; {again}")
            return PREEMPTED
        with self.watchdog.limit("the report of the run", recipe.train.shutdown_timeout_s):
            self.finish(state, step)
        if anywhere(self.failure is not None):
            return self.failed(step)
        return FAILED if self.checkpoints.failed else 0

    def about(self, resolved: Mapping[str, Any], begin: int) -> About:
        """What dashboards are told of this start."""
        plan = dataclasses.asdict(self.plan)
        return About(
            self.folder.path,
            self.recipe.name,
            self.folder.run_id,
            resolved,
            facts={**{name: plan[name] for name in TOLD}, "started": starts(self.folder.path)[-1:]},
            start=begin,
            tags=self.recipe.log.tags,
            notes=self.recipe.log.notes,
        )

    def restore_or_start(self) -> tuple[TrainState, int, dict[str, Any] | None]:
        """(state, step, position in the data): of the newest whole checkpoint of this folder, or of the beginning."""
        if initial.weights_alone(self.folder.checkpoints):
            state = initial.begun(InitConfig(run=str(self.folder)), self.program.fresh_state())
            self.say(f"resuming  {self.folder} from step 0, with a new optimizer's state")
            return state, 0, None
        with self.watchdog.limit("restoring", self.recipe.train.start_timeout_s):
            restored = self.checkpoints.restore(self.program.abstract_state())
        if restored is not None:
            rows = max((row["step"] for row in read_rows(self.folder.path)), default=0) if self.primary else 0
            lost = f" ({rows - restored.step} later steps are repeated)" if rows > restored.step else ""
            self.say(f"resuming  {self.folder} from step {restored.step}{lost}")
            return restored.state, restored.step, restored.data_state or None  # {}: converted weights have read nothing
        self.refuse_lost_checkpoints()
        with self.watchdog.limit("drawing parameters", self.recipe.train.start_timeout_s):
            state, init, source = self.program.fresh_state(), self.recipe.init, ""
            meet("parameters are drawn")
        if init.run:
            state = initial.begun(init, state)
            what = "weights and the optimizer's state" if init.optimizer else "weights"
            source = f" with the {what} of {init.run} at step {init.step}"
        self.say(f"starting  {self.folder}{source}, state digest {digest(state)}")
        return state, 0, None

    def refuse_lost_checkpoints(self) -> None:
        """Raises CheckpointError where the run has no checkpoint but had one: it would begin anew over what is kept."""
        where = self.folder.checkpoints
        if anywhere(where.exists() and not where.is_dir()):
            raise CheckpointError(f"{where} is a file, and checkpoints go into a folder of that name: move it away")
        if anywhere(self.folder.saved > 0):
            at = f" of step {self.folder.saved}" if self.primary else ""
            raise CheckpointError(
                f"{where} holds no checkpoint, though this run had one{at}: put the folder back to go on, or choose "
                "another --workdir to start anew. Nothing was changed"
            )

    def opened_log(self, begin: int) -> MetricsLog:
        """The rows up to the step where this attempt begins; says which are not there."""
        if not self.primary:
            return MetricsLog(None)
        log = MetricsLog.open(self.folder.path, begin)
        if gaps := steps_without_row(log.kept, begin):
            self.say(f"warning: {self.folder.metrics} has no row of step {shown_gaps(gaps)}")
        return log

    def recall_losses(self) -> None:
        """Tells the checkpoints which held-out loss each had, in every process the same."""
        if not self.recipe.checkpoint.keep_best:
            return
        steps = self.checkpoints.steps()
        rows = {row["step"]: row.get("eval/loss") for row in self.log.kept if is_evaluation(row)}
        losses = np.array([math.nan if rows.get(step) is None else rows[step] for step in steps])
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            losses = multihost_utils.broadcast_one_to_all(losses.astype(np.float32))
        for step, loss in zip(steps, losses, strict=True):
            self.checkpoints.rate(step, float(loss))

    def catch_up(self, state: TrainState, begin: int) -> None:
        """The evaluation that was due when an earlier attempt ended, where it made none; of the last step in any case,
        for the report."""
        made = any(is_evaluation(row) and row["step"] == begin for row in self.log.kept)
        missing = anywhere(self.primary and not made)
        if begin and self.evaluation_due(begin) and (missing or begin >= self.recipe.train.steps):
            with self.aside("evaluation"):
                self.checkpoints.rate(begin, self.evaluate(state, begin, recorded=missing))

    def evaluation_due(self, done: int) -> bool:
        every = self.recipe.eval.every
        return done >= self.recipe.train.steps or bool(every and done % every == 0)

    def train(self, state: TrainState, begin: int, batches: Any) -> tuple[bool, TrainState, int]:
        """(whether it was asked to stop, state, step)."""
        recipe, total = self.recipe, self.recipe.train.steps
        for step in range(begin, total):
            self.prepare(step, state, batches)
            traced = profiled(step, begin, recipe, self.folder.profile)
            with self.watchdog.limit(f"step {step + 1}", recipe.train.step_timeout_s), traced:
                batch = self.next_batch(batches)
                state, metrics = self.take(step, state, batch)
                self.absorb(self.late.swap(step + 1, metrics))
            done = step + 1
            self.progress.step(done)
            stopping, save_due = self.stop.agree(save=self.save_due())
            last = done == total
            evaluate = self.evaluation_due(done) and (last or not stopping)
            keep = recipe.checkpoint
            # The first evaluation compiles, and hears no signal meanwhile: all is saved before.
            save = save_due or last or stopping or (evaluate and self.settles and not self.evaluator.compiled)
            save = save or bool(keep.every and done % keep.every == 0)
            if evaluate or save:
                # Rows on disk reach as far as any checkpoint.
                self.absorb(self.late.flush(), row=save or bool(evaluate and keep.keep_best))
                if save:
                    self.save(done, state, batches)
                stopping = (evaluate and self.evaluate_and_rate(done, state, batches)) or stopping
            self.account.note(done)
            if stopping and not last:
                return True, state, done
        return False, state, total

    def next_batch(self, batches: Any) -> Any:
        ready, begin = getattr(batches, "ready", None), time.perf_counter()
        batch = next(batches)
        now = time.perf_counter()
        self.meter.waited(now - begin, ready)
        self.stragglers.add(now - begin)
        self.read_s = getattr(batches, "seconds", [])
        if (idle := self.late.idle_since(begin)) is not None:
            self.account.waited(now - idle)
        return batch

    def take(self, step: int, state: TrainState, batch: Any) -> Any:
        """(state, metrics) after a step; now and then it is computed twice and compared."""
        call = functools.partial(self.steps, step)
        every = self.recipe.train.repeat_every
        given = self.program.for_training(batch)
        return repeated(call, state, given) if every and (step + 1) % every == 0 else call(state, given)

    def save_due(self) -> bool:
        """Whether process 0 finds that a checkpoint is due by the clock."""
        every = self.recipe.checkpoint.every_s
        if not (self.primary and every and time.monotonic() - self.saved_at >= every):
            return False
        self.saved_at = time.monotonic()
        return True

    def evaluate_and_rate(self, done: int, state: TrainState, batches: Any) -> bool:
        """Evaluates, and saves what is among the best; whether the run is to stop, which may end an evaluation."""
        last = done >= self.recipe.train.steps
        try:
            compiles = contextlib.nullcontext() if self.evaluator.compiled or last else self.settled()
            with compiles, self.aside("evaluation"):
                loss = self.evaluate(state, done, go_on=None if last else self.stop.check)
        except GivenUpError:
            self.write_row(done)
            self.save(done, state, batches)
            return True
        if self.recipe.checkpoint.keep_best and self.checkpoints.rate(done, loss):
            self.save(done, state, batches)
        return False

    @property
    def settles(self) -> bool:
        """Whether the run saves before what compiles in its middle."""
        return bool(self.recipe.checkpoint.every or self.recipe.checkpoint.every_s)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Around what hears no signals for long: waits for the save before it, so that a signal ends the run."""
        if not self.settles:
            yield
            return
        with self.aside("save"):
            self.checkpoints.wait()
        self.note_saved()
        with contextlib.nullcontext() if self.checkpoints.failed else self.stop.at_once(self.folder.close):
            yield

    @contextlib.contextmanager
    def aside(self, kind: str) -> Iterator[None]:
        """Around what is no training step: its time counts as of this kind."""
        with self.meter.paused(), self.account.of(kind):
            yield

    def prepare(self, step: int, state: TrainState, batches: Any) -> None:
        """Compiles the program of a new phase of the run, where one begins."""
        if not self.steps.due(step):
            return
        self.absorb(self.late.flush(), row=self.settles)
        if self.settles:
            self.save(step, state, batches)
        limit = self.watchdog.limit("compiling", self.recipe.train.start_timeout_s)
        with self.settled(), self.aside("compile"), limit:
            compiled = self.steps.prepare(step)
        meet(f"the program of step {step + 1} is compiled")
        self.say(f"step {step + 1} begins a new phase of the run: compiled its program in {compiled.seconds:.1f} s")

    def save(self, step: int, state: TrainState, batches: Any) -> None:
        """Begins to write a checkpoint, unless the run's folder is gone."""
        try:
            self.log.check()
        except OSError as error:
            self.fail(error)
        if anywhere(isinstance(self.failure, WorkdirLostError)):
            return
        if slow := self.stragglers.compared():
            self.say(f"warning: {slow}")
        with self.aside("save"):
            self.checkpoints.save(step, state, position_of_job(batches.state()))
        self.saved_at = time.monotonic()
        self.note_saved()

    def note_saved(self) -> None:
        """Notes in the run's folder that it has a checkpoint, so that a missing one is told from a new run."""
        if self.failure is None and self.primary and (steps := self.checkpoints.steps()):
            try:
                self.folder.note(saved=steps[-1])
            except OSError as error:
                self.fail(error)
            if steps[-1] != self.told_saved:
                self.told_saved = steps[-1]
                self.tracker.checkpoint(self.folder.checkpoints / str(steps[-1]), steps[-1])

    def absorb(self, due: Measured | None, *, row: bool = False) -> None:
        """Counts a finished step's metrics and logs a row when one is due, or one is asked for."""
        if due is None:
            return
        step, metrics, at = due
        self.meter.add(metrics, at)
        self.bad_in_row = self.bad_in_row + 1 if metrics["skipped"] else 0
        if metrics["skipped"]:
            self.say(f"step {step} skipped: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}")
        first, self.first_row = self.first_row, False
        if row or first or step % self.recipe.log.every == 0 or step == self.recipe.train.steps:
            self.write_row(step)
        if self.bad_in_row >= self.recipe.train.max_bad_steps:
            raise NonFiniteError(self.not_finite(step, metrics))

    def write_row(self, step: int) -> None:
        """Logs the steps since the row before, if there are any."""
        if steps := self.meter.steps:
            took = dict(zip(self.recipe.data.paths, np.subtract(self.read_s, self.read_before or 0.0), strict=False))
            self.read_before = self.read_s
            columns = {f"{PREFIX}{name}": 1e3 * seconds / steps for name, seconds in took.items()}
            rate, goodput = float(self.schedule(step - 1)), self.account.spent().goodput
            self.record(self.meter.row(step, learning_rate=rate, goodput=goodput, **columns))

    def record(self, row: Mapping[str, Any]) -> None:
        try:
            self.log.write(row)
        except OSError as error:
            self.fail(error)
        self.progress.row(row)
        self.tracker.log(row)
        for alarm in self.alarms:
            for warning in alarm(row):
                self.say(f"warning: {warning}")

    def keep(self, record: Any) -> None:
        """Writes a record into the run's folder."""
        try:
            save_record(record, self.folder.path)
        except OSError as error:
            self.fail(error)

    def fail(self, error: OSError) -> None:
        """The run's folder cannot be written: a run that keeps nothing must not go on."""
        if self.failure is None:
            self.failure = error
            self.say(f"error: cannot write to {self.folder}: {error.strerror or error}; stopping after this step")
            self.stop.ask()

    def failed(self, step: int) -> int:
        """Says what is left of a run whose folder could not be written; the exit code."""
        steps = [] if anywhere(isinstance(self.failure, WorkdirLostError)) else self.checkpoints.steps()
        kept = f"the last checkpoint is of step {steps[-1]}" if steps else "no checkpoint is there"
        why = f": {self.failure.strerror or self.failure}" if self.failure else ""
        self.last_words(f"stopped at step {step}, because {self.folder} could not be written{why}; {kept}")
        return FAILED

    def last_words(self, text: str) -> None:
        """A line after the progress line has ended."""
        self.say = lambda text: print(text, flush=True)
        if self.primary:
            self.say(text)

    def not_finite(self, step: int, metrics: Mapping[str, Any]) -> str:
        bad = ((name, value) for name, value in metrics.items() if np.ndim(value) == 0 and not np.isfinite(value))
        shown = ", ".join(f"{name} {float(value):g}" for name, value in bad)
        return (
            f"{self.bad_in_row} steps in a row were not finite, the last at step {step} ({shown}). Parameters are "
            f"those of step {step - self.bad_in_row}; checkpoints of {self.folder} are whole. Lower "
            "optimizer.learning_rate, or look at the rows of metrics.jsonl before it"
        )

    def evaluate(
        self, state: TrainState, step: int, *, recorded: bool = True, go_on: Callable[[], None] | None = None
    ) -> float | None:
        """Held-out loss, what routing did, and a passage for the report; the loss, None where nothing is held out.
        recorded: whether it becomes a row; go_on: see Evaluator."""
        self.progress.doing("evaluating")
        with self.watchdog.limit("evaluating", self.recipe.train.step_timeout_s):
            columns, counter = self.evaluator(state, go_on)
            self.passage = self.evaluator.passage(state)
        row = {**self.meter.position(step), **columns}
        if recorded:
            self.record(row)
        health = health_warnings(row, self.facts.recursion, step / self.recipe.train.steps)
        for name in health.keys() - self.worried:
            self.say(f"warning: {health[name]}")
        self.worried = set(health)
        self.counter = counter
        if self.primary:
            self.keep(self.routing_record(step))
            for title, show in self.passages():
                show(text := io.StringIO())
                self.tracker.text(title, step, text.getvalue())
        return row.get("eval/loss")

    def routing_record(self, step: int, sample: SampleRecord | None = None) -> RoutingRecord:
        text = lambda token: self.data.tokenizer.token_bytes(token).decode(errors="replace")  # noqa: E731
        return self.counter.record(step, self.evaluator.selection, self.passage, sample, text)

    def passages(self) -> Iterator[tuple[str, Callable[[TextIO], None]]]:
        """Ways to show the held-out text: a title, and what prints it."""
        if self.facts.chunking and self.passage:
            stages = len(self.facts.chunking)
            yield "held-out text and its chunks", functools.partial(print_chunks, self.passage, stages)
        if self.facts.recursions > 1 and self.passage:
            title = "held-out text, shaded by how many times each token went through the shared block"
            yield title, functools.partial(print_passage, self.passage, self.facts.recursions)

    def finish(self, state: TrainState, step: int) -> None:
        """A sample, the report, and where everything is."""
        written = continuation(self.program, self.data.tokenizer, state, self.say)
        if not self.primary:
            return
        self.keep(self.routing_record(step, written))
        try:
            report = write_report(self.folder.path)
            self.folder.note(finished=step)
        except OSError as error:
            self.fail(error)
            return
        self.tracker.report(report, step)
        for title, show in self.passages():
            print(f"\n{title}:\n")
            show(sys.stdout)
        if written is not None:
            text = printable(written.prompt + written.text)
            print(f"\na continuation of {written.prompt!r}:\n\n{text}")
            self.tracker.text("continuation", step, text)
        print(f"\nworkdir      {self.folder}")
        print(f"report       {self.folder}/{report.name}")
        print(f"metrics      {self.folder}/{self.folder.metrics.name}")
        best = f"; best by held-out loss: {', '.join(map(str, found))}" if (found := self.checkpoints.best()) else ""
        print(f"checkpoints  {self.folder.checkpoints} (steps {', '.join(map(str, self.checkpoints.steps()))}{best})")
