"""A job for Cloud TPU: one script that makes a slice (a queued resource), or several, and keeps a run going on it."""

import shlex

from adaptive.errors import UserError
from adaptive.launch.job import FINAL, SAVED, Job, Rendered, require_workdir
from adaptive.paths import local_path
from adaptive.shipped import folder

READS = frozenset(
    {
        "name",
        "module",
        "accelerator",
        "slices",
        "folder",
        "restarts",
        "env",
        "spot",
        "zone",
        "project",
        "network",
        "runtime",
        "service_account",
    }
)


def render(job: Job) -> Rendered:
    """A script with the commands up, keep, status, logs, stop and down. Raises UserError for what is no slice of Cloud
    TPU, a job without a zone, or code that is no checkout of this repository."""
    require_workdir(job)
    tpu = job.tpu()
    if tpu is None:
        raise UserError(f"--accelerator {job.accelerator or '(none)'}: expected a slice, such as v5e-64")
    if not job.zone:
        raise UserError("--zone: in which zone of Google Cloud, such as us-east5-a?")
    code = local_path(job.folder, "--folder").absolute() if job.folder else folder("recipes").parent
    if not (code / "scripts" / "train").is_file():
        raise UserError(f"--folder {code}: no checkout of this repository, and the machines get a copy of one")
    place = [f"--zone={job.zone}", *([f"--project={job.project}"] if job.project else [])]
    nodes = [job.name] if job.slices == 1 else [f"{job.name}-{i}" for i in range(job.slices)]
    of_nodes = (
        ["--node-id", job.name] if job.slices == 1 else ["--node-count", str(job.slices), "--node-prefix", job.name]
    )
    create = [
        *of_nodes,
        f"--accelerator-type={tpu.cloud_type}",
        f"--runtime-version={job.runtime or tpu.kind.runtime}",
        *([f"--network={job.network}"] if job.network else []),
        *([f"--service-account={job.service_account}"] if job.service_account else []),
        *(["--spot"] if job.spot else []),
    ]
    file = f"{job.name}.sh"
    text = _SCRIPT
    for word, value in {
        "@ABOUT@": f"{job.slices} x {tpu.name} ({tpu.shape})",
        "@FILE@": file,
        "@NAME@": job.name,
        "@PLACE@": shlex.join(place),
        "@NODES@": shlex.join(nodes),
        "@CREATE@": shlex.join(create),
        "@CODE@": shlex.quote(str(code)),
        "@WORKER@": _worker(job),
    }.items():
        text = text.replace(word, value)
    return Rendered(file, text, (("bash", "FILE", "up"),))


def _worker(job: Job) -> str:
    """What runs on every machine: the command, again after what a restart mends."""
    variables = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.variables().items())
    if job.module == "adaptive.train":
        command = shlex.join(["./scripts/train", *job.arguments])
    else:
        command = f"./scripts/train --list_recipes >/dev/null && {job.command()}"
    text = _WORKER
    for word, value in {
        "@NAME@": job.name,
        "@VARIABLES@": variables.rstrip("\n"),
        "@COMMAND@": command,
        "@SAVED@": str(SAVED),
        "@FINAL@": " | ".join(map(str, FINAL)),
        "@RESTARTS@": str(job.restarts),
    }.items():
        text = text.replace(word, value)
    return text.strip("\n")


