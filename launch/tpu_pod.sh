#!/usr/bin/env bash
# The same command on every host of a Cloud TPU pod slice. A template: it has not been run on a pod of ours.
#
#   TPU=my-slice ZONE=us-east5-a launch/tpu_pod.sh --recipe mor_1_7b --workdir /mnt/shared/runs/one mesh.fsdp=32
#
# The repository must lie in ~/adaptive on every host, and the workdir on storage that all of them see.
set -euo pipefail
: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
command="cd ~/adaptive && ADAPTIVE_CLUSTER=tpu ADAPTIVE_PLATFORM=tpu ./scripts/train$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
