"""One step and a few: losses, gradients and updates against transformers, and the same numbers under every layout."""

import itertools
import shutil

import numpy as np
import pytest
import torch

from cpt_mega.hf.convert import import_hf
from tests.helpers.jobsite import SEQ_LENGTH, checkpoint_tensors, metrics, write_documents
from tests.helpers.models import tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3
from tests.helpers.workers import JobFailed

# (processes, overrides). micro-batches differ on purpose: rows hold unequal numbers of real targets.
LAYOUTS = {
    "one": (1, []),
    "one_accumulating": (1, ["train.micro_batch_size=1"]),
    "tp2": (2, ["parallel.tp=2"]),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "pp2": (2, ["parallel.pp=2", "train.micro_batch_size=1"]),
    "dp2": (2, ["train.micro_batch_size=1"]),
    "dp2_replicated_optimizer": (2, ["train.distributed_optimizer=false"]),
    "tp2_sp_pp2": (4, ["parallel.tp=2", "parallel.sp=true", "parallel.pp=2", "train.micro_batch_size=1"]),
    "tp2_dp2": (4, ["parallel.tp=2", "train.micro_batch_size=1"]),
    "pp2_dp2": (4, ["parallel.pp=2", "train.micro_batch_size=1"]),
    "pp2_vpp2": (2, ["parallel.pp=2", "parallel.vpp=2", "train.micro_batch_size=1"]),
    "tp2_sp_pp2_vpp2": (
        4,
        ["parallel.tp=2", "parallel.sp=true", "parallel.pp=2", "parallel.vpp=2", "train.micro_batch_size=1"],
    ),
    "cp2": (2, ["parallel.cp=2"]),
    "tp2_sp_cp2": (4, ["parallel.tp=2", "parallel.sp=true", "parallel.cp=2"]),
    "pp2_cp2": (4, ["parallel.pp=2", "parallel.cp=2", "train.micro_batch_size=1"]),
    "cp4": (4, ["parallel.cp=4"]),
    "cp2_dp2": (4, ["parallel.cp=2", "train.micro_batch_size=1"]),
}
# The rest is the long matrix: four processes on two cores are slow.
QUICK = {
    "llama": ("one", "dp2", "dp2_replicated_optimizer", "tp2_sp", "pp2_vpp2", "cp2", "tp2_sp_pp2_vpp2"),
    # Where these have something of their own: biases and an embedding that stages share, norms whose gradients
    # tensor-parallel ranks share, windows over parts of a row.
    "qwen2_tied": ("tp2_sp", "pp2"),
    "qwen3": ("tp2_sp",),
    "mistral": ("one",),
}
LONG = {
    "llama": tuple(LAYOUTS),
    "qwen2_tied": tuple(LAYOUTS),
    "qwen3": ("tp2", "tp2_sp", "pp2_vpp2"),
    "mistral": ("one", "cp2"),
}
UNDER_EVERY_CORE = ("one", "dp2", "dp2_replicated_optimizer", "tp2_sp", "pp2_vpp2", "cp2", "tp2_sp_pp2_vpp2")
STEPS = 3


class Site:
    """A model and a corpus that is one global batch; runs are trained once and kept for every test that asks."""

    def __init__(self, folder, build, tied: bool, workers):
        self.folder, self.workers, self.documents = folder, workers, _one_batch_of_documents()
        build(folder / "hf", num_hidden_layers=4, tie_word_embeddings=tied)
        import_hf(folder / "hf", folder / "import")
        write_documents(folder / "corpus", self.documents)
        tokens = sum(map(len, self.documents))
        (folder / "train.yaml").write_text(
            f"run: {{dir: {folder}/run}}\nmodel: {{checkpoint: {folder}/import}}\nprecision: fp32\n"
            f"train: {{tokens: {STEPS * tokens}, seq_length: {SEQ_LENGTH}, global_batch_size: 8, micro_batch_size: 2}}\n"
            "optimizer: {lr: 1.0e-3, clip_norm: 1.0}\nschedule: {kind: constant, warmup_tokens: 0}\n"
            f"data: {{sources: [{{name: all, path: {folder}/corpus, role: domain}}]}}\n"
            f"checkpoint: {{interval_tokens: {tokens}}}\nlogging: {{tensorboard: false}}\n"
        )
        self._runs = {}
        self._tries = itertools.count()

    @property
    def config(self) -> str:
        return str(self.folder / "train.yaml")

    def run(self, layout: str, *more: str):
        """The run folder of ``STEPS`` steps under a layout, with a checkpoint after each."""
        key = (layout, *more)
        if key not in self._runs:
            world, overrides = LAYOUTS[layout]
            run = self.folder / f"run{next(self._tries)}"  # one that failed leaves its folder
            outcomes = self.workers(world).run(
                "train", config=self.config, overrides=[f"run.dir={run}", *overrides, *more]
            )
            assert [state for state, _ in outcomes] == ["finished"] * world
            self._runs[key] = run
        return self._runs[key]

    def steps(self, layout: str, *more: str) -> list[dict]:
        return metrics(self.run(layout, *more), "train")

    def tensors(self, layout: str, step: int, *more: str) -> dict:
        return checkpoint_tensors(self.run(layout, *more) / "checkpoints" / f"iter_{step:07d}")


