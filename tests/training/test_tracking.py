"""W&B: offline for real; every way it can fail, with a stand-in; nothing of it reaches the run."""

import importlib.machinery
import importlib.util
import sys
import threading
import time
import types

import pytest

from adaptive.training import tracking
from adaptive.training.tracking import NoTracker, WandbTracker, key_present, start_tracking

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
        self.url, self.dir = "an address", "folder/files"

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

    def log(self, values, step):
        if "log" in self.fails:
            raise OSError("broken pipe")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def package(monkeypatch):
    def install(**how):
        fake = Package(**how)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


def start(tmp_path, mode="offline", **more):
    said = []
    tracker = start_tracking(
        mode,
        workdir=tmp_path,
        project="p",
        name="mor_tiny",
        run_id="1a2b",
        config={"model": {"width": 8}},
        say=said.append,
        **more,
    )
    return tracker, said


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


def test_layers_go_out_as_scalars_of_their_own(tmp_path, package):
    fake = package()
    tracker, _ = start(tmp_path)
    by_layer = {"experts/by_layer/layer": [0, 2], "experts/by_layer/empty": [1.0, None], "experts/load": [[0.5, 0.5]]}
    tracker.log({"step": 7, "experts/empty": 1.0, **by_layer})
    tracker.finish()
    assert fake.logged == [(7, {"step": 7, "experts/empty": 1.0, "experts/layer_0/empty": 1.0})]


def test_rows_go_out_under_their_own_step(tmp_path, package):
    fake = package()
    tracker, _ = start(tmp_path, start_step=5)
    tracker.log(ROW)
    tracker.finish()
    assert fake.logged == [(7, {"step": 7, "tokens": 70, "loss": 2.5})]
    assert fake.finished == 1
    ((mode, about),) = fake.inits
    assert mode == "offline" and about["config"] == {"model": {"width": 8}, "run_id": "1a2b", "start_step": 5}


def test_every_attempt_is_a_run_of_its_own_in_the_group_of_the_workdir(tmp_path, package):
    fake = package()
    start(tmp_path)[0].finish()
    start(tmp_path, start_step=40)[0].finish()
    first, second = (about for _, about in fake.inits)
    assert first["group"] == second["group"] == "mor_tiny-1a2b"
    assert (first["name"], second["name"]) == ("mor_tiny-1a2b", "mor_tiny-1a2b-from-40")
    assert not {"id", "resume"} & set(first), "a run is never resumed: repeated steps would be dropped"


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
    monkeypatch.setattr(tracking, "_GIVE_UP_S", 0.05)
    monkeypatch.setattr(tracking, "_QUEUE", 3)
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
    assert isinstance(tracker, NoTracker)
    assert len(said) == 1 and "pip install 'adaptive-lm[wandb]'" in said[0]


@pytest.mark.parametrize("mode", ["auto", "disabled"])
def test_nothing_happens_unless_asked_for(tmp_path, package, mode):
    fake = package()
    tracker, said = start(tmp_path, mode)
    tracker.log(ROW)
    tracker.finish()
    assert isinstance(tracker, NoTracker) and not said and not fake.inits and not list(tmp_path.iterdir())


def test_auto_follows_a_key_and_the_packages_own_variable(tmp_path, package, monkeypatch):
    fake = package()
    monkeypatch.setenv("WANDB_MODE", "offline")
    start(tmp_path, "auto")[0].finish()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    start(tmp_path, "auto")[0].finish()
    assert [mode for mode, _ in fake.inits] == ["offline", "online"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert isinstance(start(tmp_path, "auto")[0], NoTracker)


def test_a_key_is_found_in_netrc(tmp_path, monkeypatch):
    assert not key_present()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert key_present()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    assert not key_present()
    (tmp_path / "netrc").write_text("no netrc at all")
    assert not key_present()


def test_other_processes_track_nothing(tmp_path, package):
    fake = package()
    tracker, said = start(tmp_path, primary=False)
    assert isinstance(tracker, NoTracker) and not said and not fake.inits


def test_both_trackers_speak_the_protocol():
    methods = {name for name in vars(tracking.Tracker) if not name.startswith("_")}
    assert methods == {"log", "finish"}
    assert all(methods <= set(dir(kind)) for kind in (NoTracker, WandbTracker))
