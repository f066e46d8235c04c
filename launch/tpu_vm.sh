#!/usr/bin/env bash
# A run on a Cloud TPU VM, of one host or a pod: created or reused, installed, run and followed.
#
#   bash launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-16 [--project=PROJECT] [--spot] \
#     [--version=v2-alpha-tpuv5-lite] [--nfs=HOST:/SHARE] [--attempts=20] [--delete] [--dry-run] \
#     --config=configs/om_en.py --workdir=/mnt/grpo_jax/om_en [--config.FIELD=VALUE ...]
#   bash launch/tpu_vm.sh --name=NAME --zone=ZONE [--project=PROJECT] --teardown
#
# Shows worker 0's log. A TPU VM that is preempted is made anew, and the run resumes from its
# workdir, up to --attempts times; started again, this script follows the run that is there. The
# workdir must outlive the VM and be the same for all hosts: --nfs mounts such a disk (Filestore,
# for example) at /mnt/grpo_jax. --spot asks for cheaper, preemptible capacity. --delete removes
# the VM after the run, --teardown at once: only a VM that this script has created, which it knows
# by a label, is ever deleted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

LABEL="created-by=grpo-jax-launch"
name="" zone="" type="" project="" version=v2-alpha-tpuv5-lite nfs="" attempts=20
spot="" delete="" teardown="" program=()
for argument in "$@"; do
  value="${argument#*=}"
  case "$argument" in
    --name=*) name="$value" ;;
    --zone=*) zone="$value" ;;
    --type=*) type="$value" ;;
    --project=*) project="$value" ;;
    --version=*) version="$value" ;;
    --nfs=*) nfs="$value" && matches nfs "$nfs" '[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]+' "HOST:/SHARE" ;;
    --attempts=*) attempts="$value" ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --teardown) teardown=1 ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) usage "$0" && exit ;;
    *) program+=("$argument") ;;
  esac
done
matches name "$name" '[a-z]([-a-z0-9]{0,60}[a-z0-9])?' "a name of small letters, digits and -"
matches zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-west4-a"
[[ -z "$project" ]] || matches project "$project" '[a-z0-9.:-]+' "a project's id"
whole attempts "$attempts"
if [[ -z "$teardown" ]]; then
  matches type "$type" '[a-z0-9]+-[0-9]+' "a kind and a size such as v5litepod-16"
  matches version "$version" '[a-z0-9.-]+' "a runtime version such as v2-alpha-tpuv5-lite"
  check_program "${program[@]}"
fi
need gcloud "install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install"
place=(--zone="$zone" ${project:+--project="$project"})
tpu=(gcloud compute tpus tpu-vm)

# describe FORMAT: the VM's field; empty if there is no such VM. Any other trouble is the end.
describe() {
  local answer errors
  [[ -z "$DRY_RUN" ]] || return 0
  errors="$(mktemp)"
  if answer="$("${tpu[@]}" describe "$name" "${place[@]}" --format="value($1)" 2>"$errors")"; then
    rm -f "$errors"
    printf '%s\n' "$answer"
  elif grep -qiE 'NOT_FOUND|not found' "$errors"; then
    rm -f "$errors"
  else
    cat "$errors" >&2
    rm -f "$errors"
    die "cannot ask for the TPU VM $name in $zone; gcloud's words are above"
  fi
}

# Below, errors are looked at one by one: bash's -e means nothing in a function whose status is.

# remove: deletes the VM, if this script has created it.
remove() {
  local label
  label="$(describe 'labels.created-by')" || exit 2
  [[ -n "$DRY_RUN" || "created-by=$label" == "$LABEL" ]] ||
    die "$name was not created by this script and is left alone; delete it yourself if you mean to"
  run "${tpu[@]}" delete "$name" "${place[@]}" --quiet || die "$name could not be deleted; see above"
}

# get_ready: a VM that is there and usable, reused or created; fails if none can be created.
get_ready() {
  local state
  while true; do
    state="$(describe state)" || exit 2
    case "$state" in
      READY) return ;;
      "")
        run "${tpu[@]}" create "$name" "${place[@]}" --accelerator-type="$type" \
          --version="$version" --labels="$LABEL" ${spot:+--spot}
        return
        ;;
      PREEMPTED | TERMINATED | STOPPED | UNHEALTHY*)
        echo "== $name is $state" >&2
        remove
        ;;
      *)
        echo "== $name is $state; waiting" >&2
        sleep "${POLL_SECONDS:-20}"
        ;;
    esac
  done
}

