"""Dashboards: W&B offline for real, and every way it can fail with a stand-in; TensorBoard's files read back. Nothing
of either reaches the run."""

import importlib.machinery
import importlib.util
import struct
import sys
import threading
import time
import types

import pytest

from adaptive.training.config import LogConfig
from adaptive.training.tracking import About, Several, Tracker, start_tracking, weights_and_biases
from adaptive.training.tracking.tensorboard import TensorBoardTracker
from adaptive.training.tracking.weights_and_biases import WandbTracker, key_present

ROW = {"step": 7, "tokens": 70, "loss": 2.5, "eval/loss": None}


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


class Package(types.ModuleType):
    """Stands in for wandb. `fails` names the calls that raise; `waits` holds init until it is set."""

    def __init__(self, fails=(), waits=None):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.fails, self.waits, self.inits, self.logged, self.finished = fails, waits, [], [], 0
        self.url, self.dir, self.id, self.artifacts = "an address", "folder/files", "1a2b", []
        self.Histogram = lambda np_histogram: ("histogram", *np_histogram)
        self.Html = lambda text: ("html", text)

        class Settings:
            model_fields = ("silent", "init_timeout")  # an older package, without finish_timeout

            def __init__(self, silent, init_timeout):
                self.silent, self.init_timeout = silent, init_timeout

        self.Settings = Settings

    def init(self, mode, **about):
        self.inits.append((mode, about))
        if self.waits is not None:
            self.waits.wait(20)
        if f"init {mode}" in self.fails:
            raise RuntimeError("no route to host\nlong explanation")
        return self

    def define_metric(self, name, **how):
        assert isinstance(name, str) and how.get("step_metric", "step") == "step"

    def log(self, values):
        if "log" in self.fails:
            raise OSError("broken pipe")
        self.logged.append(values)

    def Artifact(self, name, type, metadata):
        made = types.SimpleNamespace(name=name, type=type, metadata=metadata, parts=[])
        made.add_file = lambda path: made.parts.append(path)
        made.add_reference = lambda address, checksum: made.parts.append((address, checksum))
        return made

    def log_artifact(self, artifact, aliases=()):
        self.artifacts.append((artifact, aliases))

    def finish(self):
        self.finished += 1


@pytest.fixture
def package(monkeypatch):
    def install(**how):
        fake = Package(**how)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


def start(tmp_path, mode="offline", log=(), **more):
    said = []
    about = About(tmp_path, "mor_tiny", "1a2b", {"model": {"width": 8}}, {"devices": 8}, **more)
    log = LogConfig(wandb=mode, project="p", **dict(log))
    return start_tracking(log, about, said.append), said


def test_offline_for_real(tmp_path):
    tracker, said = start(tmp_path)
    tracker.log(ROW)
    tracker.finish()
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    expected = (b"tokens", b"mor_tiny-1a2b")
    until = time.monotonic() + 30  # the package's own process writes the file, and may do so after `finish`
    while not all(part in log.read_bytes() for part in expected) and time.monotonic() < until:
        time.sleep(0.1)
    assert [part for part in expected if part not in log.read_bytes()] == []
    assert len(said) == 1 and "wandb sync" in said[0] and str(log.parent) in said[0]


LAYERS = {
    "experts/by_layer/layer": [0, 2],
    "experts/by_layer/empty": [1.0, None],
    "experts/by_layer/experts_per_token": [[0.25, 0.75], [0.5, 0.5]],
    "experts/load": [[0.1, 0.9], None],
}


def test_layers_go_out_as_scalars_and_histograms_of_their_own(tmp_path, package):
    fake = package()
    tracker, _ = start(tmp_path)
    tracker.log({"step": 7, "experts/empty": 1.0, **LAYERS})
    tracker.finish()
    bars = lambda *shares: ("histogram", list(shares), [-0.5, 0.5, 1.5])  # noqa: E731
    (row,) = fake.logged
    assert row == {
        "step": 7,
        "experts/empty": 1.0,
        "experts/layer_0/empty": 1.0,
        "experts/layer_0/experts_per_token": bars(0.25, 0.75),
        "experts/layer_2/experts_per_token": bars(0.5, 0.5),
        "experts/layer_0/load": bars(0.1, 0.9),
    }


def test_a_run_is_told_of_with_its_settings_and_facts(tmp_path, package):
    fake = package()
    tracker, _ = start(tmp_path, start=5, tags=("a", "b"), notes="why")
    tracker.log(ROW)
    tracker.finish()
    assert fake.logged == [{"step": 7, "tokens": 70, "loss": 2.5}] and fake.finished == 1
    ((mode, about),) = fake.inits
    assert mode == "offline" and about["config"] == {"model": {"width": 8}, "run_id": "1a2b", "devices": 8}
    assert about["tags"] == ["a", "b"] and about["notes"] == "why" and about["project"] == "p"


def test_all_starts_are_one_run(tmp_path, package):
    """Rows have no step of W&B's own, which may not go back as a resumed run does."""
    fake = package()
    start(tmp_path)[0].finish()
    tracker, said = start(tmp_path, start=40)
    tracker.finish()
    first, second = (about for _, about in fake.inits)
    assert first["id"] == second["id"] == "1a2b" and first["name"] == second["name"] == "mor_tiny-1a2b"
    assert first["resume"] == "allow" and "wandb sync --append" in said[0]