_SCRIPT = r"""#!/usr/bin/env bash
# @ABOUT@. Written by `adaptive launch tpu`.
#
#   bash @FILE@ up       make the slice unless it is there, wait for it, copy the code, start the run; may be repeated
#   bash @FILE@ keep     the same, and anew whenever the slice was taken away, until the run has ended
#   bash @FILE@ status   what the slice and every worker are doing
#   bash @FILE@ logs     the output of worker 0 of the first slice, as it comes
#   bash @FILE@ stop     ask the run to save and end; the slice stays
#   bash @FILE@ down     delete the slice, and what is on its disks
#
# The run goes on when this script ends. POLL_S is how often, in seconds, the state is looked at (default 30).
set -euo pipefail

name=@NAME@
place=(@PLACE@)
nodes=(@NODES@)
code=@CODE@

queued() { # queued VERB [options]: a command on the queued resource
    local verb=$1
    shift
    gcloud compute tpus queued-resources "$verb" "$name" "${place[@]}" "$@"
}

state() { # empty where there is none
    local all
    all=$(gcloud compute tpus queued-resources list "${place[@]}" --format="value(name.basename(),state.state)")
    awk -v name="$name" '$1 == name { print $2 }' <<<"$all"
}

on() { # on NODE WORKER COMMAND: runs it there; WORKER may be all
    gcloud compute tpus tpu-vm ssh "$1" "${place[@]}" --worker="$2" --command="$3" </dev/null
}

everywhere() {
    local node
    for node in "${nodes[@]}"; do on "$node" all "$1"; done
}

make() {
    local found
    while true; do
        found=$(state)
        case "$found" in
        ACTIVE) return ;;
        "")
            echo "making $name"
            queued create @CREATE@
            ;;
        SUSPENDED | FAILED)
            echo "$name is $found; deleting it, to make it anew"
            queued delete --quiet --force
            ;;
        *) echo "$name is $found" ;;
        esac
        sleep "${POLL_S:-30}"
    done
}

copy() { # what git tracks, and files that it does not ignore, changed or not
    local archive node
    archive=$(mktemp -d)
    git -C "$code" ls-files -z --cached --others --exclude-standard |
        tar -C "$code" --null --files-from=- --ignore-failed-read -czf "$archive/$name.tar.gz"
    worker >"$archive/$name.run.sh"
    for node in "${nodes[@]}"; do
        gcloud compute tpus tpu-vm scp "$archive/$name.tar.gz" "$archive/$name.run.sh" "$node:" \
            "${place[@]}" --worker=all
    done
    rm -r "$archive"
}

up() {
    make
    if everywhere "kill -0 \$(cat $name.pid)" >/dev/null 2>&1; then
        echo "$name runs already"
        return
    fi
    copy
    everywhere "mkdir -p $name && tar -xzf $name.tar.gz -C $name && bash $name.run.sh"
}

ended() { # the exit code of the run, once its first worker has one
    on "${nodes[0]}" 0 "cat $name.code 2>/dev/null || true"
}

keep() {
    local found
    while true; do
        up
        while [ "$(state)" = ACTIVE ]; do
            found=$(ended) || found=
            if [ -n "$found" ]; then
                echo "$name ended with $found"
                exit "$found"
            fi
            sleep "${POLL_S:-30}"
        done
        echo "$name was taken away"
    done
}

worker() { # what runs on every worker
    cat <<'WORKER'
@WORKER@
WORKER
}

case "${1:-}" in
up) up ;;
keep) keep ;;
status)
    echo "$name is $(state)"
    everywhere "echo \$(hostname): \$(cat $name.code 2>/dev/null || echo running); tail -n 1 $name.log"
    ;;
logs) on "${nodes[0]}" 0 "tail -n 100 -F $name.log" ;;
stop) everywhere "touch $name.stop; kill -TERM \$(cat $name.pid)" ;;
down) queued delete --quiet --force ;;
*)
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
"""

_WORKER = r"""
#!/usr/bin/env bash
# One worker of @NAME@: detaches itself from who started it, and runs the command until it ends for good.
set -u
cd "$HOME" || exit 1
if [ "${1:-}" != detached ]; then
    if [ -f @NAME@.pid ] && kill -0 "$(cat @NAME@.pid)" 2>/dev/null; then
        echo "$(hostname): runs already"
        exit 0
    fi
    rm -f @NAME@.stop @NAME@.code
    setsid nohup bash "$0" detached >>@NAME@.log 2>&1 </dev/null &
    echo $! >@NAME@.pid
    echo "$(hostname): started; its output is in @NAME@.log"
    exit 0
fi
echo $$ >@NAME@.pid
cd @NAME@ || exit 1
export ADAPTIVE_CLUSTER=tpu ADAPTIVE_PLATFORM=tpu
@VARIABLES@
child=
asked=
trap 'asked=1; [ -z "$child" ] || kill -TERM "$child"' TERM
restarts=0
while true; do
    @COMMAND@ &
    child=$!
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ended the waiting
        wait "$child"
        code=$?
    done
    echo "$(date): ended with $code, after $restarts of @RESTARTS@ restarts"
    [ -z "$asked" ] && [ ! -e "$HOME/@NAME@.stop" ] || break
    case "$code" in
    0 | @FINAL@) break ;;
    @SAVED@) ;; # the machine was to be maintained
    *)
        [ "$restarts" -lt @RESTARTS@ ] || break
        restarts=$((restarts + 1))
        ;;
    esac
    sleep "${RESTART_S:-5}"
done
echo "$code" >"$HOME/@NAME@.code"
rm -f "$HOME/@NAME@.pid"
"""
