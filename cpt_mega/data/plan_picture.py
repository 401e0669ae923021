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

    found = plan.statistics
    figure = Figure(figsize=(11, 7), layout="constrained")
    rows = f"{found.rows:,} rows of {plan.seq_length:,} tokens, {found.fill:.3%} full"
    figure.suptitle(f"{title}: {found.documents:,} documents in {rows}")
    lengths, padding, documents, work = figure.subplots(2, 2).flat
    _draw_lengths(lengths, plan, document_lengths[document_lengths > 0])
    _draw_counts(padding, plan.seq_length - plan.row_tokens, "tokens of a row that are padding")
    padding.set_title(f"{found.padding:,} tokens in all", fontsize="medium")
    _draw_counts(documents, np.diff(plan.row_offsets), "documents of a row")
    spread = f"99 % at most {found.documents_a_row_p99}, {found.most_documents} in one"
    documents.set_title(f"{found.documents_a_row:.1f} on average, {spread}", fontsize="medium")
    _draw_work(work, plan.attention_work)
    figure.savefig(path)


def _draw_lengths(axes, plan: RowPlan, lengths: np.ndarray) -> None:
    longest = max(int(lengths.max(initial=1)), plan.seq_length)
    axes.hist(lengths, np.geomspace(1, longest + 1, BARS))
    label = f"a row; longer: {np.count_nonzero(lengths > plan.seq_length):,}"
    axes.axvline(plan.seq_length, color="black", linestyle="--", label=label)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents")
    axes.legend()


def _draw_counts(axes, counts: np.ndarray, label: str) -> None:
    """Rows by a whole number; bars stand around whole numbers."""
    most = int(counts.max(initial=0))
    axes.hist(counts, np.arange(0, most + 2 + most // BARS, max(1, most // BARS)) - 0.5)
    axes.set(yscale="log", xlabel=label, ylabel="rows")


def _draw_work(axes, work: np.ndarray) -> None:
    """Rows by attention work [rows] over its mean."""
    relative = work / work.mean() if work.size else np.ones(1)
    axes.hist(relative, BARS)
    axes.set(yscale="log", xlabel="attention work of a row, over the mean", ylabel="rows")
    axes.set_title(f"99 % at most {np.percentile(relative, 99):.2f}", fontsize="medium")
