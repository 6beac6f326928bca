"""Do the installed versions fit? `adaptive doctor` also shows the devices and the optional packages."""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.doctor"))

import importlib.metadata
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

from adaptive import command
from adaptive.errors import UserError


class Range(NamedTuple):
    """Versions of a package that the tests ran with: from `low`, before `below`."""

    package: str
    low: str
    below: str


PYTHON = Range("python", "3.11", "3.15")

# The same ranges as in pyproject.toml.
TESTED = (
    Range("jax", "0.10.2", "0.12"),
    Range("flax", "0.12.8", "0.13"),
    Range("optax", "0.2.8", "0.3"),
    Range("orbax-checkpoint", "0.12.8", "0.13"),
    Range("grain", "0.2.18", "0.3"),
    Range("numpy", "2.0", "3"),
)

# They must have jaxlib's version; jax leaves them aside otherwise, and the run would be on the CPU.
OF_JAXLIB = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "jax-cuda12-pjrt")

OPTIONAL = {
    "tokenizers": ("bpe", "tokenizer.json files and training a BPE"),
    "pyarrow": ("hf", "Parquet files"),
    "zstandard": ("hf", "compressed jsonl files"),
    "safetensors": ("hf", "*.safetensors files"),
    "datasets": ("hf", "data sets of the Hugging Face hub"),
    "wandb": ("wandb", "Weights & Biases"),
    "tensorboardx": ("tensorboard", "TensorBoard files"),
    "regex": ("words", "chunks of an H-Net that are words"),
    "jax-cuda13-plugin": ("gpu", "NVIDIA GPUs, driver 580 or newer"),
    "jax-cuda12-plugin": ("cuda12", "NVIDIA GPUs, driver 525 or newer"),
    "libtpu": ("tpu", "Cloud TPUs"),
}

FIX = (
    "pip install -r requirements/cpu.txt (gpu.txt, cuda12.txt or tpu.txt for those; ./scripts/train does it by itself)"
)


def check_versions() -> str:
    """One line with the versions in use, and a warning for each that is newer than those tested. Imports none of them.

    Raises UserError, with the command that mends it, if a package is missing or too old, or a compiled part of jax does
    not belong to the installed jax.
    """
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    too_new = []
    for wanted in (PYTHON, *TESTED):
        version = found.setdefault(wanted.package, installed(wanted.package))
        if not version:
            raise UserError(f"{wanted.package} is not installed in {sys.prefix}. To mend it: {FIX}")
        if order(version) < order(wanted.low):
            raise UserError(f"{describe(version, wanted)}: too old. To mend it: {FIX}")
        if order(version) >= order(wanted.below):
            too_new.append(f"{describe(version, wanted)}: newer, and not tested. If it fails: {FIX}")
    jaxlib = installed("jaxlib")
    if not jaxlib or order(jaxlib) > order(found["jax"]):
        raise UserError(f"jaxlib is {jaxlib or 'absent'} but jax is {found['jax']}. To mend it: {FIX}")
    for package in OF_JAXLIB:
        version = installed(package)
        if version and version != jaxlib:
            raise UserError(f"{package} is {version} but jaxlib is {jaxlib}: they must match. To mend it: {FIX}")
    line = ", ".join(f"{package} {version}" for package, version in found.items())
    return "\n".join([line, *(f"warning: {text}" for text in too_new)])


def describe(version: str, wanted: Range) -> str:
    return f"{wanted.package} is {version}, tested are {wanted.low} and later, before {wanted.below}"


def installed(package: str) -> str:
    """The version of an installed distribution; empty if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def order(version: str) -> tuple[int, ...]:
    """Versions compare as their leading numbers do: 0.10.2rc1 counts as 0.10.2."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, leading.group().split("."))) if leading else ()


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    command.Options("doctor", __doc__ or "").read(arguments)
    try:
        print(check_versions())
        code = 0
    except UserError as error:
        print(error)
        code = error.code
    for wanted in (PYTHON, *TESTED):
        print(f"  {wanted.package:18} tested: {wanted.low} and later, before {wanted.below}")
    print("optional packages")
    for package, (extra, enables) in OPTIONAL.items():
        state = installed(package) or f"absent, pip install 'adaptive-lm[{extra}]'"
        print(f"  {package:18} {enables}: {state}")
    if code == 0:
        import jax

        from adaptive.runs.platform import start_backend

        start_backend()
        print("devices")
        for device in jax.devices():
            print(f"  {device.id}: {device.device_kind} ({device.platform})")
    return code
