"""A suite of gates on one model, without a run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from cpt_mega.gates.suite import Found, Suite, open_suite, take_look
from cpt_mega.hf.model_info import HF_FOLDER
from cpt_mega.loop.scoring import scoring_engine


@dataclass(frozen=True)
class Measured:
    """What was found. ``lines`` and ``to_json`` are what the files and the screen of ``tools/gate.py`` show."""

    model: str
    suite: Suite
    found: list[Found]

    def lines(self) -> list[str]:
        """JSON of each item, in the order of the suite, with the digest of its probe."""
        return [
            json.dumps(
                {"probe": one.probe.name, "bucket": one.probe.bucket, "digest": self.suite.digests[one.probe.name]}
                | {"id": item.id, "score": item.score, "values": dict(item.values)}
            )
            for one in self.found
            for item in one.items
        ]

    def to_json(self) -> dict:
        """Readings and digests."""
        readings = [reading for one in self.found for reading in one.to_json()]
        names = {"suite": self.suite.name, "digest": self.suite.digest, "digests": self.suite.digests}
        return {"model": self.model, **names, "readings": readings}


def measure_alone(
    model: str,
    suite: str,
    overrides: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured | None:
    """Takes one look at a model with a suite; every rank calls it. What was found, on the main process; None elsewhere.

    Args:
        model: a run, an iter_* folder, an import or an HF folder.
        overrides: ``parallel.*`` and ``precision``.
        progress: told ``(requests answered, requests in all)``.

    Raises InputError for a model or a suite that cannot be read, or do not fit together.
    """
    with scoring_engine(model, overrides) as (engine, folder):
        tokenizer = TextTokenizer.load(folder / HF_FOLDER)
        opened = open_suite(Path(suite), tokenizer, engine.shape.vocab_size, engine.shape.max_positions)
        total, done = sum(len(probe.requests) for probe in opened.probes), 0

        def advance(requests: int) -> None:
            nonlocal done
            done += requests
            progress(done, total)

        found = take_look(engine, opened, advance=advance)
        return Measured(model, opened, found) if engine.mesh.is_main else None


def write_items(path: Path, measured: Measured) -> None:
    """One line an item; the file appears whole. Raises InputError when it cannot be written."""
    building = path.with_name(f".{path.name}.building")
    try:
        building.write_text("".join(line + "\n" for line in measured.lines()))
        building.replace(path)
    except OSError as error:
        building.unlink(missing_ok=True)
        raise InputError("--output", str(path), f"cannot be written ({error.strerror}); name another") from error
