"""Reference values beside an import: part of its seal, of its own weights, and refused in one line when they cannot be."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from cpt_mega.checkpoint.verification import verify
from cpt_mega.errors import CheckpointError, InputError
from cpt_mega.hf.convert import export_hf, import_hf
from cpt_mega.hf.model_info import read_model_info
from cpt_mega.hf.reference import PARITY_FILE, make_reference, read_reference, write_reference
from cpt_mega.lineage import seal_folder
from tests.helpers.models import tiny_llama, tiny_qwen2

TEXTS = (np.arange(1, 20), np.array([5, 300]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An HF folder ``hf`` and its import, with values."""
    folder = tmp_path_factory.mktemp("reference")
    tiny_llama(folder / "hf")
    import_hf(folder / "hf", folder / "import")
    write_reference(folder / "import", make_reference(folder / "import", folder / "hf", TEXTS))
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made / "import", tmp_path / "import")
    return tmp_path / "import"


def _read(folder):
    return read_reference(folder, read_model_info(folder))


def test_what_is_read_is_what_transformers_computes(made):
    found = _read(made / "import")
    model = AutoModelForCausalLM.from_pretrained(made / "hf", dtype=torch.float32).eval()
    start = 0
    for text, kept in zip(TEXTS, found.texts, strict=True):
        assert np.array_equal(text, kept)
        with torch.no_grad():
            out = model(torch.from_numpy(text)[None], output_hidden_states=True)
        expected = out.logits[0].log_softmax(-1)[range(len(text) - 1), text[1:]].numpy()
        here = slice(start, start + len(text) - 1)
        assert np.abs(found.logprobs[here] - expected).max() < 1e-5
        states = [state[0, :-1].numpy() @ found.projection for state in out.hidden_states]
        for stage, place in zip(
            states, (0, 1, 2, 4), strict=True
        ):  # transformers gives the last one after the norm alone
            assert np.allclose(found.hidden[place, here], stage, atol=1e-4)
        start += len(text) - 1
    assert found.header.precision == "fp32" and found.header.versions["torch"] == torch.__version__


def test_both_kinds_of_attention_agree(made):
    eager, sdpa = (make_reference(made / "import", made / "hf", TEXTS, kind) for kind in ("eager", "sdpa"))
    assert np.abs(eager.logprobs - sdpa.logprobs).max() < 1e-5
    assert (eager.header.attention, sdpa.header.attention) == ("eager", "sdpa")


def test_an_import_with_values_is_whole_and_exports_as_before(made, copy, tmp_path):
    sealed = json.loads((copy / "manifest.json").read_text())["files"]
    for _ in range(5):  # the same bytes each time
        write_reference(copy, _read(copy))
    assert json.loads((copy / "manifest.json").read_text())["files"] == sealed and PARITY_FILE in sealed
    assert verify(copy).is_good
    export_hf(copy, tmp_path / "out")
    assert not (tmp_path / "out" / PARITY_FILE).exists()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (made / "hf" / "model.safetensors").read_bytes()


def test_an_import_without_values_has_none(copy, made):
    shutil.copytree(made / "import", bare := copy.with_name("bare"))
    (bare / PARITY_FILE).unlink()
    seal_folder(bare)
    assert _read(bare) is None
    shutil.copyfile(copy / PARITY_FILE, bare / PARITY_FILE)  # not in the seal: whose it is cannot be known
    assert _read(bare) is None


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def _rewritten(change):
    def rewrite(path):
        with safe_open(path, framework="numpy") as file:
            header = file.metadata()
        tensors = load_file(path)
        change(tensors, header)
        save_file(tensors, path, header)

    return rewrite


def _without_hidden(tensors, header):
    del tensors["hidden"]


BROKEN = {
    "cannot be read": _truncated,
    "its format is 2, this version reads 1": _rewritten(lambda t, h: h.update(reference='{"format": 2, "new": []}')),
    "its format is None": _rewritten(lambda t, h: h.clear()),
    "cannot be read (dictionary update": _rewritten(lambda t, h: h.update(reference='["format"]')),
    "attention is missing": _rewritten(lambda t, h: h.update(reference='{"format": 1, "base_digest": ""}')),
    "cannot be read (File does not contain tensor hidden": _rewritten(_without_hidden),
    "a token id is outside": _rewritten(lambda t, h: t["tokens"].fill(301)),
    "lengths of texts do not fit": _rewritten(lambda t, h: t["lengths"].fill(3)),
    "tokens are no list of whole numbers": _rewritten(lambda t, h: t.update(tokens=t["tokens"].astype(np.float32))),
    "logprobs must be finite float64 numbers [19]": _rewritten(lambda t, h: t["logprobs"].fill(np.nan)),
    "hidden must be finite float32 numbers [5, 19, 32]": _rewritten(
        lambda t, h: t.update(hidden=t["hidden"][1:].copy())
    ),
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_file_that_cannot_be_used_is_one_line(copy, words):
    BROKEN[words](copy / PARITY_FILE)
    seal_folder(copy)
    with pytest.raises(CheckpointError) as caught:
        _read(copy)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert f"make them again with python tools/check_parity.py {copy}" in str(caught.value)


def test_values_of_other_weights_are_never_compared(copy):
    info = read_model_info(copy)
    with pytest.raises(CheckpointError, match="holds values of other weights"):
        read_reference(copy, replace(info, base_digest="0" * 64))


def test_only_the_folder_that_was_imported_will_do(made, copy, tmp_path):
    tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="does not hold the very weight files"):
        make_reference(copy, tmp_path / "other", TEXTS)
    shutil.copytree(made / "hf", edited := tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(InputError, match=r"has another config\.json"):
        make_reference(copy, edited, TEXTS)


def test_an_import_that_cannot_be_written_to_stays_as_it_was(made, copy, monkeypatch):
    def full(tensors, path, header):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    reference, before = _read(copy), sorted(copy.iterdir())
    monkeypatch.setattr("cpt_mega.hf.reference.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        write_reference(copy, reference)
    assert sorted(copy.iterdir()) == before and verify(copy).is_good


def test_bf16_weights_are_widened(tmp_path):
    tiny_qwen2(tmp_path / "hf", dtype=torch.bfloat16)
    import_hf(tmp_path / "hf", tmp_path / "import")
    reference = make_reference(tmp_path / "import", tmp_path / "hf", TEXTS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    embedded = model.get_input_embeddings().weight.detach()[TEXTS[1][:1]].numpy()
    assert np.allclose(reference.hidden[0, -1:], embedded @ reference.projection, atol=1e-6)
