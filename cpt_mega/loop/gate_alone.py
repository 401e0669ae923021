"""A suite of gates on one model, without a run."""

import contextlib
import gc
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.engine.step import Engine
from cpt_mega.errors import InputError
from cpt_mega.gates.arming import Power, powers
from cpt_mega.gates.requests import Likeliest
from cpt_mega.gates.suite import Found, Suite, open_suite, take_look, take_references
from cpt_mega.hf.config_reader import read_config
from cpt_mega.hf.locate import locate_checkpoint
from cpt_mega.hf.model_info import HF_FOLDER
from cpt_mega.loop.scoring import Scorer, scorer


@dataclass(frozen=True)
class Measured:
    """What was found. ``lines`` and ``to_json`` are what the files and the screen of ``tools/gate.py`` show.

    ``left_out``: probes that need a base to compare with.
    """

    model: str
    suite: Suite
    found: list[Found]
    left_out: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """JSON of each item, in the order of the suite, with the digest of its probe."""
        digests = self.suite.digests
        return [json.dumps({"digest": digests[one.probe.name], **line}) for one in self.found for line in one.lines()]

    def to_json(self) -> dict:
        """Readings and digests."""
        readings = [reading for one in self.found for reading in one.to_json()]
        names = {"suite": self.suite.name, "digest": self.suite.digest, "digests": self.suite.digests}
        return {"model": self.model, **names, "readings": readings, "left_out": list(self.left_out)}


def measure_alone(
    model: str,
    suite: str,
    base: str | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured | None:
    """Takes one look at a model with a suite; every rank calls it. What was found, on the main process; None elsewhere.

    Args:
        model: a run, an iter_* folder, an import or an HF folder.
        base: another one, from which drift is measured; without it, probes of drift are left out.
        overrides: ``parallel.*`` and ``precision``.
        progress: told ``(requests answered, requests in all)``.

    Raises InputError for a model or a suite that cannot be read, or do not fit together.
    """
    with scorer(overrides) as opening:
        references, texts = ({}, {}) if base is None else _references(opening, base, suite)
        gc.collect()  # an engine is a ring of references, and holds the device's memory
        engine, folder = opening.engine(model)
        opened = _opened(suite, engine, folder)
        _check_same(opened, texts, base)
        left_out = tuple(drift.name for drift in opened.drifts if drift.name not in references)
        opened = opened.without(left_out)
        total, done = sum(len(probe.requests) for probe in opened.probes), 0

        def advance(requests: int) -> None:
            nonlocal done
            done += requests
            progress(done, total)

        found = take_look(engine, opened, references, advance=advance)
        return Measured(model, opened, found, left_out) if engine.mesh.is_main else None


def suite_powers(model: str, suite: str, looks: int) -> list[Power]:
    """What a suite's gates of items can show in so many looks. Reads the model's tokenizer, and not the model.

    Raises InputError for a model or a suite that cannot be read.
    """
    folder = Path(model)
    if not (folder / "config.json").is_file():
        folder = locate_checkpoint(folder, "--model") / HF_FOLDER
    sizes = read_config(folder)
    tokenizer, longest = TextTokenizer.load(folder), sizes.get("max_position_embeddings") or 1 << 30
    opened = open_suite(Path(suite), tokenizer, sizes["vocab_size"], longest)
    return powers(opened.rules, opened, looks)


def _references(opening: Scorer, base: str, suite: str) -> tuple[dict[str, Likeliest], dict[str, list]]:
    """What is kept of the base, and the tokens that it was asked about, by probe."""
    engine, folder = opening.engine(base)
    opened = _opened(suite, engine, folder)
    texts = {drift.name: [text.tokens.tolist() for text in drift.texts] for drift in opened.drifts}
    return take_references(engine, opened.drifts, opened.row_tokens), texts


def _check_same(opened: Suite, texts: dict[str, list], base: str | None) -> None:
    """Raises InputError where the base reads an item as other tokens: there is nothing to compare then."""
    for drift in opened.drifts if texts else ():
        if texts[drift.name] != [text.tokens.tolist() for text in drift.texts]:
            fix = f"has another tokenizer or chat template than the model, so {drift.name} has no common tokens; name its base"
            raise InputError("--base", base, fix)


def _opened(suite: str, engine: Engine, folder: Path) -> Suite:
    tokenizer = TextTokenizer.load(folder / HF_FOLDER)
    return open_suite(Path(suite), tokenizer, engine.shape.vocab_size, engine.shape.max_positions)


def check_output(path: Path) -> None:
    """Raises InputError for a file that could not be written: before anything is measured."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError("--output", str(path), "cannot be written; name a file in a folder that exists")


def write_items(path: Path, measured: Measured) -> None:
    """One line an item; the file appears whole. Raises InputError when it cannot be written."""
    building = path.with_name(f".{path.name}.building")
    try:
        building.write_text("".join(line + "\n" for line in measured.lines()))
        building.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            building.unlink(missing_ok=True)
        raise InputError("--output", str(path), f"cannot be written ({error.strerror}); name another") from error
