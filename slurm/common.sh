# Sourced by every job script and by every rank. A site sets these in its own environment or in the file that CLKD_SETUP
# names; nothing in this folder needs editing.
#
#   CLKD_HOME        where slurm/ and ds_configs/ are: the checkout or the      [where sbatch was called]
#                    installed package, on storage that all nodes see
#   CLKD_VENV        the Python environment                                     [CLKD_HOME/.venv, else the one
#                                                                               that `clkd submit` ran in]
#   CLKD_SETUP       a shell file of the site, sourced first                    [none]
#   CLKD_MODULES     modules to load, as in "cuda/12.8 gcc/13"                  [none]
#   CLKD_INSIDE      put before every command of ours: a container, as in       [none]
#                    "apptainer exec --nv --bind /scratch image.sif"
#   CLKD_SRUN        more options of srun: a container with Enroot and Pyxis,   [none]
#                    as in "--container-image=image.sqsh --container-mounts=/scratch"
#   CLKD_LOCAL       disk of the node's own, for caches and temporary files     [TMPDIR or /tmp]
#   CLKD_OPS         compiled DeepSpeed operators to start from                 [those of this environment]
#   CLKD_INTERFACE   network interface of NCCL and gloo, as in ib0              [their own choice]
#   CLKD_COLLECTIVE_TIMEOUT_S   seconds that a rank waits for the others        [1800]
#   CLKD_MAX_CRASHES how often a job that crashes is queued again without       [3]
#                    a new checkpoint in between
set -euo pipefail
export CLKD_HOME="${CLKD_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
if [[ -n ${CLKD_SETUP:-} ]]; then source "$CLKD_SETUP"; fi
if [[ -n ${CLKD_MODULES:-} ]]; then
  if ! type module >/dev/null 2>&1; then
    for file in /etc/profile.d/{modules,lmod,z00_lmod}.sh; do if [[ -r $file ]]; then source "$file"; fi; done
  fi
  if ! type module >/dev/null 2>&1; then
    echo "error: $(hostname): CLKD_MODULES is '$CLKD_MODULES', but there is no \`module\` command. Define it in the file that" \
      "CLKD_SETUP names, or leave CLKD_MODULES empty." >&2
    exit 2
  fi
  module load $CLKD_MODULES
fi
# Relative paths in recipes count from where sbatch was called. Code is that of CLKD_HOME, or else installed: a folder
# that happens to be called `pipeline` there is not it.
export PYTHONSAFEPATH=1
if [[ -d $CLKD_HOME/pipeline && :${PYTHONPATH:-}: != *:"$CLKD_HOME":* ]]; then
  export PYTHONPATH="$CLKD_HOME${PYTHONPATH:+:$PYTHONPATH}"
fi
export CLKD_VENV="${CLKD_VENV:-$CLKD_HOME/.venv}"
export PATH="$CLKD_VENV/bin:$PATH"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
if [[ -n ${CLKD_INTERFACE:-} ]]; then export NCCL_SOCKET_IFNAME="$CLKD_INTERFACE" GLOO_SOCKET_IFNAME="$CLKD_INTERFACE"; fi

# What every rank would otherwise read and write on shared storage.
local_disk="${CLKD_LOCAL:-${TMPDIR:-/tmp}}/clkd-$(id -un)"
export HF_HOME="$local_disk/huggingface"
export TRITON_CACHE_DIR="$local_disk/triton" TORCHINDUCTOR_CACHE_DIR="$local_disk/inductor"
export TMPDIR="$local_disk/job-${SLURM_JOB_ID:-none}"

# inside COMMAND...: run a command of the project, in the container where there is one.
inside() {
  if [[ -z ${CLKD_INSIDE:-} && -z ${CLKD_SRUN:-} && ! -x $CLKD_VENV/bin/python ]]; then
    echo "error: $(hostname): there is no $CLKD_VENV/bin/python here. Set CLKD_VENV to an environment that every node sees" \
      "(\`make install\` makes CLKD_HOME/.venv), or CLKD_INSIDE to a container. Nothing was started." >&2
    return 2
  fi
  ${CLKD_INSIDE:-} "$@"
}
