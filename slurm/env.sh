# Sourced by every job script. A site overrides these from its own environment; nothing here needs editing.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"
export PATH="${CLKD_VENV:-$PWD/.venv}/bin:$PATH"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${TMPDIR:-/tmp}/torch_extensions}"
RECIPE="${1:?usage: sbatch slurm/STAGE.sbatch RECIPE.yaml [section.key=value ...]}"
shift
