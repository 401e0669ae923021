"""What packing does to documents and how long it takes: best fit with small documents spread, against its alternatives.

Real corpora are gathered from this machine and tokenised: files of all kinds, Python modules, docstrings. For each and each
row length: how many documents are cut, how full rows are, how many documents the fullest row holds, and how evenly the
attention work of a global batch is dealt to ranks. Then the time and memory for many simulated documents, against a
plain best fit that places one document at a time.
"""

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from bisect import bisect_left, insort
from collections.abc import Iterable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import mean

import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

from machine_text import distinct_texts, docstring_prose, python_sources  # noqa: E402

from cpt_mega.data.best_fit import best_fit_rows  # noqa: E402
from cpt_mega.data.packing import RowPlan, plan_rows  # noqa: E402
from cpt_mega.data.routes import AUTO, choose_route  # noqa: E402
from cpt_mega.data.tokenizer import TextTokenizer  # noqa: E402
from tools.bench.tokenizer_kinds import train_kind  # noqa: E402

ROW_LENGTHS = (2048, 4096, 8192, 32768)
KIND, VOCABULARY, TRAINING_TEXTS = "Llama 3", 32_000, 2_000
RANKS, ROWS_A_RANK, BATCHES = 8, 4, 200
TEXTBOOK_DOCUMENTS = 500_000  # one at a time takes a while


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--megabytes", type=int, default=300, help="of each kind of text at most (default 300)")
    parser.add_argument("--documents", type=int, default=10_000_000, help="simulated ones (default 10,000,000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, with versions")
    options = parser.parse_args()
    console = Console(highlight=False, width=150)
    speed = measure_speed(options.documents)
    console.print(speed_table(speed))
    corpora = gather(options.megabytes * 1_000_000, console)
    packed = [measure(name, lengths, row) for name, lengths in corpora.items() for row in ROW_LENGTHS]
    console.print(corpora_table(packed))
    if options.json:
        report = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "python": platform.python_version()}
        report |= {"numpy": version("numpy"), "corpora": packed, "speed": speed}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def gather(limit_bytes: int, console: Console) -> dict[str, np.ndarray]:
    """Document lengths in tokens of each kind of text."""
    kinds = {
        "files": distinct_texts(limit_bytes),
        "modules": python_sources(),
        "docstrings": docstring_prose(("numpy", "torch", "transformers", "sympy")),
    }
    route, corpora = None, {}
    with tempfile.TemporaryDirectory(prefix="cpt_mega_packing_") as folder:
        for name, texts in kinds.items():
            if route is None:
                first = list(islice(texts, TRAINING_TEXTS))
                tokenizer = TextTokenizer.load(train_kind(KIND, first, VOCABULARY, Path(folder) / "tokenizer"))
                route = choose_route(tokenizer, AUTO, first[:9]).route
                corpora[name] = lengths_of(first, route)
            counted = lengths_of(limited(texts, limit_bytes), route)
            corpora[name] = np.concatenate([corpora.get(name, counted[:0]), counted])
            found = corpora[name]
            console.print(f"{name}: {len(found):,} documents, {found.sum():,} tokens, {found.mean():,.0f} on average")
    return corpora


def limited(texts: Iterable[str], limit_bytes: int) -> Iterable[str]:
    for text in texts:
        limit_bytes -= len(text)
        if limit_bytes < 0:
            return
        yield text


def lengths_of(texts: Iterable[str], route) -> np.ndarray:
    """Tokens of each text, and one for its end."""
    texts, lengths = iter(texts), [np.empty(0, np.int64)]
    while some := list(islice(texts, 256)):
        lengths.append(route.encode(some)[1] + 1)
    return np.concatenate(lengths)


def measure(corpus: str, lengths: np.ndarray, seq_length: int) -> dict:
    """What each way of packing does to a corpus at one row length."""
    ours, chunks = plan_rows(lengths, seq_length), plan_rows(lengths, seq_length, "concat")
    fitting = np.sort(lengths[lengths % seq_length > 0] % seq_length)[::-1].astype(np.int32)
    return {
        "corpus": corpus,
        "seq_length": seq_length,
        "cut_by_concat": chunks.statistics.split_documents / len(lengths),
        "longer_than_a_row": float((lengths > seq_length).mean()),
        "cut": ours.statistics.split_documents / len(lengths),
        "fill": ours.statistics.fill,
        "documents_a_row": ours.statistics.documents_a_row,
        "most_documents": ours.statistics.most_documents,
        "most_documents_plain": int(np.bincount(best_fit_rows(fitting, seq_length)).max()),
        "rows": ours.rows,
        **balance(ours),
    }


