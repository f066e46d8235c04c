# shellcheck shell=bash
# Sourced by the launch scripts: what they print, check and run.

DRY_RUN="${DRY_RUN:-}"

# die TEXT...: one line, and the end.
die() {
  echo "error: $*" >&2
  exit 2
}

# show COMMAND...: prints the command, quoted for a shell.
show() {
  printf '+%s\n' "$(printf ' %q' "$@")" >&2
}

# run COMMAND...: shows the command, and runs it unless this is a dry run.
run() {
  show "$@"
  [[ -n "$DRY_RUN" ]] || "$@"
}

# need COMMAND WHAT_FOR: the command must be there; in a dry run it need not.
need() {
  [[ -n "$DRY_RUN" ]] || command -v "$1" >/dev/null || die "$1 not found; $2"
}

# whole NAME VALUE: the value must be a number of at least 1.
whole() {
  [[ "$2" =~ ^[1-9][0-9]{0,5}$ ]] || die "--$1: got '$2', wanted a whole number, at least 1"
}

# matches NAME VALUE PATTERN WANTED: the value must match the whole regular expression.
matches() {
  [[ "$2" =~ ^($3)$ ]] || die "--$1: got '$2', wanted $4"
}

# check_program ARGUMENTS...: --config=FILE, which must be there, and --workdir=FOLDER.
check_program() {
  local argument config="" workdir=""
  for argument in "$@"; do
    case "$argument" in
      --config=*) config="${argument#*=}" ;;
      --workdir=*) workdir="${argument#*=}" ;;
      --config.*=* | --config.* | --no*) ;;
      *) die "unknown argument '$argument'; wanted --config=FILE, --workdir=FOLDER or" \
        "--config.FIELD=VALUE (values with '=', not apart)" ;;
    esac
  done
  [[ -n "$config" ]] || die "--config=FILE is missing, for example --config=configs/tiny.py"
  [[ -f "$config" ]] || die "--config: no file $config"
  [[ -n "$workdir" ]] || die "--workdir=FOLDER is missing; the run is kept there, and resumed"
}

# usage: the comment at the head of the script, without its marks.
usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$1"
}
