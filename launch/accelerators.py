"""What a job asks a cluster for: slices of TPUs and nodes of GPUs, and what each kind of cluster calls them.

Names of GKE's node labels, of Cloud TPU's accelerator types and of runtime versions are Google's, as of November 2026.
"""

import dataclasses
import math
import re

from adaptive.errors import UserError

_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
}  # fmt: skip
CHIPS_PER_HOST = 4  # of a slice of several hosts


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A kind of TPU.

    shapes   how the chips of a slice of so many are arranged
    gke      label of GKE's node pools
    gcloud   prefix of Cloud TPU's accelerator types; empty: not offered there
    counts   what the number in a name counts, for each chip: 2 where it is cores
    runtime  Cloud TPU's image of the machines
    devices  of jax, for each chip
    """

    shapes: dict[int, str]
    gke: str
    gcloud: str
    counts: int
    runtime: str
    devices: int = 1


TPUS = {
    "v4": Tpu(_CUBE, "tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": Tpu(_FLAT, "tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Tpu(_CUBE, "tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Tpu(_FLAT, "tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
    "v7x": Tpu(_CUBE, "tpu7x", "", 2, "", devices=2),
}

GPUS = {  # name: label of GKE's node pools
    "a100": "nvidia-tesla-a100",
    "a100-80gb": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h100-mega": "nvidia-h100-mega-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
    "l4": "nvidia-l4",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """So many chips of a kind of TPU, which one network joins."""

    name: str
    kind: Tpu
    chips: int

    @property
    def shape(self) -> str:
        return self.kind.shapes[self.chips]

    @property
    def hosts(self) -> int:
        return math.ceil(self.chips / CHIPS_PER_HOST)

    @property
    def cloud_type(self) -> str:
        """Cloud TPU's name, such as v5litepod-256. Raises UserError where Cloud TPU has none."""
        if not self.kind.gcloud:
            raise UserError(f"--accelerator {self.name}: Cloud TPU's queued resources have no {self.name}; use gke")
        return f"{self.kind.gcloud}-{self.chips * self.kind.counts}"


def slice_of(name: str) -> Slice | None:
    """The slice that a name such as v5e-256 means; None for what names no TPU.

    The number counts chips, or cores of v4, v5p and v7x, as Google's names do. Raises UserError for a number that no
    slice has.
    """
    found = re.fullmatch(r"(v\d+[a-z]?)(?:-(\d+))?", name)
    if found is None:
        return None
    kind = TPUS.get(found[1])
    if kind is None:
        raise UserError(f"--accelerator {name}: no TPU is called {found[1]}; there are {', '.join(TPUS)}")
    chips, rest = divmod(int(found[2] or 0), kind.counts)
    if rest or chips not in kind.shapes:
        sizes = ", ".join(f"{found[1]}-{size * kind.counts}" for size in kind.shapes)
        counted = "cores" if kind.counts == 2 else "chips"
        raise UserError(
            f"--accelerator {name}: there are {sizes} (the number counts {counted}); --slices joins several"
        )
    return Slice(name, kind, chips)


def gpu_label(name: str) -> str:
    """The label of GKE's node pools for a kind of GPU. Raises UserError for a kind that is not known."""
    if name not in GPUS:
        raise UserError(
            f"--accelerator {name}: neither a TPU slice ({', '.join(f'{kind}-CHIPS' for kind in TPUS)}) nor a GPU "
            f"({', '.join(GPUS)})"
        )
    return GPUS[name]
