#!/usr/bin/env bash
# The main job, end to end: teaches SmolLM2-135M to translate Oromo into English.
#
#   bash launch/quickstart.sh [--config.FIELD=VALUE ...]
#
# Makes a virtual environment (with CUDA where there is an NVIDIA GPU), fetches weights and text
# into the user cache (about 230 MB, once), trains, evaluates and writes runs/quickstart/report.html.
# An interrupted run goes on where it stopped when started again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh

extras=""
if gpus="$(nvidia-smi 2>/dev/null)"; then
  # The table's head names the newest CUDA that the driver can run.
  if [[ "$gpus" =~ CUDA\ Version:\ ([0-9]+) ]] && ((BASH_REMATCH[1] < 13)); then
    extras="cuda12"
  else
    extras="cuda"
  fi
fi
make_venv .venv "$extras"

python="$PWD/.venv/bin/python"
"$python" -m grpo_jax.assets smollm2-135m-instruct all-minilm-l6-v2 use-multilingual-judge \
  oromo-english wordnet-english
exec "$python" -m grpo_jax.main --config=configs/quickstart.py --workdir=runs/quickstart "$@"
