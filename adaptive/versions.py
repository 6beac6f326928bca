"""Which versions of packages are in use, and whether they fit. Imports none of them."""

import importlib.metadata
import re
import sys
from typing import NamedTuple

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

FIX = (
    "pip install -r requirements/cpu.txt (gpu.txt, cuda12.txt or tpu.txt for those; ./scripts/train does it by itself)"
)


def check_versions() -> str:
    """One line with the versions in use, and a warning for each that is newer than those tested.

    Raises UserError, with the command that mends it, if a package is missing or too old, or a compiled part of jax does
    not belong to the installed jax.
    """
    found, too_new = in_use(), []
    for wanted in (PYTHON, *TESTED):
        version = found[wanted.package]
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


def in_use() -> dict[str, str]:
    """The version of Python and of each package that is tested; empty where it is not installed."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python} | {wanted.package: installed(wanted.package) for wanted in TESTED}


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