# remote WORKER COMMAND: a shell command on one worker, or on 'all'.
remote() {
  run "${tpu[@]}" ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

# install: this folder and its environment on every worker, and the shared disk.
install() {
  local archive status=0
  archive="$(mktemp -d)" || return
  run tar -czf "$archive/grpo_jax.tgz" --exclude='./.*' --exclude=./runs --exclude=__pycache__ . &&
    run "${tpu[@]}" scp "$archive/grpo_jax.tgz" "$name:" "${place[@]}" --worker=all || status=1
  rm -rf "$archive"
  [[ "$status" == 0 ]] || return # or what an earlier call has left there would be run
  if [[ -n "$nfs" ]]; then
    remote all "mountpoint -q /mnt/grpo_jax || { sudo apt-get install -qy nfs-common && \
sudo mkdir -p /mnt/grpo_jax && sudo mount -t nfs $nfs /mnt/grpo_jax && \
sudo chmod 1777 /mnt/grpo_jax; }" || return
  fi
  remote all "mkdir -p grpo_jax && tar -xzf grpo_jax.tgz -C grpo_jax && cd grpo_jax && \
source launch/venv.sh && { find_python >/dev/null 2>&1 || { sudo apt-get update -q && \
sudo apt-get install -qy python3.11-venv; }; } && make_venv .venv tpu"
}

# start: the program on every worker, detached, so that a lost connection does not end it. What
# runs already is left alone. Its log is run.log, its exit status run.status.
start() {
  local command
  command="$(printf '%q ' .venv/bin/python -m grpo_jax.main "${program[@]}")"
  command="$(printf '%q' "$command; echo \$? >run.status")"
  remote all "cd grpo_jax && if [ -s run.pid ] && kill -0 \"\$(cat run.pid)\" 2>/dev/null; then \
echo 'runs already'; else rm -f run.status; setsid nohup bash -c $command >run.log 2>&1 </dev/null \
& echo \$! >run.pid; fi"
}

# running: whether a run of an earlier call is on worker 0.
running() {
  [[ -z "$DRY_RUN" ]] && "${tpu[@]}" ssh "$name" "${place[@]}" --worker=0 \
    --command="kill -0 \"\$(cat grpo_jax/run.pid)\"" >/dev/null 2>&1
}

# was_told_to_end: whether the program on worker 0 has ended for SIGTERM, as before a preemption.
was_told_to_end() {
  [[ "$("${tpu[@]}" ssh "$name" "${place[@]}" --worker=0 \
    --command="cat grpo_jax/run.status" 2>/dev/null)" == 143 ]]
}

# follow: worker 0's log until its program ends; the status of the worst worker.
follow() {
  remote 0 "cd grpo_jax && tail -n +1 -F --pid=\"\$(cat run.pid)\" run.log" || return 255
  remote all "cd grpo_jax && for i in \$(seq 60); do [ -s run.status ] && break; sleep 1; done; \
exit \"\$(cat run.status)\"" || return 1
}

if [[ -n "$teardown" ]]; then
  [[ -n "$DRY_RUN" || -n "$(describe state)" ]] || die "there is no TPU VM $name in $zone"
  remove
  exit
fi

status=1
for ((attempt = 1; attempt <= attempts; attempt++)); do
  echo "== attempt $attempt of $attempts: $name in $zone" >&2
  if ! get_ready; then
    ((attempt > 1)) || die "$name could not be created; see above"
    echo "== $name could not be created anew" >&2 # there may be no capacity just behind a preemption
    sleep "${POLL_SECONDS:-20}"
    continue
  fi
  if ! running; then
    if ! { install && start; }; then
      [[ "$(describe state)" == READY ]] && die "$name could not be set up; see above"
      continue
    fi
  fi
  if follow; then
    status=0
    break
  fi
  if [[ "$(describe state)" == READY ]] && ! running && ! was_told_to_end; then
    echo "error: the program has failed on $name; see the log above" >&2
    break
  fi
  echo "== lost $name, or the connection to it" >&2
done
[[ "$status" == 0 ]] || ((attempt <= attempts)) || echo "error: gave up after $attempts attempts" >&2
[[ -z "$delete" ]] || remove
exit "$status"
