#!/usr/bin/env bash
# The GPU report: correctness and speed on one NVIDIA GPU, into OUT_DIR/report.md and OUT_DIR/report.json.
# Usage: tools/bench/gpu/run.sh [OUT_DIR] [--only SECTION...] [--smoke-cpu]
# PYTHON names the interpreter; without it .venv's, else python3. PYTHONPATH may hold megatron-core and Transformer Engine.
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v "${PYTHON:-python3}")
exec "$python" "$root/tools/bench/gpu/report.py" "$@"
