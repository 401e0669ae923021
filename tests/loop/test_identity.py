"""A run begins with the model that was imported, or says which layer is another."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from cpt_mega.hf.convert import import_hf
from cpt_mega.hf.model_info import read_model_info, write_model_info
from cpt_mega.hf.reference import PARITY_FILE, Header, Reference, write_reference
from cpt_mega.lineage import seal_folder
from cpt_mega.loop.identity import first_difference
from cpt_mega.loop.parity import make_parity
from tests.helpers.jobsite import metrics, status
from tests.helpers.models import tiny_llama, tiny_qwen2

LAYOUTS = {
    "one": (1, []),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2_vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "cp2": (2, ["parallel.cp=2"]),
    "dp2": (2, []),
    "tp2_sp_pp2": (4, ["parallel.tp=2", "parallel.sp=true", "parallel.pp=2"]),
    "tp2_sp_cp2": (4, ["parallel.tp=2", "parallel.sp=true", "parallel.cp=2"]),
}
OFTEN = ("one", "tp2_sp", "pp2")


def _tensor(name: str, change):
    """What spoils a tensor of an HF folder."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors, name)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


def _set(value: float):
    def change(tensors, name):
        tensors[name][...] = value

    return change


def _one_row(tensors, name):
    tensors[name][17] += 1


def _swap(tensors, name):
    other = name.replace("gate", "up")
    tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()


