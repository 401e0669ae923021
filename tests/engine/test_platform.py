"""What cannot be is refused before anything is built, with the option to change."""

import pytest

SHAPE = {
    "family": "llama",
    "layers": 12,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 8,
    "vocab_size": 301,
    "max_positions": 128,
    "norm_eps": 1e-5,
    "rope": {"theta": 1e4},
    "tied_embeddings": False,
}
BATCH = ["train.seq_length=128", "train.global_batch_size=8"]


@pytest.mark.parametrize(
    ("world", "overrides", "fields"),
    [
        (1, [], {}),
        (2, ["parallel.tp=2", "parallel.sp=true"], {}),
        (4, ["parallel.pp=2", "parallel.vpp=3", "parallel.cp=2"], {}),
        (4, ["parallel.tp=4"], {"heads": 8}),
        (1, ["core.decoupled_lr=1e-5", "core.recompute_modules=[core_attn, mlp]"], {}),
    ],
)
def test_layouts_that_fit(workers, world, overrides, fields):
    assert workers(1).run("refusal", shape=SHAPE | fields, world=world, overrides=[*BATCH, *overrides]) == [None]


@pytest.mark.parametrize(
    ("world", "overrides", "fields", "sentence"),
    [
        (3, ["parallel.tp=2"], {}, "parallel = 'tp 2 x pp 1 x cp 1 on 3 processes': start a multiple of 2"),
        (2, ["parallel.pp=2"], {"layers": 3}, "parallel.pp = 2: must divide the model's 3 layers"),
        (2, ["parallel.vpp=2"], {}, "parallel.vpp = 2: interleaves pipeline stages: set parallel.pp above 1"),
        (2, ["parallel.pp=2", "parallel.vpp=4"], {}, "parallel.vpp = 4: parallel.pp 2 x vpp must divide"),
        (2, ["parallel.pp=2", "parallel.vpp=2", "train.global_batch_size=9"], {}, "rounds of parallel.pp 2"),
        (2, ["parallel.tp=2"], {"heads": 3, "kv_heads": 3}, "parallel.tp = 2: must divide the model's 3 attention"),
        (3, ["parallel.tp=3"], {"ffn_hidden_size": 81}, "must be a power of two"),
        (4, ["parallel.tp=4"], {"heads": 12, "kv_heads": 3}, "or be a multiple of, the model's 3 key/value heads"),
        (2, ["parallel.tp=2"], {"ffn_hidden_size": 81}, "ffn_hidden_size 81"),
        (2, ["parallel.ep=2"], {}, "parallel.ep = 2: the llama family has no experts"),
        (2, ["train.global_batch_size=7"], {}, "train.global_batch_size = 7: must be a multiple"),
        (1, ["precision=fp8-delayed"], {}, "precision = 'fp8-delayed': needs an NVIDIA GPU with FP8; use bf16"),
        (
            1,
            ["core.tensor_model_parallel_size=2"],
            {},
            "core.tensor_model_parallel_size = 2: is decided by parallel.tp",
        ),
        (1, ["core.calculate_per_token_loss=false"], {}, "is not among core's switches that pass through: align_param"),
        (1, ["core.loss_scale=2.0"], {}, "is not among core's switches"),
        (1, ["core.recompute_granularity=full"], {}, "is decided by train.recompute"),
        (1, ["core.overlap_grad_reduc=true"], {}, "did you mean 'overlap_grad_reduce'?"),
        (1, ["core.decoupled_lr=fast"], {}, "core.decoupled_lr = 'fast': input should be a valid number"),
        (1, ["core.exp_avg_dtype=bf16"], {}, "is of kernels that only a GPU has"),
        (1, ["core.recompute_modules=[1]"], {}, "core.recompute_modules"),
        (2, ["parallel.pp=2", "core.num_layers_in_first_pipeline_stage=12"], {}, "must leave a layer to each other"),
        (1, ["train.seq_length=129"], {}, "the model has 128 positions"),
    ],
)
def test_refused_with_what_to_change(workers, world, overrides, fields, sentence):
    (said,) = workers(1).run("refusal", shape=SHAPE | fields, world=world, overrides=[*BATCH, *overrides])
    assert said is not None and sentence in said
