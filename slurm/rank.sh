#!/bin/bash
# rank.sh COMMAND...: one rank of a job, started by srun. Tells torch.distributed what Slurm knows, and writes the
# command's exit status down.
source "$CLKD_HOME/slurm/common.sh"
export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
export TMPDIR="$TMPDIR/rank-$RANK"
mkdir -p "$TMPDIR"
if [[ ! -d $TORCH_EXTENSIONS_DIR ]]; then # operators that are compiled already; a copy appears whole or not at all
  ops="${CLKD_OPS:-$(ls -dt "$HOME"/.cache/torch_extensions/py* 2>/dev/null | head -n 1)}"
  # Modification times stay, or they would be compiled again.
  if [[ -d $ops ]] && cp -r --preserve=timestamps "$ops" "$TMPDIR/ops"; then
    rm -f "$TMPDIR"/ops/*/lock # of a process that was loading one right then: here nobody would take it away
    mv -T "$TMPDIR/ops" "$TORCH_EXTENSIONS_DIR" 2>/dev/null || true
  fi
fi
trap : USR1 TERM # the command has them too, and this script waits for it
status=0
inside "$@" || status=$?
echo "$status" >"$RUN_LOGS/rank-$RANK.status" || true
rm -rf "$TMPDIR"
exit "$status"
