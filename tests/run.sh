#!/usr/bin/env bash
# Installs the test extras into .venv and runs the suite. --full adds the long matrices; other arguments go to pytest.
# Usage: tests/run.sh [--full] [pytest arguments]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/launch/install.sh" test
select=(-m "not full and not gpu")
if [ "${1:-}" = --full ]; then
  shift
  select=(-m "not gpu")
fi
cd "$root"
exec "$root/.venv/bin/python" -m pytest "${select[@]}" "$@"
