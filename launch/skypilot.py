"""A job for SkyPilot, which finds machines in any cloud and brings them back when they are taken away."""

from typing import Any

import yaml

from adaptive.errors import UserError
from adaptive.launch.accelerators import TPUS
from adaptive.launch.job import HUNG, SAVED, Job, Rendered, require_workdir
from adaptive.parallel.cluster import LOST

READS = frozenset(
    {"name", "module", "nodes", "gpus_per_node", "accelerator", "image", "folder", "restarts", "env", "spot", "python"}
)
PORT = 7733
_NAMES = {"a100": "A100", "a100-80gb": "A100-80GB", "h100": "H100", "h200": "H200", "b200": "B200", "l4": "L4"}


def render(job: Job) -> Rendered:
    """A task of SkyPilot. Raises UserError for an accelerator that it does not know, or a job without a workdir that
    outlives its machines."""
    require_workdir(job, ())
    resources: dict[str, Any] = {"use_spot": job.spot}
    tpu = job.tpu()
    platform = "tpu" if tpu else "gpu"
    if tpu:
        if job.nodes > 1:
            raise UserError(f"--nodes: {tpu.name} has {tpu.hosts} machine(s) by itself")
        resources["accelerators"] = f"tpu-{tpu.cloud_type}"
        resources["accelerator_args"] = {"runtime_version": tpu.kind.runtime, "tpu_vm": True}
    elif job.accelerator in _NAMES:
        resources["accelerators"] = f"{_NAMES[job.accelerator]}:{job.gpus_per_node}"
    else:
        raise UserError(
            f"--accelerator {job.accelerator or '(none)'}: SkyPilot is asked for one of {', '.join(_NAMES)}, or for a "
            f"TPU slice ({', '.join(f'{kind}-CHIPS' for kind, tpu in TPUS.items() if tpu.gcloud)})"
        )
    if job.image:
        resources["image_id"] = f"docker:{job.image}"
    # A process that ends because another was lost, or that hangs, is no mistake of the job: all start again.
    recovery = {"max_restarts_on_errors": job.restarts, "recover_on_exit_codes": [SAVED, LOST, HUNG]}
    resources["job_recovery"] = recovery
    task = {
        "name": job.name,
        "resources": resources,
        "num_nodes": 1 if tpu else job.nodes,
        "workdir": job.folder or ".",
        "envs": {"ADAPTIVE_PLATFORM": platform, **job.variables()},
        "setup": "./scripts/train --list_recipes >/dev/null  # makes .venv\n",
        "run": _tpu_run(job) if tpu else _gpu_run(job),
    }
    file = f"{job.name}.sky.yaml"
    head = f"# Written by `adaptive launch skypilot`; start it: sky jobs launch {file}\n"
    text = head + yaml.dump(task, Dumper=_Blocks, sort_keys=False, width=110)
    return Rendered(file, text, (("sky", "jobs", "launch", "--yes", "FILE"),))


def _gpu_run(job: Job) -> str:
    return "\n".join(
        [
            'first=$(printf "%s\\n" "$SKYPILOT_NODE_IPS" | head -n 1)',
            f'export ADAPTIVE_COORDINATOR="$first:{PORT}"',
            'export ADAPTIVE_PROCESSES="$SKYPILOT_NUM_NODES"',
            'export ADAPTIVE_PROCESS="$SKYPILOT_NODE_RANK"',
            f"exec {job.command()}",
            "",
        ]
    )


def _tpu_run(job: Job) -> str:
    return f"export ADAPTIVE_CLUSTER=tpu\nexec {job.command()}\n"


class _Blocks(yaml.SafeDumper):
    """Writes text of several lines as it stands."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _text)
