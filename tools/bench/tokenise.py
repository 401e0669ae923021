"""How fast text becomes a corpus: ``tools/preprocess_data.py`` against Megatron-LM's way and against the bare encoder.

All three are whole processes over one file of distinct text gathered from this machine, by one tokenizer of Llama 3's kind
trained here, with the same number of workers, in turn within each round; ratios are taken within a round. The two corpora
must be equal byte for byte. A second table says which route each kind of tokenizer takes, and how fast it is in one thread.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median

import orjson
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

from machine_text import distinct_texts  # noqa: E402

from tools.bench.tokenizer_kinds import KINDS, SPECIALS, train_kind  # noqa: E402

OURS, MEGATRON, BARE = "tools/preprocess_data.py", "Megatron-LM's way", "bare encoder"
TARGETS = ((OURS, MEGATRON, 50.0), (OURS, BARE, 0.5))
MAIN_KIND, MAIN_VOCABULARY, KIND_VOCABULARY = "Llama 3", 128_000, 32_000
TRAINING_BYTES, KIND_TRAINING_BYTES, KIND_BYTES, REFERENCE_BYTES = 100 << 20, 5 << 20, 60 << 20, 3 << 20
PACKAGES = ("gigatoken", "tiktoken", "tokenizers", "sentencepiece", "transformers", "megatron-core", "numpy", "orjson")
BARE_SCRIPT = """
import os, sys, gigatoken
encoder = gigatoken.Tokenizer.from_json(open(sys.argv[2] + "/tokenizer.json").read())
encoder.encode_files(gigatoken.JsonlFileSource([sys.argv[1]]), parallel=int(sys.argv[3]) > 1)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--megabytes", type=int, default=1600, help="of text, as far as the machine has it (default 1600)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="times that every contender runs (default 2)")
    parser.add_argument("--workers", type=int, default=2, help="processes, or threads of the bare encoder (default 2)")
    parser.add_argument("--kinds", action="store_true", help="only the table of kinds of tokenizers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, with versions")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cpt_mega_tokenise_") as folder:
        return measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> int:
    """Runs everything, prints the tables, writes the JSON; 1 when the two corpora differ."""
    console = Console(highlight=False)
    console.print("gathering text")
    corpus = gather(folder / "corpus.jsonl", options.megabytes * 1_000_000)
    console.print(f"{corpus['documents']:,} distinct documents, {corpus['bytes'] / 1e6:,.0f} MB of JSON lines")
    report = {"corpus": corpus, "options": {name: str(value) for name, value in vars(options).items()}}
    equal = True
    if not options.kinds:
        rounds, equal = measure_tools(options, folder, console)
        report |= {"seconds": rounds, "equal": equal, "ratios": ratios_of(rounds)}
        console.print(tools_table(rounds, corpus["bytes"]))
        console.print(ratios_table(report["ratios"]))
        if not equal:
            console.print("the two corpora differ", style="bold red")
    report["kinds"] = measure_kinds(folder, console)
    console.print(kinds_table(report["kinds"]))
    if options.json:
        report |= {
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
        report["versions"] = {name: version(name) for name in PACKAGES}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if equal else 1


def gather(path: Path, limit_bytes: int) -> dict:
    """Writes distinct texts of the machine as JSON lines, in an order by content; counts and bytes of text.

    Texts that spell a special token are left out: Megatron-LM's way would end documents in their middle.
    """
    places, documents, size = [], 0, 0
    with open(path.with_suffix(".unordered"), "wb") as stream:
        for text in distinct_texts(limit_bytes):
            if any(special in text for special in SPECIALS):
                continue
            line = orjson.dumps({"text": text}, option=orjson.OPT_APPEND_NEWLINE)
            places.append((hashlib.sha256(line).digest(), stream.tell(), len(line)))
            stream.write(line)
            documents, size = documents + 1, size + len(text.encode())
    with open(path.with_suffix(".unordered"), "rb") as stream, open(path, "wb") as ordered:
        for _, start, length in sorted(places):
            stream.seek(start)
            ordered.write(stream.read(length))
    path.with_suffix(".unordered").unlink()
    return {"documents": documents, "bytes": path.stat().st_size, "text_bytes": size}


def texts_of(path: Path, limit_bytes: int, skip_bytes: int = 0) -> list[str]:
    """Texts of a corpus file after so many bytes, until they reach so many."""
    texts, size = [], 0
    with open(path, "rb") as stream:
        stream.seek(skip_bytes)
        for line in islice(stream, bool(skip_bytes), None):
            texts.append(orjson.loads(line)["text"])
            size += len(line)
            if size >= limit_bytes:
                break
    return texts


def measure_tools(options: argparse.Namespace, folder: Path, console: Console) -> tuple[list[dict[str, float]], bool]:
    """Seconds of each contender in each round; whether the corpora are equal."""
    corpus, workers = folder / "corpus.jsonl", str(options.workers)
    tokenizer = train_kind(MAIN_KIND, texts_of(corpus, TRAINING_BYTES), MAIN_VOCABULARY, folder / "tokenizer")
    ours = ["tools/preprocess_data.py", "--input", str(corpus), "--tokenizer", str(tokenizer), "--workers", workers]
    commands = {
        OURS: [*ours, "--output", str(folder / "ours")],
        BARE: ["-c", BARE_SCRIPT, str(corpus), str(tokenizer), workers],
        MEGATRON: ["tools/bench/megatron_tokenise.py", str(corpus), str(tokenizer), str(folder / "theirs"), workers],
    }
    rounds = []
    for number in range(1, options.rounds + 1):
        rounds.append({})
        for name, words in commands.items():
            for made in (*folder.glob("ours.*"), *folder.glob("theirs.*")) if name == OURS else ():
                made.unlink()
            read_through(corpus)
            rounds[-1][name] = seconds_of([sys.executable, *words])
            console.print(f"round {number}: {name}: {rounds[-1][name]:.1f} s")
    return rounds, all(same(folder / f"ours.{kind}", folder / f"theirs.{kind}") for kind in ("bin", "idx"))


def read_through(path: Path) -> None:
    """Reads a file, so that every contender finds it in the page cache."""
    with open(path, "rb", 0) as stream:
        while stream.read(1 << 24):
            pass


def seconds_of(words: list[str]) -> float:
    """Wall time of a command, from its start to its end. Raises SystemExit with what it said when it fails."""
    begun = time.monotonic()
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return time.monotonic() - begun


def same(first: Path, second: Path) -> bool:
    """Whether two files are equal byte for byte."""
    return subprocess.run(["cmp", "--silent", str(first), str(second)]).returncode == 0


def ratios_of(rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    """For each pair of TARGETS how many times as fast the first is, round by round."""
    return {f"{ours} / {theirs}": [one[theirs] / one[ours] for one in rounds] for ours, theirs, _ in TARGETS}


def measure_kinds(folder: Path, console: Console) -> list[dict]:
    """For each kind of tokenizer its route, and MB/s of that and of the reference in one thread, on other text than it saw."""
    from cpt_mega.data.routes import ReferenceRoute, choose_route
    from cpt_mega.data.tokenizer import TextTokenizer

    corpus, found = folder / "corpus.jsonl", []
    texts = texts_of(corpus, KIND_BYTES, corpus.stat().st_size // 2)
    short = texts_of(corpus, REFERENCE_BYTES, corpus.stat().st_size // 2)
    for name in KINDS:
        console.print(f"training a tokenizer of the kind of {name}")
        training = texts_of(corpus, KIND_TRAINING_BYTES)
        tokenizer = TextTokenizer.load(train_kind(name, training, KIND_VOCABULARY, folder / "kinds" / name[:7]))
        chosen = choose_route(tokenizer, "auto", [text[:20_000] for text in short])
        taken = short if isinstance(chosen.route, ReferenceRoute) else texts
        one = {"kind": name, "route": chosen.name, "passed over": chosen.passed_over}
        for route, label, sample in (
            (chosen.route, "MB/s", taken),
            (ReferenceRoute(tokenizer), "reference MB/s", short),
        ):
            begun = time.monotonic()
            route.encode(sample)
            one[label] = sum(len(text.encode()) for text in sample) / 1e6 / (time.monotonic() - begun)
        found.append(one)
    return found


def tools_table(rounds: list[dict[str, float]], size: int) -> Table:
    table = Table(title="whole processes, median of rounds (range)", title_justify="left")
    for name in ("", "seconds", "MB/s"):
        table.add_column(name)
    for name in (OURS, BARE, MEGATRON):
        values = [one[name] for one in rounds]
        spread = f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        table.add_row(name, spread, f"{size / 1e6 / median(values):.1f}")
    return table


def ratios_table(ratios: dict[str, list[float]]) -> Table:
    table = Table(title="times as fast, within each round", title_justify="left")
    for name in ("", "ratio", "target", ""):
        table.add_column(name)
    for ours, theirs, target in TARGETS:
        values = ratios[f"{ours} / {theirs}"]
        verdict = "[green]yes[/]" if median(values) >= target else "[bold red]NO[/]"
        spread = f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        table.add_row(f"{ours} / {theirs}", spread, f"{target:g}", verdict)
    return table


def kinds_table(kinds: list[dict]) -> Table:
    table = Table(title="one thread, after loading", title_justify="left")
    for name in ("kind", "route", "MB/s", "reference MB/s"):
        table.add_column(name)
    for one in kinds:
        table.add_row(one["kind"], one["route"], f"{one['MB/s']:.1f}", f"{one['reference MB/s']:.1f}")
    return table


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
