#!/usr/bin/env bash
# A run on the NVIDIA GPUs of this host: one process that drives all of them.
#
#   bash launch/gpu.sh [--gpus=0,1] [--deterministic] [--dry-run] \
#     --config=configs/om_en.py --workdir=runs/om_en [--config.FIELD=VALUE ...]
#
# --gpus  their numbers in nvidia-smi (default: all). Makes .venv with jax for the driver's CUDA.
# --deterministic  kernels that give equal runs equal bits, as a CPU's do; slower.
# An interrupted run goes on where it stopped when started again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/venv.sh
source launch/venv.sh

gpus="" deterministic="" program=()
for argument in "$@"; do
  case "$argument" in
    --gpus=*) gpus="${argument#*=}" && matches gpus "$gpus" '[0-9]+(,[0-9]+)*' "numbers, as in 0,1" ;;
    --deterministic) deterministic="--xla_gpu_deterministic_ops=true" ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) usage "$0" && exit ;;
    *) program+=("$argument") ;;
  esac
done
check_program "${program[@]}"
need nvidia-smi "install NVIDIA's driver, or use a machine that has a GPU"

extras=cuda
if [[ "$(nvidia-smi 2>/dev/null || true)" =~ CUDA\ Version:\ ([0-9]+) ]]; then
  ((BASH_REMATCH[1] >= 13)) || extras=cuda12
elif [[ -z "$DRY_RUN" ]]; then
  die "nvidia-smi shows no GPU and driver; see what 'nvidia-smi' says"
fi
if [[ -n "$gpus" && -z "$DRY_RUN" ]]; then
  there="$(nvidia-smi --query-gpu=index --format=csv,noheader)"
  for gpu in ${gpus//,/ }; do
    grep -qx "$gpu" <<<"$there" || die "--gpus: there is no GPU $gpu here, only ${there//$'\n'/, }"
  done
fi

run make_venv .venv "$extras"
[[ -z "$gpus" ]] || run export CUDA_VISIBLE_DEVICES="$gpus"
[[ -z "$deterministic" ]] || run export XLA_FLAGS="$deterministic ${XLA_FLAGS:-}"
run exec "$PWD/.venv/bin/python" -m grpo_jax.main "${program[@]}"
