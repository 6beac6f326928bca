"""A job for SLURM: processes that find each other by what srun sets, and come back after a stop."""

import shlex

from adaptive.errors import UserError
from adaptive.launch.job import FINAL, SAVED, Job, Rendered, require_workdir

READS = frozenset(
    {
        "name",
        "module",
        "nodes",
        "gpus_per_node",
        "process_per",
        "folder",
        "python",
        "hours",
        "grace_s",
        "restarts",
        "env",
        "sbatch",
    }
)


def render(job: Job) -> Rendered:
    """A script for sbatch. Raises UserError as `job` allows it no restart, or an extra line is none."""
    require_workdir(job)
    per_node = job.gpus_per_node if job.process_per == "gpu" else 1
    file = f"{job.name}.sbatch"
    where = shlex.quote(job.folder) if job.folder else '"$SLURM_SUBMIT_DIR"'
    own = []
    for text in job.sbatch:
        if not text.strip("-") or "\n" in text:
            raise UserError(f"--sbatch {text}: expected NAME=VALUE, as in partition=h200")
        own.append(f"#SBATCH --{text.lstrip('-')}")
    lines = [
        "#!/bin/bash",
        f"# {job.nodes} node(s) of {job.gpus_per_node} GPUs, a process for each {job.process_per}."
        f" Written by `adaptive launch slurm`; start it: sbatch {file}",
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --nodes={job.nodes}",
        f"#SBATCH --ntasks-per-node={per_node}",
        f"#SBATCH --gpus-per-node={job.gpus_per_node}",
        "#SBATCH --exclusive",
        f"#SBATCH --time={_time(job.hours or 24)}",
        f"#SBATCH --signal=TERM@{job.grace_s}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={job.name}-%j.txt",
        *own,
        "",
        f"cd {where} || exit 2",
        *[f"export {name}={shlex.quote(value)}" for name, value in job.variables().items()],
        "",
        f"# TERM comes {job.grace_s} s before the time is up, or when the nodes are wanted for others: the run saves",
        f"# and ends with {SAVED}. Who is left waits no longer than srun's --wait for a process that does not end.",
        f"srun --kill-on-bad-exit=0 --wait=600 {job.command()}",
        "code=$?",
        "restarts=${SLURM_RESTART_COUNT:-0}",
        'case "$code" in',
        "0) ;;",
        f'{SAVED}) echo "saved when it was asked to stop; back into the queue" && scontrol requeue "$SLURM_JOB_ID" ;;',
        f'{"|".join(map(str, FINAL))}) echo "ended with $code, which a restart does not mend" ;;',
        "*)",
        f'    if [ "$restarts" -lt {job.restarts} ]; then',
        f'        echo "ended with $code; back into the queue, after $restarts of {job.restarts} restarts"',
        '        scontrol requeue "$SLURM_JOB_ID"',
        "    fi",
        "    ;;",
        "esac",
        'exit "$code"',
    ]
    return Rendered(file, "\n".join(lines) + "\n", (("sbatch", "FILE"),))


def _time(hours: float) -> str:
    minutes = max(1, round(hours * 60))
    return f"{minutes // 60}:{minutes % 60:02}:00"
