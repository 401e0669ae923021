#!/usr/bin/env bash
# One machine or several: starts a process for each GPU (without any, what the layout needs), or NPROC on each machine,
# and returns the trainer's own exit code (torchrun itself answers 1 whatever a worker returns).
# Usage: launch/torchrun.sh CONFIG [section.key=value ...] [--accept OPTION ...]
# Several machines: the same command on each, with NNODES, RDZV_ENDPOINT=host:port (and RDZV_ID) set.
# LOG_DIR: a folder that gets each process' output, by machine and process, beside the terminal.
# MAX_RESTARTS: how often torchrun starts the processes again by itself when one was lost (default 0).
set -uo pipefail
if [ $# -lt 1 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  sed -n '2,7s/^# //p' "$0"
  [ $# -ge 1 ] && exit 0
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
[ -z "${SLURM_JOB_ID:-}" ] || python=${PYTHON:-$python} # elsewhere PYTHON is what install.sh makes .venv of
config=$1
shift

# SIGTERM and Ctrl-C ask the trainer for a checkpoint and its end. The terminal's Ctrl-C reaches cpt_mega.launch by itself, which
# counts it; SIGTERM may be this shell's alone. Slurm signals every process of a step, or this one alone: STOP is for all ranks.
asked='' child=''
ask() {
  asked=1
  [ -n "$child" ] || return 0
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    kill -TERM "$child" 2>/dev/null
    return
  fi
  [ -z "${LOG_DIR:-}" ] || touch "$LOG_DIR/asked"
  [ -e "$run_dir/STOP" ] || echo "$SLURM_JOB_ID" >"$run_dir/STOP"
}
trap ask INT TERM

# Validates the configuration in one short process, so that a wrong key is one line and not one a worker.
plan=$(trap '' INT TERM && exec "$python" -m cpt_mega.train --config "$config" --print-launch "$@") || exit $?
needs=${plan%% *} run_dir=${plan#* }
nproc=${NPROC:-}
if [ -z "$nproc" ]; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
  nodes=${NNODES:-1}
  nproc=$((gpus > 0 ? gpus : (needs + nodes - 1) / nodes))
  if [ $((nproc * nodes % needs)) != 0 ]; then
    echo "error: NPROC = $nproc: of $nodes machines that is no multiple of the $needs processes that tp x pp x cp needs;" \
      "set NPROC for each machine, or change parallel.*" >&2
    exit 2
  fi
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
# torchrun answers 1 whatever a worker returns, so the workers leave their own code here.
export CPT_MEGA_EXIT_CODE_FILE=$(mktemp)
trap 'rm -f "$CPT_MEGA_EXIT_CODE_FILE"' EXIT
if [ -n "$asked" ] && [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "ended with exit code 75 before the run began" >&2
  exit 75
fi
# torchrun keeps one store for all starts: processes that it starts again would find the addresses of those before.
[ "${MAX_RESTARTS:-0}" = 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
"$python" -m cpt_mega.launch "${where[@]}" --max-restarts "${MAX_RESTARTS:-0}" --nproc-per-node "$nproc" \
  -m cpt_mega.train --config "$config" "$@" &
child=$!
[ -z "$asked" ] || ask
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do
  wait "$child"
  code=$?
done
[ "$code" = 0 ] && exit 0
own=$(sort -s -k 1,1nr "$CPT_MEGA_EXIT_CODE_FILE" | head -n 1 | cut -d ' ' -f 2)
case $code in
  75) own=75 ;;                                      # by force, after a second Ctrl-C
  130 | 143) [ -z "$asked" ] || own=${own:-75} ;; # before it could listen, so before the run began
esac
[ -z "${LOG_DIR:-}" ] || echo "${own:-70}" >"$LOG_DIR/exit_code"
if [ "${own:-70}" = 2 ]; then
  echo "ended with exit code 2: the error above says what to mend" >&2
else
  echo "ended with exit code ${own:-70}; see $run_dir/status.json" >&2
fi
exit "${own:-70}" # no code: the trainer was killed before it could say anything
