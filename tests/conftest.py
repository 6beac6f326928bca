"""Every test runs on eight emulated CPU devices, with machine code that is compiled fast and kept between runs."""

import gc
import importlib.metadata
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# Most programs of tests run once: not optimised, they take a quarter of the time. Flags change the machine code alone.
# In one piece, because they are small.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jax").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # later versions have them alone
os.environ["JAX_PLATFORMS"] = "cpu"
given = os.environ.get("XLA_FLAGS", "").split()  # a worker's come from the process that started it, complete
os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in FLAGS if flag not in given)])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "adaptive-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Threads of XLA's CPU client. With one per device, independent collectives of one device can hold two of them, and the
# device that finds none never arrives.
os.environ.setdefault("NPROC", "32")
# What starts the tests may ignore these (nohup, a shell's background): their processes then would, too.
for each, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(each) is signal.SIG_IGN:
        signal.signal(each, action)
# Tracing makes many objects that live: Python's default of a collection per 700 of them costs a tenth of the time, and
# a collection of all a second and more.
gc.set_threshold(100_000, 20, 400)

LONG = tuple(
    f"tests/{name}.py::"
    for name in (
        "test_every_recipe", "training/test_resume", "parallel/test_hnet_sharding", "parallel/test_sharding",
        "models/test_properties", "interop/test_official_mor", "test_no_dead_options", "models/test_hnet",
        "interop/test_official_hnet", "models/test_recursion", "models/test_hnet_composition", "test_scripts",
        "runs/test_checkpoint_processes", "training/test_several_processes",
    )
)  # fmt: skip
COMPILED = "/jax/core/compile/backend_compile_duration"  # heard for each program, also where the cache on disk holds it
MOST_MAPPINGS = 30_000  # Linux allows a process 65,530; a compiled program takes about a dozen while it lives
MAPPINGS = Path("/proc/self/maps")


class Programs:
    """Names of the programs that this process compiled, and how many had been when its mappings were counted."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.counted, self.listening = 0, False

    def listen(self) -> None:
        if "jax" in sys.modules and not self.listening:
            import jax.monitoring

            jax.monitoring.register_event_duration_secs_listener(self.hear)
            self.listening = True

    def hear(self, event: str, seconds: float, **about: object) -> None:
        if event == COMPILED:
            self.names.append(str(about.get("fun_name")))

    def make_room(self) -> None:
        """Forgets compiled programs when there are many: out of mappings, XLA crashes the process."""
        if len(self.names) - self.counted < 200 or not MAPPINGS.exists():
            return
        self.counted = len(self.names)
        if MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
            sys.modules["jax"].clear_caches()
            gc.collect()


PROGRAMS = Programs()
BEFORE = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The longest files first: with --dist loadfile, a file's tests share one process and its programs, and a long one
    that begins last would keep a single process busy."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    PROGRAMS.listen()
    item.stash[BEFORE] = len(PROGRAMS.names)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    PROGRAMS.make_room()
    names = PROGRAMS.names[item.stash[BEFORE] :]
    if names and item.get_closest_marker("compiles") is None:
        pytest.fail(f"compiles {', '.join(sorted({*names}))}: mark it with pytest.mark.compiles", pytrace=False)
