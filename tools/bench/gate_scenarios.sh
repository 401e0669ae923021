#!/usr/bin/env bash
# Runs that the gates should leave alone, turn round and end early, on the quickstart's model and corpora; a table and pictures.
# Usage: tools/bench/gate_scenarios.sh [DIR] [--seeds N] [--report]     (DIR: runs/gate_scenarios)
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
exec "$root/.venv/bin/python" "$root/tools/bench/gate_scenarios.py" "$@"
