"""How soon a run over very many documents starts, and how fast rows come: our stream against megatron-core's datasets.

Start: a simulated index (the tokens are a hole in the file), opened and packed for the first time and again, each in a process
of its own, which reports seconds and memory. megatron-core's ``GPTDataset`` builds its own indices over the same files, for a
run over all tokens once. Rows: real files of random tokens, two sources mixed, read one row after the other in one
process: ids, targets, masks and document boundaries from us, what its ``BlendedDataset`` gives from core.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

SEED, VOCABULARY, SHARES = 7, 50_000, {"a": 0.8, "b": 0.2}
COLD, WARM, CORE_COLD, CORE_WARM = "ours, first time", "ours, again", "core, first time", "core, again"
OUR_ROWS, CORE_ROWS, MASKED_ROWS = "ours", "core", "ours, corpora with a loss mask"
TARGET_TOKENS_A_SECOND = 5_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=10_000_000, help="simulated ones (default 10,000,000)")
    parser.add_argument("--only-ours", action="store_true", help="do not start core's datasets on them")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens of a row (default 4096)")
    parser.add_argument("--rows", type=int, default=20_000, help="rows that are read (default 20,000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, with versions")
    parser.add_argument("--one", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(CONTENDERS[options.one](options)))
        return 0
    console = Console(highlight=False)
    report = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "python": platform.python_version()}
    report |= {name: version(name) for name in ("megatron-core", "numpy")} | {
        "options": {"documents": options.documents}
    }
    with tempfile.TemporaryDirectory(prefix="cpt_mega_stream_") as folder:
        options.folder = Path(folder)
        write_simulated(options.folder / "many", options.documents)
        names = [COLD, WARM] if options.only_ours else [COLD, WARM, CORE_COLD, CORE_WARM]
        report["start"] = {name: in_a_process(name, options) for name in names}
        console.print(start_table(report["start"], options.documents))
        shutil.rmtree(options.folder)
        options.folder.mkdir()
        for number, name in enumerate(SHARES):
            write_random(options.folder / name, 40_000, number)
        report["rows"] = {name: in_a_process(name, options) for name in (OUR_ROWS, CORE_ROWS)}
        for number, name in enumerate(SHARES):
            write_mask(options.folder / name, number)
        report["rows"][MASKED_ROWS] = in_a_process(MASKED_ROWS, options)
        console.print(rows_table(report["rows"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def in_a_process(name: str, options: argparse.Namespace) -> dict:
    """What one contender reports."""
    words = [sys.executable, "-W", "ignore", __file__, "--one", name, "--folder", str(options.folder)]
    words += [f"--documents={options.documents}", f"--seq-length={options.seq_length}", f"--rows={options.rows}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise SystemExit(f"{name} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def simulated_lengths(documents: int, seed: int = SEED) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(6, 1.3, documents).astype(np.int32) + 1


def write_simulated(prefix: Path, documents: int) -> None:
    """An index of so many documents, over a file without content."""
    from cpt_mega.data.indexed_writer import write_index

    lengths = simulated_lengths(documents)
    with open(f"{prefix}.idx", "wb") as stream:
        write_index(stream, np.dtype(np.uint16), lambda: [lengths])
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(2 * int(lengths.sum(dtype=np.int64)))


def write_random(prefix: Path, documents: int, seed: int) -> None:
    """A corpus of random tokens."""
    from cpt_mega.data.indexed_writer import IndexedCorpusWriter

    lengths, draw = simulated_lengths(documents, seed), np.random.default_rng(seed)
    with IndexedCorpusWriter(str(prefix), np.uint16) as writer:
        writer.add_many(draw.integers(1, VOCABULARY, int(lengths.sum())).astype(np.uint16), lengths.astype(np.int64))


def write_mask(prefix: Path, seed: int) -> None:
    """A loss mask that counts every other token or so."""
    from cpt_mega.data.indexed import IndexedCorpus, mask_path

    tokens = IndexedCorpus(prefix).tokens
    mask_path(prefix).write_bytes(np.random.default_rng(seed).integers(0, 2, tokens, np.uint8).tobytes())


def own_memory_gib() -> float:
    """Memory that belongs to this process alone at its peak: mapped files are shared by all processes of a machine."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 2**20


