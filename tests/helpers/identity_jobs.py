"""What worker processes do for tests of identity at the start; arguments and results are JSON."""

from cpt_mega.checkpoint.restore import WEIGHTS, Start
from cpt_mega.errors import InputError
from cpt_mega.hf.model_info import read_model_info
from cpt_mega.loop.identity import check_identity, reference_values
from cpt_mega.loop.scoring import scorer


def identities(checkpoints: list[str], overrides: list[str]) -> list[dict | str]:
    """Of each import its line in the ledger, or what it is refused for, at one layout."""
    found = []
    with scorer(overrides) as opening:
        for checkpoint in checkpoints:
            engine, folder = opening.engine(checkpoint)
            start = Start(WEIGHTS, folder, [])
            try:
                reference = reference_values(opening.mesh, start, read_model_info(folder))
                found.append(check_identity(engine, start, reference, 32).to_json())
            except InputError as error:
                found.append(str(error))
    return found
