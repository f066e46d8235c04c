# shellcheck shell=bash
# Sourced by the other scripts: makes a virtual environment with this package in it.
export PIP_DISABLE_PIP_VERSION_CHECK=1

# find_python: prints a Python of at least 3.11; $PYTHON names one to use instead.
find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python >= 3.11 found (tried ${PYTHON:-python3}); install one, for example" \
    "'apt install python3', or name it: PYTHON=/path/to/python bash $0" >&2
  return 1
}

# make_venv FOLDER EXTRAS: installs this package, in place, with the extras (a comma-separated
# list, or ''). Nothing is done where that has been done for this Python and these requirements.
make_venv() {
  local folder="$1" extras="$2" python wanted
  python="$(find_python)"
  wanted="$("$python" -VV) [$extras] $(cat setup.cfg pyproject.toml | sha256sum)"
  if [[ -x "$folder/bin/python" && "$(cat "$folder/installed" 2>/dev/null)" == "$wanted" ]]; then
    return
  fi
  echo "== setting up $folder with $("$python" -V) (some minutes the first time)" >&2
  rm -f "$folder/installed"
  local clear=()
  "$folder/bin/python" -c '' 2>/dev/null || clear=(--clear) # nothing there, or half of it
  if ! "$python" -m venv "${clear[@]}" "$folder"; then
    echo "error: $python cannot make virtual environments; on Debian and Ubuntu:" \
      "apt install python3-venv" >&2
    return 1
  fi
  if ! "$folder/bin/python" -m pip install --quiet --editable ".${extras:+[$extras]}"; then
    echo "error: the package or one of its requirements could not be installed into $folder" \
      "(pip's own words are above); check the network and pip's index, then run this again" >&2
    return 1
  fi
  printf '%s\n' "$wanted" >"$folder/installed"
}