def our_stream(folder: Path, names: dict[str, float], seq_length: int):
    from cpt_mega.data.sources import open_sources
    from cpt_mega.data.stream import MixedStream

    specs = [{"name": n, "path": str(folder / n), "role": "domain", "weight": share} for n, share in names.items()]
    sources = open_sources(specs, seq_length=seq_length, packing="best_fit", tokenizer_digest="", vocab_size=VOCABULARY)
    return MixedStream(sources, seq_length, SEED)


def start_ours(options: argparse.Namespace) -> dict:
    """From nothing to the first row; memory when it is there."""
    begun = time.perf_counter()
    stream = our_stream(options.folder, {"many": 1.0}, options.seq_length)
    stream.read(stream.next_batch(1)[0])
    return {"seconds": time.perf_counter() - begun, "gib": own_memory_gib(), "peak_gib": peak_gib()}


def peak_gib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def core_dataset(options: argparse.Namespace, blend: dict[str, float], samples: int):
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=options.seq_length,
        blend=([str(options.folder / name) for name in blend], list(blend.values())),
        split="1,0,0",
        path_to_cache=str(options.folder / "cache"),
        tokenizer=NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
    return builder.build()[0]


class NoTokenizer:
    """What core's dataset asks of a tokenizer."""

    eod, pad, vocab_size, unique_identifiers = 0, None, VOCABULARY, {"class": "none"}


def start_core(options: argparse.Namespace) -> dict:
    from megatron.core.datasets import blended_megatron_dataset_builder, gpt_dataset  # noqa: F401  not part of the start

    tokens = int(simulated_lengths(options.documents).sum(dtype=np.int64))
    begun = time.perf_counter()
    dataset = core_dataset(options, {"many": 1.0}, tokens // options.seq_length - 1)
    dataset[0]
    return {"seconds": time.perf_counter() - begun, "gib": own_memory_gib(), "peak_gib": peak_gib()}


def read_ours(options: argparse.Namespace) -> dict:
    stream = our_stream(options.folder, SHARES, options.seq_length)
    refs = stream.next_batch(min(200, options.rows))
    for ref in refs:
        stream.read(ref)
    begun = time.perf_counter()
    for _ in range(options.rows // 100):
        for ref in stream.next_batch(100):
            stream.read(ref)
            stream.row_tokens(ref)
    return {"tokens_per_s": options.rows // 100 * 100 * options.seq_length / (time.perf_counter() - begun)}


def read_core(options: argparse.Namespace) -> dict:
    dataset = core_dataset(options, SHARES, options.rows + 200)
    for index in range(200):
        dataset[index]
    begun = time.perf_counter()
    for index in range(200, 200 + options.rows):
        dataset[index]
    return {"tokens_per_s": options.rows * options.seq_length / (time.perf_counter() - begun)}


CONTENDERS = {
    COLD: start_ours,
    WARM: start_ours,
    CORE_COLD: start_core,
    CORE_WARM: start_core,
    OUR_ROWS: read_ours,
    CORE_ROWS: read_core,
    MASKED_ROWS: read_ours,
}


def start_table(start: dict[str, dict], documents: int) -> Table:
    table = Table(title=f"to the first row of {documents:,} documents", title_justify="left")
    for name in ("", "seconds", "GiB of its own", "peak GiB with mapped files"):
        table.add_column(name, justify="right" if name else "left")
    for name, one in start.items():
        table.add_row(name, f"{one['seconds']:.1f}", f"{one['gib']:.2f}", f"{one['peak_gib']:.2f}")
    return table


def rows_table(rows: dict[str, dict]) -> Table:
    table = Table(title="rows read by one process", title_justify="left")
    for name in ("", "million tokens a second", "of core's"):
        table.add_column(name, justify="right" if name else "left")
    for name, one in rows.items():
        ratio = one["tokens_per_s"] / rows[CORE_ROWS]["tokens_per_s"]
        table.add_row(name, f"{one['tokens_per_s'] / 1e6:.1f}", f"{ratio:.2f}")
    table.caption = f"target: {TARGET_TOKENS_A_SECOND / 1e6:.0f} million"
    return table


if __name__ == "__main__":
    raise SystemExit(main())
