#!/usr/bin/env bash
# Repeats a run from what it left, in a folder of its own, and compares the two bit for bit.
#
#   bash launch/repro.sh RUN [AGAIN] [--dry-run]
#
# RUN    the working directory of a finished run; config.json has its settings and seed, and
#        requirements.lock the packages
# AGAIN  of the repeated one (default: RUN-again); an interrupted repetition goes on
#
# Where .venv has other packages than RUN had, an environment of those is made, .venv-lock-DIGEST.
# Set PYTHON to use an environment of your own, whatever it has. Status 0: equal; 1: not. Data files
# and models are read from where the run read them, and the code is what stands here: check out
# the git_revision of config.json first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/venv.sh
source launch/venv.sh

folders=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY_RUN=1 ;;
    -h | --help) usage "$0" && exit ;;
    -*) die "unknown argument '$argument'; wanted RUN, AGAIN or --dry-run" ;;
    *) folders+=("$argument") ;;
  esac
done
((${#folders[@]} == 1 || ${#folders[@]} == 2)) || die "wanted RUN, and perhaps AGAIN; see --help"
lock="${folders[0]%/}/requirements.lock"
[[ -f "${folders[0]%/}/config.json" ]] || die "no run in ${folders[0]} (no config.json)"
[[ -f "$lock" ]] || die "${folders[0]} has no requirements.lock: an older version made it; compare" \
  "within the present environment: python -m grpo_jax.repro ${folders[*]}"

was="$(sed -n 's/^ *"git_revision": "\(.*\)".*/\1/p' "${folders[0]%/}/config.json")"
now="$(git describe --always --dirty --abbrev=40 2>/dev/null || true)"
[[ "$was" == "$now" ]] || echo "note: the code was ${was:-in no commit}, and is ${now:-in no commit}" >&2

# has_lock PYTHON: whether its packages are those of the lock.
has_lock() {
  [[ -x "$1" ]] && diff -q <(grep -v '^#' "$lock") <("$1" -c \
    'from grpo_jax.infra.provenance import requirements; print(requirements(), end="")' |
    grep -v '^#') >/dev/null
}

python="${PYTHON:-$PWD/.venv/bin/python}"
if [[ -z "${PYTHON:-}" ]] && ! has_lock "$python"; then
  digest="$(grep -v '^#' "$lock" | sha256sum)"
  folder=".venv-lock-${digest:0:12}"
  python="$PWD/$folder/bin/python"
  if ! has_lock "$python"; then
    # The minor version decides which packages there are.
    version="$(sed -n 's/^# Python \([0-9]*\.[0-9]*\).*/\1/p' "$lock")"
    base="$(PYTHON="$(command -v "python$version" || true)" find_python)"
    run "$base" -m venv --clear "$folder"
    run "$python" -m pip install --quiet --requirement "$lock"
    run "$python" -m pip install --quiet --no-deps --editable .
  fi
fi
run "$python" -m grpo_jax.repro "${folders[@]}"
