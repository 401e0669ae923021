"""What packing the texts of a look is worth: one pass over a multiple-choice set, packed, unpacked, and by lm-eval's own model.

    python tools/bench/probes.py [--items 527] [--json FILE]

A random Llama with a tokenizer trained here; the items are those of the gates. All contenders are asked the same lm-eval
instances through the same method, ``loglikelihood``, so tokenising is in all of them: our engine with packed rows, our engine
with each text in a row of its own (nothing is padded), and lm-eval's ``HFLM`` over transformers on the exported model, which
sorts texts by length, pads batches, and asks once where continuations differ in their last token alone. One process, fp32,
``--threads`` each; a round runs every contender once, and ratios are taken within a round. Exit code 1 when answers differ
by more than 1e-3.

Needs the extras ``harness`` and ``bench``.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for place in (ROOT, ROOT / "tools"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

import torch  # noqa: E402
from machine_model import byte_level_tokenizer, save_random_llama  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from cpt_mega.gates.asking import score_requests  # noqa: E402
from cpt_mega.gates.harness import HarnessModel, build_task, load_tokenizer  # noqa: E402
from cpt_mega.hf.convert import export_hf, import_hf  # noqa: E402
from cpt_mega.hf.model_info import HF_FOLDER  # noqa: E402
from cpt_mega.loop.scoring import scoring_engine  # noqa: E402

ITEMS = ROOT / "configs" / "gates" / "items" / "knowledge.jsonl"
PACKED, ALONE = "ours, packed", "ours, one text a row"
SIZES = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "max_position_embeddings": 2048}
TASK = """\
task: knowledge
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}, cache_dir: {folder}/cache}}
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: {shots}
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--items", type=int, default=527, help="of knowledge.jsonl, from the start (default 527, all)")
    parser.add_argument("--shots", type=int, default=0, help="examples before each (default 0)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--threads", type=int, default=1, help="(default 1)")
    parser.add_argument("--row-tokens", type=int, default=2048, help="of a packed row (default 2048)")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16, 64], help="texts in a batch of HFLM's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, with versions")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }
    report |= {name: version(name) for name in ("torch", "megatron-core", "transformers", "lm-eval")}
    with tempfile.TemporaryDirectory(prefix="cpt_mega_probes_") as folder:
        report |= measure(Path(folder), options)
    Console(highlight=False).print(shown(report, options))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(report["largest_difference"] > 1e-3)


def measure(folder: Path, options: argparse.Namespace) -> dict:
    """Seconds of each contender in each round, and the largest difference of any answer from the packed one."""
    parameters = make_model(folder)
    instances = make_instances(folder, options)
    contenders = {f"HFLM, batches of {size}": reference(folder / "export", size) for size in options.batch}
    with scoring_engine(str(folder / "import"), ["precision=fp32"]) as (engine, checkpoint):
        tokenizer, longest = load_tokenizer(checkpoint / HF_FOLDER), engine.shape.max_positions

        def packed(requests):
            tokens.append(sum(request.inputs for request in requests))
            return score_requests(engine, requests, options.row_tokens)

        def alone(requests):
            return [answer for request in requests for answer in score_requests(engine, [request], 1)]

        tokens: list[int] = []
        ours = {PACKED: HarnessModel(tokenizer, longest, packed), ALONE: HarnessModel(tokenizer, longest, alone)}
        models = {name: model.loglikelihood for name, model in (ours | contenders).items()}
        for ask in models.values():
            ask(instances[:8], disable_tqdm=True)
        seconds, answers = rounds(models, instances, options.rounds)
    worst = max(abs(a[0] - b[0]) for found in answers.values() for a, b in zip(found, answers[PACKED], strict=True))
    found = {"parameters": parameters, "texts": len(instances), "tokens": tokens[-1]}
    return found | {"seconds": seconds, "largest_difference": worst}


def make_model(folder: Path) -> int:
    """``import`` and ``export`` of a random model; returns its parameters."""
    texts = [" ".join([line["question"], *line["choices"]]) for line in map(json.loads, ITEMS.open())]
    parameters = save_random_llama(folder / "hf", byte_level_tokenizer(texts, 4096, ["<|end|>"]), seed=1, **SIZES)
    import_hf(folder / "hf", folder / "import")
    export_hf(folder / "import", folder / "export")
    return parameters


def make_instances(folder: Path, options: argparse.Namespace) -> list:
    (folder / "tasks").mkdir()
    items = folder / "items.jsonl"
    items.write_text("".join(ITEMS.read_text().splitlines(keepends=True)[: options.items]))
    (folder / "tasks" / "knowledge.yaml").write_text(TASK.format(items=items, folder=folder, shots=options.shots))
    return build_task("benchmark", "knowledge", folder / "tasks", None).instances


def reference(folder: Path, batch_size: int):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch_size)


def rounds(models: dict[str, Callable], instances: list, count: int) -> tuple[dict[str, list[float]], dict[str, list]]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    answers: dict[str, list] = {}
    for _ in range(count):
        for name, ask in models.items():
            begun = time.perf_counter()
            answers[name] = ask(instances, disable_tqdm=True)
            seconds[name].append(time.perf_counter() - begun)
    return seconds, answers


def shown(report: dict, options: argparse.Namespace) -> Table:
    title = f"{report['texts']:,} texts of {options.items} items, {report['tokens']:,} tokens, "
    table = Table(title=title + f"{report['parameters'] / 1e6:.1f}M parameters", title_justify="left")
    for name in ("", "seconds, median", "texts a second", "packed is faster by"):
        table.add_column(name, justify="right" if name else "left")
    for name, times in report["seconds"].items():
        ratios = [one / packed for one, packed in zip(times, report["seconds"][PACKED], strict=True)]
        middle = statistics.median(times)
        table.add_row(name, f"{middle:.1f}", f"{report['texts'] / middle:.0f}", f"{statistics.median(ratios):.2f}x")
    table.caption = f"load before: {report['load']:.1f}; largest difference {report['largest_difference']:.1e} nats"
    return table


if __name__ == "__main__":
    raise SystemExit(main())