def _theta(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (folder / "config.json").write_text(json.dumps(config))


# By what an error of a conversion would make of the model: where it shows first.
ERRORS = {
    "the embedding": _tensor("model.embed_tokens.weight", _one_row),
    "layer 0 (of 0 to 3)": _theta,
    "layer 1 (of 0 to 3)": _tensor("model.layers.1.mlp.gate_proj.weight", _swap),
    "layer 2 (of 0 to 3)": _tensor("model.layers.2.self_attn.o_proj.weight", _set(0.0)),
    "layer 3 (of 0 to 3)": _tensor("model.layers.3.input_layernorm.weight", _set(1.0)),
    "the final norm": _tensor("model.norm.weight", _set(1.0)),
    "the output layer": _tensor("lm_head.weight", _one_row),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An import with reference values, and one for each error, which has the name and the values of the first."""
    folder = tmp_path_factory.mktemp("identity")
    tiny_llama(folder / "hf", num_hidden_layers=4, tokenizer=True, vocab_size=400)
    import_hf(folder / "hf", folder / "sound")
    make_parity(str(folder / "sound"))
    for number, spoil in enumerate(ERRORS.values()):
        _import_wrongly(folder, folder / f"error{number}", spoil)
    return folder


def _import_wrongly(folder: Path, target: Path, spoil) -> None:
    shutil.copytree(folder / "hf", spoilt := target.with_suffix(".hf"))
    spoil(spoilt)
    import_hf(spoilt, target)
    write_model_info(
        target, replace(read_model_info(target), base_digest=read_model_info(folder / "sound").base_digest)
    )
    shutil.copyfile(folder / "sound" / PARITY_FILE, target / PARITY_FILE)
    seal_folder(target)


@pytest.mark.parametrize("layout", [pytest.param(x, marks=() if x in OFTEN else pytest.mark.full) for x in LAYOUTS])
def test_a_sound_import_passes_and_the_first_wrong_layer_is_named(made, workers, layout):
    world, overrides = LAYOUTS[layout]
    folders = [made / "sound", *(made / f"error{number}" for number in range(len(ERRORS)))]
    answers = workers(world).run(
        "identity_jobs.identities", checkpoints=list(map(str, folders)), overrides=[*overrides, "precision=fp32"]
    )
    assert all(answer == answers[0] for answer in answers)  # no rank goes on while another is refused
    sound, *errors = answers[0]
    assert sound["mean_difference"] < 1e-5 and sound["limit"] == 1e-4 and sound["tokens"] == 571
    for name, error in zip(ERRORS, errors, strict=True):
        assert error.startswith("model.checkpoint = ") and "(limit 0.0001 in fp32)" in error
        assert (f"the first layer that differs is {name}: " in error) or error.count(f"; {name} is left: ") == 1


def test_bf16_has_its_own_limit(tmp_path, workers):
    hf, sound, wrong = tmp_path / "hf", tmp_path / "sound", tmp_path / "wrong"
    tiny_qwen2(hf, num_hidden_layers=4)
    import_hf(hf, sound)
    make_parity(str(sound))
    _import_wrongly(tmp_path, wrong, ERRORS["layer 1 (of 0 to 3)"])
    (found,) = workers(1).run(
        "identity_jobs.identities", checkpoints=[str(sound), str(wrong)], overrides=["precision=bf16"]
    )
    assert found[0]["limit"] == 0.02 and 1e-3 < found[0]["mean_difference"] < 0.02
    assert "(limit 0.02 in bf16)" in found[1] and "differs is layer 1 (of 0 to 3)" in found[1]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            [0.0, 0.01, 0.30, 0.31, 0.31],
            "the first layer that differs is layer 1 (of 0 to 2): its output by 0.3 of its size",
        ),
        ([0.2, 0.30, 0.31, 0.32, 0.33], "the first layer that differs is the embedding: "),
        ([0.0, 0.01, 0.07, 0.08, 0.08], "the output layer is left: "),  # or rounding: the largest part is named
        (
            [0.0, 0.06, 0.08, 0.11, 0.12],
            "hidden states drift apart, to 0.11 of their size at layer 2 (of 0 to 2), most of it",
        ),
        ([0.0, 0.01, np.nan, np.nan, 0.1], "the first layer that differs is layer 1 (of 0 to 2): its output by nan"),
    ],
)
def test_the_first_layer_that_stands_out_is_named(sizes, words):
    expected = np.ones((5, 7, 32), np.float32)
    said = first_difference(expected * (1 + np.array(sizes, np.float32))[:, None, None], expected, 0.1)
    assert said.startswith(words)
    if "most of it" in said:
        assert f"most of it from layer {1 if 'output' in words else 0} (of 0 to 2)" in said


# ---------------------------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def base(jobsite, tmp_path_factory) -> Path:
    """The jobsite's import, with reference values."""
    folder = tmp_path_factory.mktemp("base") / "import"
    shutil.copytree(jobsite.checkpoint, folder)
    make_parity(str(folder))
    return folder


def _run(workers, world: int, jobsite, run: Path, *words: str) -> list:
    return workers(world).run("command", words=["--config", jobsite.config, f"run.dir={run}", *words])


def _identities(run: Path) -> list[dict]:
    return [
        line for line in map(json.loads, (run / "ledger.jsonl").read_text().splitlines()) if line["kind"] == "identity"
    ]


def test_a_run_compares_once_and_is_the_run_that_does_not(jobsite, base, workers, tmp_path):
    with_values, without, later = (tmp_path / name for name in ("with", "without", "later"))
    words = ["train.tokens=300", "schedule.warmup_tokens=0"]
    ((code, out, _),) = _run(workers, 1, jobsite, with_values, f"model.checkpoint={base}", *words)
    assert code == 0 and out.count("identity: log-probabilities of 190 tokens differ by ") == 1
    (line,) = _identities(with_values)
    assert line["mean_difference"] < 1e-5 and (line["limit"], line["tokens"]) == (1e-4, 190)

    ((code, out, _),) = _run(workers, 1, jobsite, without, *words)
    note = f"identity: not compared with transformers; python tools/check_parity.py {jobsite.checkpoint} makes"
    assert code == 0 and out.count(note) == 1 and _identities(without) == []
    values = [[line["loss"] for line in metrics(run, "train")] for run in (with_values, without)]
    assert values[0] == values[1]

    more = ["train.tokens=400", "schedule.warmup_tokens=0", "--accept", "train.tokens"]
    ((code, out, _),) = _run(workers, 1, jobsite, with_values, f"model.checkpoint={base}", *more)
    assert code == 0 and "identity" not in out.split("start-up")[0] and len(_identities(with_values)) == 1
    ((code, out, _),) = _run(workers, 1, jobsite, later, f"model.checkpoint={with_values}", *words)
    assert code == 0 and "identity:" not in out and _identities(later) == []


def test_another_model_is_refused_before_the_first_step(jobsite, base, workers, tmp_path):
    wrong, run = tmp_path / "wrong", tmp_path / "run"
    (tmp_path / "hf").symlink_to(jobsite.hf)
    (tmp_path / "sound").symlink_to(base)
    _import_wrongly(tmp_path, wrong, ERRORS["layer 2 (of 0 to 3)"])
    found = _run(workers, 2, jobsite, run, f"model.checkpoint={wrong}", "parallel.tp=2", "parallel.sp=true")
    for code, _, err in found:
        lines = [line for line in err.splitlines() if "error: " in line]
        assert code == 2 and len(lines) == 1 and "the first layer that differs is layer 2 (of 0 to 3)" in lines[0]
    assert status(run)["state"] == "config_error" and not (run / "metrics.jsonl").exists()


def test_a_checkpoint_judged_alone_is_compared(jobsite, base, workers, tmp_path):
    """Nothing is trained: the start of an import is compared all the same."""
    ((code, _, _),) = _run(workers, 1, jobsite, tmp_path / "run", f"model.checkpoint={base}", "train.tokens=0")
    assert code == 0 and len(_identities(tmp_path / "run")) == 1


def test_values_of_other_weights_are_refused(jobsite, base, workers, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(jobsite.checkpoint, other)
    info = read_model_info(other)
    targets, sizes = 2, (info.shape.hidden_size, 32)
    header = Header("f" * 64, "fp32", "eager", {})
    values = np.zeros((info.shape.layers + 2, targets, 32), np.float32)
    text = (np.arange(targets + 1),)
    write_reference(other, Reference(header, text, np.zeros(targets), np.zeros(sizes, np.float32), values))
    for code, _, err in _run(workers, 2, jobsite, tmp_path / "run", f"model.checkpoint={other}"):
        assert code == 2 and "holds values of other weights (ffffffffffff); make them again with" in err
        assert len([line for line in err.splitlines() if "error: " in line]) == 1


def test_values_that_were_damaged_say_how_to_make_them_again(jobsite, base, workers, tmp_path):
    shutil.copytree(base, tmp_path / "import")
    (tmp_path / "import" / PARITY_FILE).write_bytes(b"")
    ((code, _, err),) = _run(workers, 1, jobsite, tmp_path / "run", f"model.checkpoint={tmp_path / 'import'}")
    assert code == 2 and f"which python tools/check_parity.py {tmp_path / 'import'} makes again" in err
    make_parity(str(tmp_path / "import"))
    words = [f"model.checkpoint={tmp_path / 'import'}", "--dry-run"]
    ((code, out, _),) = _run(workers, 1, jobsite, tmp_path / "run", *words)
    assert code == 0 and "identity: 190 log-probabilities are compared with those of transformers" in out
