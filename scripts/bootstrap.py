"""Makes `.venv` beside this repository and installs the pinned dependencies into it, once.

    python scripts/bootstrap.py run|test

`run` installs requirements/{cpu,gpu,cuda12,tpu}.txt, whichever fits the machine; `test` installs requirements/dev.txt
and, on Linux, the compilers for TPUs and NVIDIA GPUs in a folder apart, where only tests that compile for them look.
A file in the environment records what was installed, so that the next start only compares a hash. It is written last:
an interrupted installation leaves none, and the next start makes the environment anew. Standard library only: nothing
else is installed yet when this runs.
"""

import contextlib
import fcntl
import glob
import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
MADE_HERE = VENV / "made-by-adaptive"  # an environment without it is the user's own, and is left alone
INSTALLED = VENV / "installed"  # lines "LOCK DIGEST"
COMPILERS = VENV / "compilers"  # not on the path: jax would look for the machines that they are for
COMPILER_PACKAGES = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda13-pjrt")}

PLATFORMS = ("cpu", "gpu", "cuda12", "tpu")
OLDEST_DRIVER = {"gpu": 580, "cuda12": 525}  # of NVIDIA, for CUDA 13 and 12
GOOGLE_PCI_VENDOR = "0x1ae0"
TPU_PCI_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # TPU v2 to v7x


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the platform ---------------------------------------------------------------------------------------------------


def find_platform() -> str:
    """One of PLATFORMS: what ADAPTIVE_PLATFORM asks for, else what this machine has."""
    asked = os.environ.get("ADAPTIVE_PLATFORM")
    if asked:
        if asked not in PLATFORMS:
            raise SetupError(f"ADAPTIVE_PLATFORM={asked}: expected one of {', '.join(PLATFORMS)}")
        return asked
    if not sys.platform.startswith("linux"):
        return "cpu"
    if has_tpu():
        return "tpu"
    driver = nvidia_driver()
    if driver is None:
        return "cpu"
    for platform, oldest in OLDEST_DRIVER.items():
        if int(driver.split(".")[0]) >= oldest:
            return platform
    raise SetupError(
        f"This machine's NVIDIA driver is {driver}; the pinned packages need {min(OLDEST_DRIVER.values())} or newer.\n"
        "Update the driver, or train on the CPU: ADAPTIVE_PLATFORM=cpu and the same command."
    )


def has_tpu() -> bool:
    def read(path: str) -> str:
        with contextlib.suppress(OSError):
            return pathlib.Path(path).read_text(encoding="utf-8").strip()
        return ""

    return any(
        read(vendor) == GOOGLE_PCI_VENDOR and read(vendor.removesuffix("vendor") + "device") in TPU_PCI_DEVICES
        for vendor in glob.glob("/sys/bus/pci/devices/*/vendor")
    )


