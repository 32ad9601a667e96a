#!/bin/bash
# rank.sh COMMAND...: one rank of a job, started by srun. Tells torch.distributed what Slurm knows, and writes the
# command's exit status down.
source "$CLKD_HOME/slurm/common.sh"
export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
export TMPDIR="$TMPDIR/rank-$RANK"
mkdir -p "$TMPDIR"
# Operators that are compiled already, on the node's own disk; a copy appears whole or not at all. OPERATORS is where this
# environment keeps them, in a folder with a name of its own.
export TORCH_EXTENSIONS_DIR="$local_disk/operators/${OPERATORS##*/}"
ops="${CLKD_OPS:-$OPERATORS}"
if [[ ! -d $TORCH_EXTENSIONS_DIR && -d $ops ]]; then
  mkdir -p "$local_disk/operators"
  # Modification times stay, or they would be compiled again.
  if cp -r --preserve=timestamps "$ops" "$TMPDIR/ops"; then
    mv -T "$TMPDIR/ops" "$TORCH_EXTENSIONS_DIR" 2>/dev/null || true
  fi
fi
trap : USR1 TERM # the command has them too, and this script waits for it
status=0
inside "$@" || status=$?
echo "$status" >"$RUN_LOGS/rank-$RANK.status" || true
rm -rf "$TMPDIR"
exit "$status"