def test_passages_reports_and_checkpoints(tmp_path, package):
    fake = package()
    tracker, _ = start(tmp_path)
    tracker.text("held-out text", 3, "a <b>\n c")
    tracker.checkpoint(tmp_path / "checkpoints" / "3", 3)
    tracker.report(tmp_path / "report.html", 3)
    tracker.finish()
    ((name, (kind, page)),) = ((k, v) for k, v in fake.logged[0].items() if k != "step")
    assert name == "held-out text" and kind == "html" and "a &lt;b&gt;\n c" in page and fake.logged[0]["step"] == 3
    (saved, aliases), (report, _) = fake.artifacts
    assert saved.parts == [((tmp_path / "checkpoints" / "3").as_uri(), False)] and saved.metadata == {"step": 3}
    assert aliases == ["latest", "step-3"] and (saved.type, report.type) == ("model", "report")
    assert report.parts == [str(tmp_path / "report.html")]


def test_online_that_cannot_be_reached_goes_on_offline(tmp_path, package, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    fake = package(fails=("init online",))
    tracker, said = start(tmp_path, "online")
    tracker.log(ROW)
    tracker.finish()
    assert [mode for mode, _ in fake.inits] == ["online", "offline"] and len(fake.logged) == 1
    assert said[0] == "W&B: cannot be reached (no route to host), so this run is tracked offline"


@pytest.mark.parametrize("fails", ["init offline", "log"])
def test_failures_end_tracking_and_nothing_else(tmp_path, package, fails):
    package(fails=(fails,))
    tracker, said = start(tmp_path)
    for step in range(20):
        tracker.log({"step": step})
    tracker.finish()
    tracker.log(ROW)
    tracker.finish()
    assert len([line for line in said if "tracking stopped" in line]) == 1


def test_a_service_that_hangs_holds_up_nothing(tmp_path, package, monkeypatch):
    monkeypatch.setattr(weights_and_biases, "_GIVE_UP_S", 0.05)
    monkeypatch.setattr(weights_and_biases, "_QUEUE", 3)
    released = threading.Event()
    package(waits=released)
    tracker, said = start(tmp_path)
    for step in range(10):
        tracker.log({"step": step})
    tracker.finish()
    assert [line for line in said if "not keeping up" in line] and [line for line in said if "gave up" in line]
    assert len(said) == 2
    released.set()


def test_online_without_a_key_is_tracked_offline(tmp_path, package):
    fake = package()
    tracker, said = start(tmp_path, "online")
    tracker.finish()
    assert fake.inits[0][0] == "offline" and "no key" in said[0]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_missing_package_is_said_in_one_line(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracker, said = start(tmp_path, mode)
    assert tracker.trackers == ()
    assert len(said) == 1 and "pip install 'adaptive-lm[wandb]'" in said[0]


@pytest.mark.parametrize("mode", ["auto", "disabled"])
def test_nothing_happens_unless_asked_for(tmp_path, package, mode):
    fake = package()
    tracker, said = start(tmp_path, mode)
    tracker.log(ROW)
    tracker.finish()
    assert tracker.trackers == () and not said and not fake.inits and not list(tmp_path.iterdir())


def test_auto_follows_a_key_and_the_packages_own_variable(tmp_path, package, monkeypatch):
    fake = package()
    monkeypatch.setenv("WANDB_MODE", "offline")
    start(tmp_path, "auto")[0].finish()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    start(tmp_path, "auto")[0].finish()
    assert [mode for mode, _ in fake.inits] == ["offline", "online"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert start(tmp_path, "auto")[0].trackers == ()


def test_a_key_is_found_in_netrc(tmp_path, monkeypatch):
    assert not key_present()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert key_present()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    assert not key_present()
    (tmp_path / "netrc").write_text("no netrc at all")
    assert not key_present()


def test_all_trackers_speak_the_protocol():
    methods = {name for name in vars(Tracker) if not name.startswith("_")}
    assert methods == {"log", "text", "report", "checkpoint", "finish"}
    assert all(methods <= set(dir(kind)) for kind in (Several, WandbTracker, TensorBoardTracker))


# TensorBoard

BOARD = {"mode": "disabled", "log": {"tensorboard": True}}


def events(folder):
    """Every event of the files of a folder, in the order they were written."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return found


def test_event_files_have_the_rows(tmp_path):
    tracker, said = start(tmp_path, **BOARD, notes="why")
    tracker.log({"step": 7, "loss": 2.5, "experts/empty": None, **LAYERS})
    tracker.text("held-out text", 7, "a b")
    tracker.checkpoint(tmp_path / "7", 7)
    tracker.finish()
    found = {
        value.tag: (event.step, value) for event in events(tmp_path / "tensorboard") for value in event.summary.value
    }
    assert found["loss"][0] == 7 and found["loss"][1].simple_value == 2.5 and "experts/empty" not in found
    bars = found["experts/layer_0/load"][1].histo
    assert list(bars.bucket) == [0.1, 0.9] and list(bars.bucket_limit) == [0.5, 1.5]
    assert found["held-out text/text_summary"][1].tensor.string_val == [b"    a b"]
    assert {"notes/text_summary", "checkpoint/text_summary"} <= set(found)
    assert said == [f"TensorBoard: look with `tensorboard --logdir {tmp_path / 'tensorboard'}`"]


def test_rows_after_the_step_of_a_resumed_run_are_withdrawn(tmp_path):
    start(tmp_path, **BOARD, start=40)[0].finish()
    assert [event.step for event in events(tmp_path / "tensorboard") if event.session_log.status] == [41]


def test_a_folder_that_cannot_be_written_ends_tensorboard_alone(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    tracker, said = start(tmp_path, **BOARD)
    tracker.log(ROW)
    tracker.finish()
    assert len(said) == 1 and said[0].startswith("TensorBoard: stopped")


def test_without_the_package_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracker, said = start(tmp_path, **BOARD)
    assert tracker.trackers == () and "pip install 'adaptive-lm[tensorboard]'" in said[0]
