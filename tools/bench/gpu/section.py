"""One section of the GPU report in a process of its own; ``report.py`` starts it. Its result goes to a JSON file."""

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
if importlib.util.find_spec("cpt_mega") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(ROOT))

SECTIONS = ("layers", "precisions", "packing", "throughput", "syncs")
PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(description="One section of the GPU report.")
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--result", type=Path, required=True, metavar="FILE", help="where the result goes, as JSON")
    parser.add_argument("--smoke-cpu", action="store_true", help="tiny sizes without a GPU: does the code run?")
    options = parser.parse_args()
    result = run(options.section, options.smoke_cpu)
    options.result.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def run(name: str, smoke: bool) -> dict:
    """The section's table, notes and failures, with where it ran."""
    from cpt_mega.config.schema import ParallelOptions
    from cpt_mega.engine.fast_paths import apply_environment

    apply_environment(ParallelOptions(), False)  # before anything starts CUDA
    from cpt_mega.engine.host import has_gpu
    from cpt_mega.engine.mesh import start_mesh, stop_mesh

    if not (has_gpu() or smoke):
        raise SystemExit("no CUDA device; --smoke-cpu runs the code in tiny sizes without one")
    module = importlib.import_module(name)
    mesh = start_mesh(ParallelOptions(), seed=1234)
    try:
        return {"title": module.TITLE, **module.run(mesh, smoke), "about": _about()}
    finally:
        stop_mesh()


def _about() -> dict:
    """Device and versions."""
    from importlib.metadata import PackageNotFoundError, version

    import small
    import torch

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {"device": small.device_name(), "cuda": torch.version.cuda, "python": sys.version.split()[0], **found}


if __name__ == "__main__":
    sys.exit(main())
