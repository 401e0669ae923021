#!/usr/bin/env bash
# Makes .venv in the checkout and installs cpt_mega with the pinned versions of launch/constraints.txt.
# Usage: launch/install.sh [EXTRA]      e.g. launch/install.sh test
# PYTHON names the interpreter, VENV another folder than .venv.
# Prints nothing when everything is in place already; a changed pyproject.toml or constraints.txt installs again.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
extra=${1:-}
venv=${VENV:-$root/.venv}

find_python() {
  local name
  for name in ${PYTHON:-python3 python3.11 python3.12}; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  name=${PYTHON:-python3}
  echo "error: $name = $("$name" --version 2>&1): cpt_mega needs Python 3.11 or 3.12; install one, or set PYTHON" >&2
  exit 2
}

wanted=$(cat "$root/pyproject.toml" "$root/launch/constraints.txt" | sha256sum | cut -c1-16)
stamp=$venv/.installed${extra:+-$extra}
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then
  exit 0
fi
python=$(find_python)
if ! "$venv/bin/python" -c '' 2>/dev/null; then # missing, cut short, or moved with the checkout
  rm -rf "$venv"
  "$python" -m venv "$venv"
fi
echo "installing into $venv (pinned by launch/constraints.txt; a minute or two)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-warn-script-location \
  --constraint "$root/launch/constraints.txt" --editable "$root${extra:+[$extra]}" 2> >(grep -v '^WARNING: Location' >&2)
echo "$wanted" >"$stamp"
