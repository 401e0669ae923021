#!/usr/bin/env bash
# The whole main job on this machine, from nothing: installs, builds corpora and a small base model, continues its
# pretraining on megatron-core, exports it, and compares the export with transformers.
# Usage: launch/quickstart.sh [DIR]     (DIR: runs/quickstart)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n '2,4s/^# //p' "$0"
  exit 0
fi
bash "$root/launch/install.sh"
exec "$root/.venv/bin/python" "$root/tools/quickstart.py" "${1:-$root/runs/quickstart}"