@pytest.fixture(scope="module")
def llama(tmp_path_factory, workers):
    return Site(tmp_path_factory.mktemp("llama"), tiny_llama, False, workers)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory, workers):
    return Site(tmp_path_factory.mktemp("qwen3"), tiny_qwen3, False, workers)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory, workers):
    return Site(tmp_path_factory.mktemp("mistral"), tiny_mistral, False, workers)


@pytest.fixture(scope="module")
def qwen2_tied(tmp_path_factory, workers):
    return Site(tmp_path_factory.mktemp("qwen2_tied"), tiny_qwen2, True, workers)


def _enumerated():
    for model, quick in QUICK.items():
        for layout in LONG.get(model, quick):
            marks = [] if layout in quick else [pytest.mark.full]
            if model == "llama" and layout in UNDER_EVERY_CORE:
                marks.append(pytest.mark.versions)
            yield pytest.param(model, layout, marks=marks)


every_layout = pytest.mark.parametrize(("model", "layout"), list(_enumerated()))


def _one_batch_of_documents() -> list[list[int]]:
    """Documents that fill exactly eight rows, some with padding, some with one document and some with many."""
    lengths = [32, 31, 30, 2, 20, 12, 9, 9, 9, 25, 3, 3, 28, 5, 5, 5, 5, 17]
    draw = np.random.default_rng(3)
    return [[*draw.integers(1, 301, length - 1).tolist(), 0] for length in lengths]


def _reference(folder, documents) -> tuple[float, float]:
    """Loss and gradient norm by transformers and autograd alone: the mean over all targets of all documents."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    total, targets = 0.0, 0
    for document in documents:
        ids = torch.tensor([document])
        logits = model(ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        targets += len(document) - 1
    (total / targets).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return (total / targets).item(), norm.item()


@every_layout
def test_loss_and_gradient_are_the_mean_over_real_targets(request, model, layout):
    site = request.getfixturevalue(model)
    loss, norm = _reference(site.folder, site.documents)
    first = site.steps(layout)[0]
    assert first["loss"] == pytest.approx(loss, rel=1e-6)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)


@every_layout
def test_every_gradient_is_that_of_one_process(request, model, layout):
    """Adam's first moment after the first step is a tenth of the clipped gradient, tensor by tensor."""
    site = request.getfixturevalue(model)
    one, other = site.tensors("one", 1), site.tensors(layout, 1)
    moments = {name for name in one if ".exp_avg." in name}
    assert moments == {name for name in other if ".exp_avg." in name} and len(moments) >= 8
    for name in moments:
        assert (one[name] - other[name]).norm() <= 2e-5 * one[name].norm(), name


@every_layout
def test_steps_are_those_of_one_process(request, model, layout):
    site = request.getfixturevalue(model)
    one, run = site.steps("one"), site.steps(layout)
    assert [line["tokens"] for line in run] == [line["tokens"] for line in one]
    assert [line["loss"] for line in run] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["grad_norm"] for line in run] == pytest.approx([line["grad_norm"] for line in one], rel=1e-3)


def test_pipelines_compute_the_very_bits_of_one_process(llama):
    """Without clipping: the global norm is summed in another order, so its last bit may differ."""
    losses = [[x["loss"] for x in llama.steps(name, "optimizer.clip_norm=0")] for name in ("pp2", "one_accumulating")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2_sp", marks=pytest.mark.full), "pp2", "dp2"])
def test_bf16_trains_near_fp32_with_fp32_master_weights(llama, layout):
    exact, rough = llama.steps("one"), llama.steps(layout, "precision=bf16")
    assert [x["loss"] for x in rough] == pytest.approx([x["loss"] for x in exact], rel=2e-2)
    tensors = llama.tensors(layout, STEPS, "precision=bf16")
    weights = tensors["decoder.layers.mlp.linear_fc2.weight"]
    master = tensors["optimizer.state.param.decoder.layers.mlp.linear_fc2.weight"]
    assert (weights.dtype, master.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(master.bfloat16().flatten(), weights.flatten())
    assert not torch.equal(master.bfloat16().float(), master)


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        ("tp2_sp", "selective"),
        ("pp2_vpp2", "full"),
        ("cp2", "full"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (("tp2_sp", "full"), ("pp2_vpp2", "selective"), ("cp2", "selective"))
        ),
    ],
)
def test_recomputing_activations_changes_no_bit(llama, recompute, layout):
    plain, again = llama.steps(layout), llama.steps(layout, f"train.recompute={recompute}")
    assert [(x["loss"], x["grad_norm"]) for x in again] == [(x["loss"], x["grad_norm"]) for x in plain]


@pytest.mark.parametrize("model", ["llama", "qwen2_tied"])
def test_padding_rows_of_the_vocabulary_stay_zero(request, model):
    tensors = request.getfixturevalue(model).tensors("tp2_sp", STEPS)
    names = [name for name in ("embedding.word_embeddings.weight", "output_layer.weight") if name in tensors]
    assert len(names) == (2 if model == "llama" else 1)
    for name in names:
        assert tensors[name].shape[0] == 384
        assert tensors[name][:301].abs().max(dim=1).values.min() > 0
        assert not tensors[name][301:].any()