def nvidia_driver() -> str | None:
    """The driver's version, or None where nvidia-smi is missing or finds no working GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        if found and found[0][0].isdigit():
            return found[0]
    return None


# --- what is installed ----------------------------------------------------------------------------------------------


def digest(lock: str, version: str) -> str:
    """Changes with the pins, the package's own metadata, Python's version and the place of the repository."""
    locks = [lock, *(COMPILER_PACKAGES if lock == "dev" else ())]
    files = [
        *(ROOT / "requirements" / f"{name}.txt" for name in locks),
        *sorted([*ROOT.glob("pyproject.toml"), *ROOT.glob("setup.py")]),
    ]
    parts = [file.read_bytes() for file in files]
    packages = sorted({path.parent.name for path in ROOT.glob("*/*.py")})  # an editable install lists them by name
    parts += [version.encode(), os.fsencode(ROOT), " ".join(packages).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def installed() -> dict[str, str]:
    """The locks installed in .venv, each with the digest it had; empty where there is no finished environment."""
    try:
        return dict(line.split() for line in INSTALLED.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return {}


def venv_version() -> str:
    """The version of a .venv that works and that this command may use, as "3.11"; else empty."""
    command = [str(PYTHON), "-c", "import sys, pip; print('%d.%d' % sys.version_info[:2])"]
    try:
        version = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    named_by_user = "ADAPTIVE_PYTHON" in os.environ
    return "" if named_by_user and version != "{}.{}".format(*sys.version_info) else version


def up_to_date() -> dict[str, str]:
    """The part of `installed()` that still fits the repository."""
    recorded = installed()
    version = venv_version() if recorded else ""
    return {lock: found for lock, found in recorded.items() if version and found == digest(lock, version)}


# --- installing -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone():
    """Holds a lock that no two set-ups of this repository have at once; it ends with the process, however that ends."""
    with open(ROOT / ".venv.lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another command is setting up .venv; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_pip(*arguments: str) -> None:
    """Runs pip in .venv and shows one line for each package that it fetches."""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    environment = {**os.environ, "PIP_USER": "0", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True, env=environment) as pip:
        try:
            assert pip.stdout is not None
            for line in map(str.strip, pip.stdout):
                if line.startswith(("Downloading ", "Using cached ")) and ".metadata" not in line:
                    say(f"  {line}")
                elif line.startswith("Installing collected packages"):
                    say(f"  unpacking {line.count(',') + 1} packages")
        except BaseException:
            pip.terminate()
            raise
    if pip.returncode:
        raise SetupError(
            f"pip could not install the dependencies (exit status {pip.returncode}, its messages are above).\n"
            "A package index must be within reach. The same command starts again from what was already fetched."
        )


def make_venv() -> None:
    """A fresh .venv; refuses to replace one that it did not make."""
    if VENV.exists() and not MADE_HERE.exists():
        raise SetupError(
            f"{VENV} exists and was not made by this script, so it is left as it is. Either use it:\n"
            "  source .venv/bin/activate\n"
            "  pip install -r requirements/cpu.txt && pip install --no-deps -e .\n"
            "  python -m adaptive.train --recipe mor_tiny\n"
            "or move it away and run the same command again."
        )
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments (no ensurepip: Debian and Ubuntu package it apart).\n"
            f"Install it: apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-venv\n"
            "or name another interpreter: ADAPTIVE_PYTHON=/path/to/python3 and the same command."
        ) from None
    if VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    MADE_HERE.touch()
    venv.create(VENV, with_pip=True, symlinks=True)


def install_compilers() -> None:
    """What compiles for TPUs and NVIDIA GPUs without one, of the versions in the lists; a machine may do without."""
    pins = [
        line.strip()
        for lock, packages in COMPILER_PACKAGES.items()
        for line in (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8").splitlines()
        if line.startswith(tuple(f"{package}==" for package in packages))
    ]
    try:
        run_pip("--no-deps", "--upgrade", "--target", str(COMPILERS), *pins)
    except SetupError:
        say("Tests that compile for TPUs and NVIDIA GPUs will be skipped: their compilers could not be installed.")


def install(lock: str) -> None:
    begin = time.monotonic()
    keep = up_to_date()
    if installed() and venv_version():
        say(f"Updating {VENV} to requirements/{lock}.txt")
        INSTALLED.unlink()
    else:
        say(f"Making {VENV} with Python {sys.version.split()[0]} and requirements/{lock}.txt (once; a minute or two)")
        make_venv()
    run_pip("-r", str(ROOT / "requirements" / f"{lock}.txt"))
    run_pip("--no-deps", "-e", str(ROOT))
    if lock == "dev" and sys.platform.startswith("linux"):
        install_compilers()
    keep[lock] = digest(lock, venv_version())
    unfinished = INSTALLED.with_suffix(".new")
    unfinished.write_text("".join(f"{name} {value}\n" for name, value in keep.items()), encoding="utf-8")
    unfinished.replace(INSTALLED)
    say(f"Ready after {time.monotonic() - begin:.0f} s")


def main(purpose: str) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        lock = "dev" if purpose == "test" else find_platform()
        if lock in up_to_date():
            return 0
        with alone():
            if lock not in up_to_date():  # the command that was waited for may have done it
                install(lock)
        return 0
    except SetupError as error:
        say(str(error))
        return 2
    except OSError as error:
        say(f"Cannot set up {VENV}: {error}")
        return 2
    except KeyboardInterrupt:
        say("\nInterrupted; the same command starts again from what was already fetched.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