def balance(plan: RowPlan) -> dict[str, float]:
    """Attention work: how uneven rows are, and the busiest rank over the mean, dealt in turn and by work."""
    from cpt_mega.engine.dealing import deal_rows

    work = plan.attention_work
    random, in_turn, dealt = np.random.default_rng(0), [], []
    for _ in range(BATCHES):
        batch = random.choice(work, RANKS * ROWS_A_RANK)
        totals = np.array([sum(batch[row] for group in rank for row in group) for rank in deal_rows(batch, RANKS, 1)])
        in_turn.append(batch.reshape(-1, RANKS).sum(axis=0).max() / batch.sum() * RANKS)
        dealt.append(totals.max() / totals.mean())
    return {
        "work_p99": float(np.percentile(work, 99) / work.mean()),
        "in_turn": mean(in_turn),
        "dealt": mean(dealt),
        "dealt_within": float((np.array(dealt) <= 1.2).mean()),
    }


def measure_speed(documents: int) -> list[dict]:
    """Seconds and peak memory for simulated documents, and how many times as fast as one document at a time."""
    found = []
    for seq_length in ROW_LENGTHS:
        lengths = np.random.default_rng(0).lognormal(6, 1.3, documents).astype(np.int64) + 1
        few = np.sort(lengths[:TEXTBOOK_DOCUMENTS] % seq_length)[::-1].tolist()
        begun = time.perf_counter()
        textbook(few, seq_length)
        theirs = len(few) / (time.perf_counter() - begun)
        begun = time.perf_counter()
        plan = plan_rows(lengths, seq_length)
        seconds = time.perf_counter() - begun
        statistics = plan.statistics
        found.append(
            {
                "seq_length": seq_length,
                "documents": documents,
                "seconds": seconds,
                "documents_per_s": documents / seconds,
                "ratio": documents / seconds / theirs,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "bytes_a_document": sum(
                    getattr(plan, name).nbytes for name in ("row_offsets", "document", "start", "length")
                )
                / len(plan.length),
                "fill": statistics.fill,
                "most_documents": statistics.most_documents,
            }
        )
    return found


def textbook(sizes: list[int], seq_length: int) -> int:
    """Best-fit-decreasing one document at a time, over sorted rooms; the rows."""
    rooms, rows = [], 0
    for size in sizes:
        at = bisect_left(rooms, size)
        room = rooms.pop(at) if at < len(rooms) else seq_length
        rows += room == seq_length
        if room > size:
            insort(rooms, room - size)
    return rows


def corpora_table(packed: list[dict]) -> Table:
    table = Table(title="documents in rows", title_justify="left")
    names = ("row", "cut by concat", "cut", "fill", "documents a row", "most", "most, plain")
    names += ("work p99", "in turn", "dealt", "<= 1.2")
    table.add_column("corpus")
    for name in names:
        table.add_column(name, justify="right")
    for one in packed:
        table.add_row(
            one["corpus"],
            f"{one['seq_length']:,}",
            f"{one['cut_by_concat']:.1%}",
            f"{one['cut']:.1%}",
            f"{one['fill']:.3%}",
            f"{one['documents_a_row']:.1f}",
            f"{one['most_documents']:,}",
            f"{one['most_documents_plain']:,}",
            *(f"{one[name]:.2f}" for name in ("work_p99", "in_turn", "dealt")),
            f"{one['dealt_within']:.0%}",
        )
    return table


def speed_table(speed: list[dict]) -> Table:
    table = Table(title=f"packing {speed[0]['documents']:,} simulated documents", title_justify="left")
    for name in ("row", "seconds", "times as fast as one at a time", "peak GiB", "bytes a piece", "fill", "most"):
        table.add_column(name, justify="right")
    for one in speed:
        numbers = (f"{one[name]:.2f}" for name in ("seconds", "ratio", "peak_gib", "bytes_a_document"))
        table.add_row(f"{one['seq_length']:,}", *numbers, f"{one['fill']:.3%}", f"{one['most_documents']:,}")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
