"""config.json is understood field by field or refused by name; the tables of tensors are proved."""

import pytest

from cpt_mega.errors import InputError
from cpt_mega.hf.config_reader import with_both_spellings
from cpt_mega.hf.families import FAMILIES, read_shape, tensor_map
from cpt_mega.hf.shape import ModelShape, RopeShape
from cpt_mega.hf.tensor_map import Direct, StackedLayers, TensorMap

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def test_defaults_are_those_of_transformers():
    shape = read_shape(CONFIG)
    assert (shape.kv_heads, shape.head_dim, shape.tied_embeddings) == (4, 16, False)
    assert shape.rope == RopeShape(10000.0) and ModelShape.from_json(shape.to_json()) == shape


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5e5}, RopeShape(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeShape(5e5)),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}, RopeShape(1e4, "linear", {"factor": 2})),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, RopeShape(5e5, "llama3", LLAMA3)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}, RopeShape(5e5, "llama3", LLAMA3)),
    ],
)
def test_rope_in_either_spelling(fields, expected):
    shape = read_shape(CONFIG | fields)
    assert shape.rope == expected
    both = with_both_spellings(CONFIG | fields, shape.rope, "bfloat16")
    assert read_shape(both) == shape and both.items() >= {**CONFIG, **fields}.items()
    assert read_shape({k: v for k, v in both.items() if k != "rope_parameters"}) == shape
    assert read_shape({k: v for k, v in both.items() if k not in ("rope_theta", "rope_scaling")}) == shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type = 'gpt_neox'.*llama, qwen2"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"softcap": 30.0}, "softcap"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "positive"),
        ({"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "contradicts"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "contradicts",
        ),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(InputError, match=message):
        read_shape(CONFIG | fields)


def test_qwen2_windows():
    config = CONFIG | {"model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 1}
    assert read_shape(config | {"use_sliding_window": False}).qkv_bias
    with pytest.raises(InputError, match="use_sliding_window"):
        read_shape(config | {"use_sliding_window": True})
    with pytest.raises(InputError, match="layer_types"):
        read_shape(config | {"layer_types": ["full_attention", "sliding_attention"]})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2), (7, 7)])
def test_tables_use_every_row_once(family, tied, heads, kv_heads):
    config = CONFIG | {"model_type": family, "tie_word_embeddings": tied, "head_dim": 24}
    mapped = tensor_map(read_shape(config | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}))
    assert mapped.padding_elements == 28 * 64 * (1 if tied else 2)


def test_a_wrong_table_is_refused():
    with pytest.raises(ValueError, match="two rules"):
        TensorMap([Direct("a", "x", (4,)), Direct("b", "x", (4,))])
    with pytest.raises(ValueError, match="two rules"):
        TensorMap([Direct("a", "x", (4,)), Direct("a", "y", (4,))])
    with pytest.raises(ValueError, match="two rules"):  # a name without {layer} would be used in each
        TensorMap([StackedLayers("a", 2, {"x": (4,)}), Direct("b", "x", (4,))])
    with pytest.raises(ValueError, match="rows 0 to 4 used twice"):
        TensorMap([StackedLayers("a", 2, {"x": (4,)})])
