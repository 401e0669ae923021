"""Ends a run, and the tools around it, in every way and at any moment, and starts it again by the same command: does it end as
the run that nothing happened to, bit for bit?

A tiny model and corpora of this machine's own text; two processes by ``launch/torchrun.sh``. Each fault has a run of its own
that is hit again and again: at moments drawn over the length of a whole start, or as soon as a save, an evaluation or the
packing of a corpus has begun. Then it is let go on to its end and compared with the reference as ``tools/compare_runs.py``
does: data, losses, readings, weights, moments. ``preprocess_data``, ``import_hf`` and ``export_hf`` are killed as often, and
must leave the same bytes. The exit code is 1 when anything did not survive. ``--seed`` draws the same moments again; what is
happening at them is the machine's.
"""

import argparse
import contextlib
import json
import platform
import random
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fault_injections import FAULTS, PACKING, Hits  # noqa: E402
from fault_launch import Launch, ended, waited  # noqa: E402
from fault_site import Site, prepare  # noqa: E402

from cpt_mega.command_line import run_tool  # noqa: E402
from cpt_mega.data.plan_store import KEPT_FROM_DOCUMENTS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--injections", type=int, default=5, metavar="N", help="of each fault (default 5)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default 1)")
    parser.add_argument(
        "--only", action="append", metavar="FAULT", help=f"one of: {', '.join(FAULTS)}; may be repeated"
    )
    parser.add_argument("--tokens", type=int, default=Site.tokens, help="of a run; a step has about 250 (default 8000)")
    parser.add_argument(
        "--documents", type=int, default=Site.documents, help="of the corpus to train on (default 140000)"
    )
    parser.add_argument("--folder", type=Path, help="where to work; all of it stays there (default: removed)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write what was found, with versions")
    options = parser.parse_args()
    chosen = options.only or list(FAULTS)
    if unknown := set(chosen) - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    if PACKING in chosen and options.documents < KEPT_FROM_DOCUMENTS:
        parser.error(f"{PACKING}: takes {KEPT_FROM_DOCUMENTS} --documents; the plans of fewer are not kept on disk")
    console = Console(highlight=False)
    place = contextlib.nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory()
    with place as name:
        site = Site(Path(name).absolute(), options.tokens, options.documents)
        found = campaign(site, chosen, options.injections, options.seed, console, options.output)
    console.print(table(found))
    problems = [f"{one['fault']}: {problem}" for one in found["faults"] for problem in one["problems"]]
    for problem in problems:
        console.print(f"did not survive: {problem}", markup=False, style="red")
    return 1 if problems else 0


def campaign(
    site: Site, chosen: list[str], injections: int, seed: int, console: Console, output: Path | None = None
) -> dict:
    """Runs everything; returns what was found, and writes it as it comes."""
    begin = time.monotonic()
    console.print(f"seed {seed}, {injections} injections of each of {len(chosen)} faults; making the site")
    prepare(site)
    first_step_s, whole_s = make_reference(site)
    console.print(f"a start takes {first_step_s:.0f} s to its first step, the whole run {whole_s:.0f} s")
    found: list[Hits] = []
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "megatron-core")}
    report = {"seed": seed, "injections": injections, "versions": versions}
    report |= {"first_step_s": first_step_s, "whole_s": whole_s}
    for number, name in enumerate(chosen):
        started = time.monotonic()
        draw = random.Random(f"{seed} {name}")
        hits = Hits(name)
        found.append(hits)
        FAULTS[name](site, hits, injections, draw, (first_step_s, whole_s), console)
        took, left = time.monotonic() - started, len(chosen) - number - 1
        mean = (time.monotonic() - begin) / (number + 1)
        console.print(
            f"{name}: {hits.survived} of {hits.injections} survived, {took:.0f} s; about {left * mean:.0f} s left"
        )
        report["faults"] = [asdict(one) for one in found]
        report["campaign_s"] = time.monotonic() - begin
        if output:
            output.write_text(json.dumps(report, indent=1) + "\n")
    return report


def make_reference(site: Site) -> tuple[float, float]:
    """The run that nothing happens to; seconds until it had done its first step, and in all."""
    launch = Launch(site, site.reference)
    with ended(launch):
        waited(launch, lambda: launch.first_step_s is not None)
        code = launch.wait()
    if code != 0:
        raise SystemExit(f"the reference ended with exit code {code}; see {site.folder}/launches.log")
    return launch.first_step_s or 0.0, launch.seconds


def table(found: dict) -> Table:
    """A line a fault."""
    words = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    shown = Table(title=f"faults (seed {found['seed']}; {words})")
    for name in ("fault", "injections", "survived", "steps lost, most", "exit codes", "time to resume, median"):
        shown.add_column(name, justify="left" if name in ("fault", "exit codes") else "right")
    for one in found["faults"]:
        codes = ", ".join(f"{code} ({count})" for code, count in sorted(one["codes"].items()))
        resume = f"{median(one['resume_s']):.1f} s" if one["resume_s"] else ""
        lost = str(max(one["lost"])) if one["lost"] else ""
        shown.add_row(one["fault"], str(one["injections"]), str(one["survived"]), lost, codes, resume)
    return shown


if __name__ == "__main__":
    sys.exit(run_tool(main, "interrupted: what was started has been ended"))