@pytest.mark.parametrize(
    "layout", ["one", pytest.param("tp2_sp", marks=pytest.mark.full), pytest.param("pp2", marks=pytest.mark.full)]
)
def test_norms_and_biases_do_not_decay(qwen2_tied, layout):
    """One step with and without weight decay: what moves apart is what decays."""
    free, decayed = (qwen2_tied.tensors(layout, 1, f"optimizer.weight_decay={rate}") for rate in (0.0, 0.9))
    weights = {name for name in free if not name.startswith("optimizer.") and free[name].is_floating_point()}
    spared = {name for name in weights if torch.equal(free[name], decayed[name])}
    assert spared == {name for name in weights if name.endswith(("layernorm.weight", "layer_norm_weight", ".bias"))}
    assert any(name.endswith("linear_qkv.bias") for name in spared) and len(weights - spared) == 5


def test_clipping_scales_the_gradient_to_the_norm(llama):
    norm = llama.steps("one", "optimizer.clip_norm=0.01")[0]["grad_norm"]
    free = llama.tensors("one", 1, "optimizer.clip_norm=0")
    clipped = llama.tensors("one", 1, "optimizer.clip_norm=0.01")
    assert norm > 0.1  # the norm is that before clipping
    for name in (name for name in free if ".exp_avg." in name):
        assert torch.allclose(clipped[name] * (norm / 0.01), free[name], rtol=1e-3, atol=1e-9), name


@pytest.mark.parametrize("layout", ["dp2", pytest.param("pp2_vpp2", marks=pytest.mark.full)])
def test_overlapping_communication_changes_no_bit(llama, layout):
    """core's gradient reduction during the backward pass and parameter gathering during the forward pass.

    In many small buckets, most of them padded: core itself saves the optimizer's state of such buckets shifted.
    """
    switches = ("core.overlap_grad_reduce=true", "core.overlap_param_gather=true", "core.bucket_size=3000")
    words = "optimizer.clip_norm=0"  # other buckets, other shards: the global norm would be summed in another order
    plain, overlapped = llama.tensors(layout, STEPS, words), llama.tensors(layout, STEPS, words, *switches)
    assert plain.keys() == overlapped.keys()
    assert all(torch.equal(tensor, overlapped[name]) for name, tensor in plain.items())


def test_embedding_and_output_may_have_their_own_rate(llama):
    """core.decoupled_lr: with the rate of everything else at (nearly) zero, only they move."""
    words = ("optimizer.lr=1e-12", "optimizer.weight_decay=0")
    still, decoupled = llama.tensors("dp2", 1, *words), llama.tensors("dp2", 1, *words, "core.decoupled_lr=1e-2")
    moved = {
        name for name in still if not name.startswith("optimizer.") and not torch.equal(still[name], decoupled[name])
    }
    assert moved == {"embedding.word_embeddings.weight", "output_layer.weight"}


def test_stages_may_have_different_numbers_of_layers(llama):
    """core.num_layers_in_first_pipeline_stage: one layer and three; the very bits of two and two."""
    words = "optimizer.clip_norm=0"  # the global norm would be summed in another order
    uneven = llama.steps("pp2", words, "core.num_layers_in_first_pipeline_stage=1")
    assert [line["loss"] for line in uneven] == [line["loss"] for line in llama.steps("pp2", words)]


def test_what_core_itself_refuses_is_an_error_of_the_option(llama, workers):
    with pytest.raises(JobFailed) as failure:
        words = [f"run.dir={llama.folder}/refused", "train.recompute=selective", "core.recompute_modules=[nothing]"]
        workers(1).run("train", config=llama.config, overrides=words)
    assert failure.value.kind == "InputError" and "core refuses it" in str(failure.value)


@pytest.mark.parametrize("layout", [pytest.param("tp2_sp", marks=pytest.mark.full), "cp2"])
def test_rows_of_a_length_that_tensor_parallelism_does_not_divide(llama, layout):
    """Sequence parallelism and context parallelism fill the row up; the numbers are those of one process."""
    one, filled = (llama.steps(name, "train.seq_length=31") for name in ("one", layout))
    assert [x["loss"] for x in filled] == pytest.approx([x["loss"] for x in one], rel=1e-5)


def test_a_folder_of_a_newer_core_is_refused_with_the_reason(llama, workers, tmp_path):
    """Only a core that keeps plain values in common.pt meets it: a newer one reads both."""
    written = llama.run("one") / "checkpoints" / "iter_0000001"
    if not (written / "common.pt").exists():  # this core is a newer one
        workers(1).run("load_folder", config=llama.config, folder=str(written))
        return
    shutil.copytree(written, tmp_path / "newer")
    (tmp_path / "newer" / "common.pt").unlink()
    with pytest.raises(JobFailed) as failure:
        workers(1).run("load_folder", config=llama.config, folder=str(tmp_path / "newer"))
    assert failure.value.kind == "CheckpointError" and "newer megatron-core" in str(failure.value)
