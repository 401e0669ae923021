"""Documents that share a row know nothing of each other, forwards (``test_parity``) and backwards, under every layout.

Every document has token ids of its own, and a loss mask lets one document count. The gradient of the embedding then shows
whose embeddings that document's loss reached; the loss and the whole gradient are those of the document run alone.
"""

import numpy as np
import pytest
import torch

from cpt_mega.data.indexed import IndexedCorpus, mask_path
from cpt_mega.data.packing import plan_rows
from cpt_mega.hf.convert import import_hf
from tests.engine.test_training import LAYOUTS
from tests.helpers.jobsite import SEQ_LENGTH, checkpoint_tensors, metrics, write_documents
from tests.helpers.models import tiny_llama

LENGTHS = (32, 20, 9, 3, 14, 13, 15, 12, 8, 7, 15, 30, 2, 11, 10, 9, 2, 25)
OWN_IDS = 16
ONE = 5  # the document that counts: neither the first nor the last of its row
QUICK = ("one", "tp2_sp", "pp2_vpp2", "dp2", "cp2")
EMBEDDING = "embedding.word_embeddings.weight"


def own_ids(document: int) -> np.ndarray:
    return np.arange(OWN_IDS) + 1 + OWN_IDS * document


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leaks")
    tiny_llama(folder / "hf", num_hidden_layers=4)
    import_hf(folder / "hf", folder / "import")
    draw = np.random.default_rng(0)
    documents = [draw.choice(own_ids(index), length).tolist() for index, length in enumerate(LENGTHS)]
    write_documents(folder / "corpus", documents)
    mask = [np.full(length, index == ONE, np.uint8) for index, length in enumerate(LENGTHS)]
    mask_path(folder / "corpus").write_bytes(np.concatenate(mask).tobytes())
    (folder / "train.yaml").write_text(
        f"run: {{dir: {folder}/run}}\nmodel: {{checkpoint: {folder}/import}}\nprecision: fp32\n"
        f"train: {{tokens: {LENGTHS[ONE]}, seq_length: {SEQ_LENGTH}, global_batch_size: 8, micro_batch_size: 2}}\n"
        "optimizer: {lr: 1.0e-3, clip_norm: 0}\nschedule: {kind: constant, warmup_tokens: 0}\n"
        f"data: {{sources: [{{name: all, path: {folder}/corpus, role: domain}}]}}\nlogging: {{tensorboard: false}}\n"
    )
    return folder, documents


@pytest.fixture(scope="module")
def alone(site):
    """Loss and embedding gradient of the one document in a batch of its own, by transformers."""
    from transformers import AutoModelForCausalLM

    folder, documents = site
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    ids = torch.tensor([documents[ONE]])
    loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    loss.backward()
    return loss.item(), model.get_input_embeddings().weight.grad


def test_the_rows_are_shared(site):
    """What the other tests stand on: eight rows by best fit, and the document that counts stands between others."""
    corpus = IndexedCorpus(site[0] / "corpus")
    plan = plan_rows(corpus.document_lengths, SEQ_LENGTH)
    (row,) = [pieces for pieces in map(plan.pieces, range(plan.rows)) if ONE in [piece[0] for piece in pieces]]
    assert plan.rows == 8 and [piece[0] for piece in row].index(ONE) not in (0, len(row) - 1)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full]) for name in LAYOUTS]
)
def test_a_documents_loss_reaches_no_other_document(site, alone, workers, tmp_path, layout):
    folder, documents = site
    world, overrides = LAYOUTS[layout]
    overrides = [f"run.dir={tmp_path}/run", *overrides]
    workers(world).run("train", config=str(folder / "train.yaml"), overrides=overrides)
    (step,) = metrics(tmp_path / "run", "train")
    loss, gradient = alone
    assert step["loss"] == pytest.approx(loss, abs=1e-5)

    tensors = checkpoint_tensors(tmp_path / "run" / "checkpoints" / "iter_0000001")
    (moment,) = [tensor for name, tensor in tensors.items() if ".exp_avg." in name and name.endswith(EMBEDDING)]
    found = moment[: len(gradient)] * 10  # Adam's first moment after one step is a tenth of the gradient
    for index in range(len(documents)):
        if index != ONE:
            assert not found[own_ids(index)].any(), f"document {index} is reached"
    used = sorted(set(documents[ONE][:-1]))  # the last token has no target
    assert found[used].abs().sum(dim=1).min() > 0
    assert (found - gradient).norm() <= 1e-5 * gradient.norm()
