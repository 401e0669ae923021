"""State saved at one layout and loaded at another: every weight, master weight and moment is the same, bit for bit."""

import itertools

import pytest
import torch

from cpt_mega.hf.convert import import_hf
from tests.helpers.jobsite import checkpoint_tensors
from tests.helpers.models import tiny_llama

LAYOUTS = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "pp2_vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "tp2_sp_pp2": (4, ["parallel.tp=2", "parallel.sp=true", "parallel.pp=2"]),
    "tp4": (4, ["parallel.tp=4"]),
    "tp2_dp2": (4, ["parallel.tp=2"]),
}
KINDS = {
    "fp32": ["precision=fp32"],
    "bf16": ["precision=bf16"],
    "fp32_replicated": ["precision=fp32", "train.distributed_optimizer=false"],
    "bf16_replicated": ["precision=bf16", "train.distributed_optimizer=false"],
    # core itself saves the optimizer's state of padded buckets shifted
    "bf16_odd_buckets": ["precision=bf16", "core.overlap_grad_reduce=true", "core.bucket_size=3000"],
}
QUICK = [
    ("tp2_sp", "dp2", "bf16"),
    ("dp2", "tp2_sp", "bf16_odd_buckets"),
    ("dp2", "pp2", "bf16_replicated"),
]
LONG = [
    ("pp2_vpp2", "one", "fp32"),
    *(("tp2_sp", to, "bf16") for to in ("one", "pp2", "pp2_vpp2")),
    *(("tp2_sp", "dp2", kind) for kind in ("fp32", "fp32_replicated")),
    ("pp2_vpp2", "tp2_sp", "fp32"),
    *itertools.product(["tp2_sp_pp2"], ["dp2", "pp2", "tp4", "tp2_dp2", "one"], KINDS),
    *itertools.product(["tp4", "dp2", "pp2"], ["tp2_sp_pp2"], KINDS),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An import that four tensor-parallel ranks can share."""
    folder = tmp_path_factory.mktemp("eight_heads")
    fields = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
    tiny_llama(folder / "hf", vocab_size=301, initializer_range=0.02, **fields)
    import_hf(folder / "hf", folder / "import")
    return f"model.checkpoint={folder / 'import'}"


@pytest.fixture(scope="module")
def trained(workers, jobsite, model, tmp_path_factory):
    """A checkpoint of two steps, by layout and kind."""
    made = {}

    def train(layout, kind):
        if (layout, kind) not in made:
            run, (world, overrides) = tmp_path_factory.mktemp("trained") / "run", LAYOUTS[layout]
            words = [f"run.dir={run}", model, "train.tokens=330", "eval.sets=[]", *overrides, *KINDS[kind]]
            workers(world).run("train", config=jobsite.config, overrides=words)
            made[layout, kind] = max((run / "checkpoints").glob("iter_*"))
        return made[layout, kind]

    return train


@pytest.mark.parametrize(
    ("saved", "loaded", "kind"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.full) for case in LONG)]
)
def test_what_is_loaded_at_another_layout_and_saved_there_is_the_same(
    workers, jobsite, model, trained, tmp_path, saved, loaded, kind
):
    source = trained(saved, kind)
    before, folder = checkpoint_tensors(source), source
    for place, layout in (("there", loaded), ("back", saved)):
        world, overrides = LAYOUTS[layout]
        words = [f"run.dir={tmp_path / place}", model, *overrides, *KINDS[kind], "train.seed=99"]
        folder = workers(world).run("load_and_save", config=jobsite.config, overrides=words, source=str(folder))[0]
        after = checkpoint_tensors(folder)
        assert after.keys() == before.keys() and any(".exp_avg_sq." in name for name in after)
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), (place, name)
    assert all(tensor.any() for name, tensor in before.items() if ".exp_avg_sq." in name)  # not of zeros
