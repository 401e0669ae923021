"""The GPU report: runs every section in a process of its own and writes OUT_DIR/report.md and OUT_DIR/report.json.

A section that fails is recorded with what it said, and the rest goes on; the report is written again after each one.
Exit code 1 when any of them failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SECTIONS = ("layers", "packing", "syncs", "precisions", "throughput")  # short ones first
RESULTS = {"passed": "passed", "failed": "FAILED", "skipped": "skipped"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash tools/bench/gpu/run.sh", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "runs" / "gpu_report", metavar="OUT_DIR")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run (default all)")
    parser.add_argument("--timeout-s", type=float, default=1200.0, help="longest time of a section")
    parser.add_argument("--smoke-cpu", action="store_true", help="tiny sizes without a GPU: does the code run?")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": _commit(), "smoke_cpu": options.smoke_cpu}
    report["sections"] = {}
    for name in options.only:
        print(f"{name} ...", flush=True)
        result = run_section(name, options)
        report["sections"][name] = result
        write(report, options.out)
        print(f"{name}: {RESULTS[result['state']]} in {result['seconds']:.0f} s", flush=True)
    print(f"report: {options.out / 'report.md'}", flush=True)
    return int(any(result["state"] == "failed" for result in report["sections"].values()))


def run_section(name: str, options: argparse.Namespace) -> dict:
    """What a section found, its ``state`` and ``seconds``; of one that broke, the end of what it said."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        words = [sys.executable, str(HERE / "section.py"), name, "--result", str(target)]
        said = _call(words + ["--smoke-cpu"] * options.smoke_cpu, options.timeout_s)
        result = json.loads(target.read_text()) if target.is_file() else {"title": name, "error": said[-6000:]}
    broken = "error" in result or bool(result["failed"])
    state = "failed" if broken else "skipped" if result.get("skipped") else "passed"
    return {**result, "state": state, "seconds": time.monotonic() - begin}


def _call(words: list[str], timeout_s: float) -> str:
    """Runs a command to its end or its time; all that it said. None of its processes is left."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen(words, env=environment, cwd=ROOT, start_new_session=True, **pipes)
    try:
        return child.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        return f"{child.communicate()[0]}\nstopped after {timeout_s:.0f} s"
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise


def write(report: dict, out: Path) -> None:
    """report.json and report.md."""
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.md").write_text("\n".join(_markdown(report)) + "\n")


def _markdown(report: dict) -> list[str]:
    lines = ["# GPU report", "", f"{report['started']}, commit {report['commit']}."]
    if report["smoke_cpu"]:
        lines += ["", "**Smoke test without a GPU, in tiny sizes: no number here means anything.**"]
    abouts = [result["about"] for result in report["sections"].values() if "about" in result]
    if abouts:
        lines += ["", ", ".join(f"{name} {value}" for name, value in abouts[0].items()) + "."]
    lines += ["", "| section | result | seconds |", "|---|---|---|"]
    lines += [f"| {r['title']} | {RESULTS[r['state']]} | {r['seconds']:.0f} |" for r in report["sections"].values()]
    for result in report["sections"].values():
        lines += ["", f"## {result['title']}: {RESULTS[result['state']]}", "", *_section(result)]
    return lines


def _section(result: dict) -> list[str]:
    if "error" in result:
        return ["```", result["error"].strip(), "```"]
    if result.get("skipped"):
        return [f"Not run: {result['skipped']}."]
    lines = [_cells(result["columns"]), "|" + "---|" * len(result["columns"]), *map(_cells, result["rows"]), ""]
    lines += [f"- **failed**: {sentence}" for sentence in result["failed"]]
    for note in result["notes"]:
        lines += ["```", note.strip(), "```"] if "\n" in note else [f"- {note}"]
    return lines


def _cells(values: list[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|").replace("\n", " ") for value in values) + " |"


def _commit() -> str:
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # a host without git
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
