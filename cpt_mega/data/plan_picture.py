"""A packing plan as a picture: document lengths, row fill, documents a row, attention work."""

import importlib.util
from pathlib import Path

import numpy as np

from cpt_mega.data.packing import RowPlan
from cpt_mega.errors import InputError

BARS = 60


def draw_plan(plan: RowPlan, document_lengths: np.ndarray, path: Path, title: str) -> None:
    """Writes a picture, PNG or SVG by its suffix.

    Raises InputError for another suffix, or when matplotlib is missing.
    """
    if path.suffix not in (".png", ".svg"):
        raise InputError("--picture", str(path), "give a file that ends in .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--picture", str(path), "matplotlib draws it: pip install 'cpt_mega[plots]'")
    from matplotlib.figure import Figure

    found, length = plan.statistics, plan.seq_length
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(
        f"{title}: {found.documents:,} documents in {found.rows:,} rows of {length:,} tokens, {found.fill:.3%} full"
    )
    lengths_of_documents, fill, a_row, work = figure.subplots(2, 2).flat

    lengths = document_lengths[document_lengths > 0]
    edges = np.geomspace(1, max(int(lengths.max(initial=1)), length) + 1, BARS)
    lengths_of_documents.hist(lengths, edges)
    lengths_of_documents.axvline(
        length, color="black", linestyle="--", label=f"a row; {found.split_documents:,} are longer"
    )
    lengths_of_documents.set(xscale="log", xlabel="tokens of a document", ylabel="documents")
    lengths_of_documents.legend()

    padding = length - plan.row_tokens
    fill.hist(
        padding, np.arange(0, max(int(padding.max(initial=0)), 1) + 2, max(1, int(padding.max(initial=0)) // BARS))
    )
    fill.set(yscale="log", xlabel="tokens of a row that are padding", ylabel="rows")
    fill.set_title(f"{found.padding:,} tokens in all", fontsize="medium")

    counts = np.diff(plan.row_offsets)
    a_row.hist(counts, np.arange(1, found.most_documents + 2, max(1, found.most_documents // BARS)) - 0.5)
    a_row.set(yscale="log", xlabel="documents of a row", ylabel="rows")
    words = f"{found.documents_a_row:.1f} on average, 99 % at most {found.documents_a_row_p99}, {found.most_documents} in one"
    a_row.set_title(words, fontsize="medium")

    squares = plan.attention_work if plan.rows else np.ones(1)
    relative = squares / squares.mean()
    work.hist(relative, BARS)
    work.set(yscale="log", xlabel="attention work of a row, over the mean", ylabel="rows")
    work.set_title(f"99 % at most {np.percentile(relative, 99):.2f}", fontsize="medium")
    figure.savefig(path)
