"""Disks that are full or cannot be written, for real: file systems in a mount namespace of a process' own.

Tests run as root in many places, to whom permissions do not apply.
"""

import subprocess
import sys
from pathlib import Path

import pytest

FULL = "mount -t tmpfs -o size=64k tmpfs {folder}"
READ_ONLY = "mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}"


def run_on(mount: str, folder: Path, script: str, *words: str) -> subprocess.CompletedProcess:
    """Runs a Python script, given the folder, where the folder is mounted so; skips where that is not allowed."""
    allowed = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"no mount namespaces here: {allowed.stderr.strip()}")
    mounting = ["unshare", "-m", "sh", "-c", mount.format(folder=folder) + ' && exec "$@"', "sh"]
    return subprocess.run(
        [*mounting, sys.executable, "-c", script, str(folder), *words], capture_output=True, text=True, timeout=120
    )
