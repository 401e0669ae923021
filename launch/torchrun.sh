#!/usr/bin/env bash
# One machine or several: starts as many processes as the configuration's layout needs, or NPROC of them on each machine,
# and returns the trainer's own exit code (torchrun itself answers 1 whatever a worker returns).
# Usage: launch/torchrun.sh CONFIG [section.key=value ...] [--accept OPTION ...]
# Several machines: the same command on each, with NNODES, RDZV_ENDPOINT=host:port (and RDZV_ID) set.
# LOG_DIR: a folder that gets each process' output, by machine and process, beside the terminal.
set -uo pipefail
if [ $# -lt 1 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  sed -n '2,6s/^# //p' "$0"
  [ $# -ge 1 ] && exit 0
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
[ -z "${SLURM_JOB_ID:-}" ] || python=${PYTHON:-$python} # elsewhere PYTHON is what install.sh makes .venv of
config=$1
shift

# Validates the configuration in one short process, so that a wrong key is one line and not one a worker.
plan=$("$python" -m cpt_mega.train --config "$config" --print-launch "$@") || exit $?
needs=${plan%% *} run_dir=${plan#* }
nproc=${NPROC:-}
if [ -z "$nproc" ]; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
  nproc=$((gpus > needs ? gpus : needs))
fi
if [ "${NNODES:-1}" -gt 1 ]; then
  where=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT:?set RDZV_ENDPOINT=host:port of one machine}"
    --rdzv-id "${RDZV_ID:-cpt_mega}")
  # A machine's name may resolve to nothing, or to itself alone: by it torchrun tells whose endpoint it is, and where it is reached.
  if [ -n "${SLURM_NODEID:-}" ]; then
    own=$(tr , '\n' <<<"${MACHINES:-}" | sed -n "s/^$SLURMD_NODENAME=//p")
    where+=(--rdzv-conf "is_host=$([ "$SLURM_NODEID" = 0 ] && echo 1 || echo 0)" ${own:+--local-addr "$own"})
  fi
else
  where=(--standalone)
fi
if [ -n "${LOG_DIR:-}" ]; then
  LOG_DIR=$LOG_DIR/${SLURMD_NODENAME:-$(hostname -s)}
  mkdir -p "$LOG_DIR"
  where+=(--log-dir "$LOG_DIR" --tee 3)
fi
# On CPU each process computes with its share of the cores; torchrun would give it one and say so at length.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  cores=$(nproc)
  export OMP_NUM_THREADS=$((cores / nproc > 0 ? cores / nproc : 1))
fi
# Slurm signals every process of a step, or this one alone: the trainer is asked by STOP, and torchrun must not kill it 30 s later.
[ -z "${SLURM_JOB_ID:-}" ] || where+=(--signals-to-handle SIGINT,SIGHUP,SIGQUIT)
asked() {
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    kill -TERM "$child" 2>/dev/null
    return
  fi
  [ -z "${LOG_DIR:-}" ] || touch "$LOG_DIR/asked"
  [ -e "$run_dir/STOP" ] || echo "$SLURM_JOB_ID" >"$run_dir/STOP"
}
# A worker that ends otherwise than with 0 has said why; torchrun's own traceback would bury it.
run='import os, signal, sys
if os.environ.get("SLURM_JOB_ID"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main(sys.argv[1:])
except (ChildFailedError, SignalException):
    sys.exit(1)'
# torchrun answers 1 whatever a worker returns, so the workers leave their own code here.
export CPT_MEGA_EXIT_CODE_FILE=$(mktemp)
trap 'rm -f "$CPT_MEGA_EXIT_CODE_FILE"' EXIT
# The terminal's Ctrl-C reaches torchrun and the trainer by itself; this shell only has to outlive them.
trap : INT
trap asked TERM
"$python" -c "$run" "${where[@]}" --nproc-per-node "$nproc" -m cpt_mega.train --config "$config" "$@" &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do
  wait "$child"
  code=$?
done
[ "$code" = 0 ] && exit 0
own=$(head -n 1 "$CPT_MEGA_EXIT_CODE_FILE")
[ -z "${LOG_DIR:-}" ] || echo "${own:-70}" >"$LOG_DIR/exit_code"
if [ "${own:-70}" = 2 ]; then
  echo "ended with exit code 2: the error above says what to mend" >&2
else
  echo "ended with exit code ${own:-70}; see $run_dir/status.json" >&2
fi
exit "${own:-70}" # no code: the trainer was killed before it could say anything
