#!/usr/bin/env bash
# Installs the test extras into .venv and runs the suite; then the engine's part again on the other supported megatron-core.
# Usage: tests/run.sh [--full] [pytest arguments]
#   --full adds the long matrices, on both. With pytest arguments, or ONE_PYTHON=1, only .venv runs.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
extras=test
[ "${1:-}" != --full ] || extras=test,harness,bench
bash "$root/launch/install.sh" "$extras"
select=(-m "not full and not gpu")
again=(-m "versions and not full")
if [ "${1:-}" = --full ]; then
  shift
  select=(-m "not gpu")
  again=(-m "not gpu")
fi
cd "$root"
"$root/.venv/bin/python" -m pytest "${select[@]}" "$@"
if [ $# -gt 0 ] || [ -n "${ONE_PYTHON:-}" ]; then
  exit 0
fi

# megatron-core 0.16 is the newest for Python 3.11, and 0.19 needs 3.12: the other core means the other interpreter.
minor=$("$root/.venv/bin/python" -c 'import sys; print(11 if sys.version_info[1] == 12 else 12)')
for other in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python3; do
  if "$other" -c '' 2>/dev/null; then
    echo "the engine again on $("$other" --version), in .venv-3.$minor (torch for 3.12 brings CUDA: 5 GB)"
    VENV="$root/.venv-3.$minor" PYTHON="$other" bash "$root/launch/install.sh" test
    exec "$root/.venv-3.$minor/bin/python" -m pytest "${again[@]}" tests/engine tests/loop/test_resume.py tests/loop/test_guarding.py
  fi
done
echo "the engine did not run on the other megatron-core: no Python 3.$minor on this machine"
