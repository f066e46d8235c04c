#!/usr/bin/env bash
# Several processes on this machine, over virtual CPU devices: to try what a cluster would do.
#
#   bash launch/local_processes.sh [--processes=2] [--devices=4] [--dry-run] \
#     --config=configs/tiny.py --workdir=runs/two [--config.FIELD=VALUE ...]
#
# --processes  how many; --devices  virtual devices of each; --port  of process 0 (default: free).
# Each line is marked with its process. Where one fails all end. On Ctrl-C or SIGTERM they finish
# their step, save and end; the same command resumes.
# Set PYTHON to use an environment of your own instead of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/venv.sh
source launch/venv.sh

processes=2 devices=4 port="" program=()
for argument in "$@"; do
  case "$argument" in
    --processes=*) processes="${argument#*=}" ;;
    --devices=*) devices="${argument#*=}" ;;
    --port=*) port="${argument#*=}" ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) usage "$0" && exit ;;
    *) program+=("$argument") ;;
  esac
done
whole processes "$processes"
whole devices "$devices"
[[ -z "$port" ]] || whole port "$port"
check_program "${program[@]}"

python="${PYTHON:-$PWD/.venv/bin/python}"
[[ -n "${PYTHON:-}" ]] || run make_venv .venv ""
if [[ -z "$port" && -n "$DRY_RUN" ]]; then
  port=12345 # any will do for showing
elif [[ -z "$port" ]]; then
  port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
fi

children=()
# Whatever ends this script ends its processes too.
trap '((${#children[@]} == 0)) || kill -KILL "${children[@]}" 2>/dev/null || true' EXIT
trap '((${#children[@]})) || exit 130; kill -TERM "${children[@]}" 2>/dev/null || true' INT TERM

flags="--xla_force_host_platform_device_count=$devices ${XLA_FLAGS:-}"
for ((rank = 0; rank < processes; rank++)); do
  command=(env JAX_PLATFORMS=cpu XLA_FLAGS="$flags" JAX_COORDINATOR_ADDRESS="localhost:$port"
    JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$rank"
    "$python" -m grpo_jax.main "${program[@]}")
  show "${command[@]}"
  [[ -z "$DRY_RUN" ]] || continue
  "${command[@]}" > >(sed -u "s/^/[$rank] /") 2>&1 & # $! is the program, not sed
  children+=("$!")
done
status=0
for child in "${children[@]}"; do
  ended=0
  wait "$child" || ended="$?"
  while kill -0 "$child" 2>/dev/null; do # a signal has only ended the waiting
    ended=0
    wait "$child" || ended="$?"
  done
  [[ "$ended" == 0 ]] || status="$ended"
done
children=()
exit "$status"
