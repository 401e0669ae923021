"""The scorer against transformers, and documents against each other, at every layout."""

import json
import math

import pytest
import torch

from cpt_mega.hf.convert import import_hf
from tests.helpers.models import MODELS, tiny_llama
from tests.helpers.workers import JobFailed

LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["parallel.tp=2"]),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, []),
    "pp2_vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "cp2": (2, ["parallel.cp=2"]),
    "tp4": (4, ["parallel.tp=4", "parallel.sp=true"]),
    "tp2_sp_pp2": (4, ["parallel.tp=2", "parallel.sp=true", "parallel.pp=2"]),
    "tp2_sp_cp2": (4, ["parallel.tp=2", "parallel.sp=true", "parallel.cp=2"]),
    "pp2_vpp2_cp2": (4, ["parallel.pp=2", "parallel.vpp=2", "parallel.cp=2"]),
}
ROWS = [
    {"id": "three", "ids": [(i * 37 + 11) % 301 for i in range(50)], "doc_lengths": [20, 21, 9]},
    {"id": "one", "ids": [(i * 53 + 7) % 301 for i in range(29)]},
    {"id": "short", "ids": [5, 300, 6], "doc_lengths": [1, 2]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """``model(name)``: (HF folder, import, reference log-probabilities of all next tokens by row and document)."""
    made = {}

    def get(name: str):
        if name not in made:
            build, overrides = MODELS[name]
            folder = tmp_path_factory.mktemp(name)
            build(folder / "hf", **{"num_hidden_layers": 4, **overrides})
            import_hf(folder / "hf", folder / "import")
            made[name] = (folder / "hf", folder / "import", _reference(folder / "hf"))
        return made[name]

    return get


def _reference(folder) -> list[list[torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for row in ROWS:
        parts = torch.tensor(row["ids"]).split(row.get("doc_lengths", [len(row["ids"])]))
        with torch.no_grad():
            found.append([model(part[None]).logits[0].float().log_softmax(-1) for part in parts])
    return found


def _scores(workers, tmp_path, layout: str, checkpoint, rows=ROWS, extra=("precision=fp32",)) -> list[dict]:
    world, overrides = LAYOUTS[layout]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"source": str(tmp_path / "rows.jsonl"), "target": str(tmp_path / "scores.jsonl")}
    workers(world).run("score", checkpoint=str(checkpoint), **paths, overrides=[*overrides, *extra])
    return [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]


# The rest is the long matrix: four processes on two cores are slow.
# Stages divide every family alike, but for embeddings that two of them share.
QUICK = {name: ("tp1", "tp2_sp", *(["pp2"] if "tied" in name else [])) for name in MODELS} | {
    "llama": tuple(LAYOUTS),
    "llama_eight_heads": ("tp4",),
    "qwen3": ("tp1", "tp2", "tp2_sp", "pp2", "tp2_sp_pp2"),
    "mistral": ("tp1", "tp2_sp", "pp2_vpp2", "cp2"),
}


def _pairs():
    for name, (_, fields) in MODELS.items():
        heads = fields.get("num_attention_heads", 6)
        for layout, (_, overrides) in LAYOUTS.items():
            tp = next((int(o[-1]) for o in overrides if o.startswith("parallel.tp=")), 1)
            if heads % tp == 0:  # refused otherwise, see test_platform
                yield pytest.param(name, layout, marks=_marks(name, layout))


def _marks(name: str, layout: str) -> list:
    marks = [] if layout in QUICK[name] else [pytest.mark.full]
    return marks + [pytest.mark.versions] if layout == "tp2_sp" or name == "llama" else marks


@pytest.mark.parametrize(("name", "layout"), list(_pairs()))
def test_logprobs_equal_transformers(model, workers, tmp_path, name, layout):
    _, checkpoint, reference = model(name)
    scores = _scores(workers, tmp_path, layout, checkpoint)
    assert [score["id"] for score in scores] == [row["id"] for row in ROWS]
    for row, score, documents in zip(ROWS, scores, reference, strict=True):
        assert len(score["logprobs"]) == len(score["top"]) == len(row["ids"])
        start = 0
        for document in documents:
            ids = row["ids"][start : start + len(document)]
            expected = [document[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
            found = score["logprobs"][start : start + len(ids)]
            assert found[0] is None
            assert found[1:] == pytest.approx(expected, abs=1e-4)
            best = document.topk(5)
            for i, top in enumerate(score["top"][start : start + len(ids)]):
                assert [v for _, v in top] == pytest.approx(best.values[i].tolist(), abs=1e-4)
                assert [document[i, t].item() for t, _ in top] == pytest.approx([v for _, v in top], abs=1e-4)
            start += len(ids)


_SOME = ("tp1", "dp2", "pp2_vpp2", "tp2_sp_cp2")  # each kind of division is in one of them
SIX_HEADS = [
    pytest.param(layout, marks=() if layout in _SOME else pytest.mark.full) for layout in LAYOUTS if layout != "tp4"
]


@pytest.mark.parametrize("layout", SIX_HEADS)
def test_changing_one_document_changes_no_other_bit(model, workers, tmp_path, layout):
    _, checkpoint, _ = model("llama")
    row = ROWS[0]
    changed = {**row, "ids": [(x + 100) % 301 for x in row["ids"][:20]] + row["ids"][20:]}
    (before,) = _scores(workers, tmp_path, layout, checkpoint, [row])
    (after,) = _scores(workers, tmp_path, layout, checkpoint, [changed])
    assert before["logprobs"][20:] == after["logprobs"][20:]
    assert before["top"][20:] == after["top"][20:]
    assert before["logprobs"][1:20] != after["logprobs"][1:20]


@pytest.mark.parametrize("layout", SIX_HEADS)
def test_bf16_scores_are_near_fp32(model, workers, tmp_path, layout):
    _, checkpoint, _ = model("qwen2")
    exact = _scores(workers, tmp_path, layout, checkpoint)
    rough = _scores(workers, tmp_path, layout, checkpoint, extra=("precision=bf16",))
    pairs = [
        (a, b)
        for x, y in zip(exact, rough, strict=True)
        for a, b in zip(x["logprobs"], y["logprobs"], strict=True)
        if a is not None
    ]
    assert max(abs(a - b) for a, b in pairs) < 0.5
    assert any(a != b for a, b in pairs)


def test_padded_vocabulary_is_not_in_the_softmax(model, workers, tmp_path):
    """With five tokens in all, the five likeliest have the whole probability: padding (123 rows) has none."""
    folder = tmp_path / "five"
    tiny_llama(folder / "hf", vocab_size=5, num_hidden_layers=2, bos_token_id=1, eos_token_id=2)
    import_hf(folder / "hf", folder / "import")
    for layout in ("tp1", "tp2_sp"):
        (score,) = _scores(workers, tmp_path, layout, folder / "import", [{"id": 1, "ids": [0, 1, 2, 3, 4]}])
        for top in score["top"]:
            assert math.fsum(math.exp(value) for _, value in top) == pytest.approx(1.0, abs=1e-6)
            assert sorted(token for token, _ in top) == [0, 1, 2, 3, 4]


def test_an_hf_folder_is_scored_like_its_import(model, workers, tmp_path):
    hf, checkpoint, _ = model("llama")
    assert _scores(workers, tmp_path, "tp2_sp", hf) == _scores(workers, tmp_path, "tp2_sp", checkpoint)


def test_the_host_leaves_transformers_alone(model, workers):
    hf, _, reference = model("llama")
    (logits,) = workers(1).run("transformers_logits", folder=str(hf), ids=ROWS[1]["ids"])
    assert torch.allclose(torch.tensor(logits).log_softmax(-1), reference[1][0], atol=1e-5)


def test_a_document_beyond_the_models_positions_is_refused(model, workers, tmp_path):
    """Rope types that change with length would be wrong there, and said nothing."""
    _, checkpoint, _ = model("llama_dynamic_rope")
    with pytest.raises(JobFailed, match="rows.jsonl:1 doc_lengths = 129: the model has 128 positions"):
        _scores(workers, tmp_path, "tp1", checkpoint, [{"id": 1, "ids": [1] * 129}])
    assert (
        len(_scores(workers, tmp_path, "tp1", checkpoint, [{"id": 1, "ids": [1] * 129, "doc_lengths": [128, 1]}])) == 1
    )
