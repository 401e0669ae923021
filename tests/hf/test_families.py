"""config.json is understood field by field or refused by name; the tables of tensors are proved."""

import json

import pytest

from cpt_mega.errors import InputError
from cpt_mega.hf.config_reader import with_both_spellings
from cpt_mega.hf.families import FAMILIES, read_shape, tensor_map
from cpt_mega.hf.rope import RopeShape
from cpt_mega.hf.shape import ModelShape
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


YARN = {"factor": 4.0, "beta_fast": 16.0, "attention_factor": 1.2, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family):
    """Many fields are left out of a real config.json where they have their default."""
    from transformers import AutoConfig

    config = CONFIG | {"model_type": family, "num_attention_heads": 32}
    config |= {} if family in ("llama", "mistral", "phi3") else {"num_key_value_heads": 4}
    theirs = AutoConfig.for_model(family, **{k: v for k, v in config.items() if k != "model_type"})
    shape = read_shape(config)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (shape.kv_heads, shape.head_dim) == (theirs.num_key_value_heads, head_dim)
    without_eps = read_shape({key: value for key, value in config.items() if key != "rms_norm_eps"})
    assert without_eps.norm_eps == type(theirs)().rms_norm_eps
    assert (shape.tied_embeddings, shape.sliding_window) == (theirs.tie_word_embeddings, _window(theirs))
    assert (shape.rope.theta, shape.rope.type) == (theirs.rope_parameters["rope_theta"], "default")
    assert ModelShape.from_json(shape.to_json()) == shape


def _window(config) -> int | None:
    types = getattr(config, "layer_types", None)
    return None if types and "sliding_attention" not in types else getattr(config, "sliding_window", None)


def test_a_model_file_from_before_a_switch_existed_is_read():
    shape = read_shape(CONFIG)
    older = {key: value for key, value in shape.to_json().items() if key not in ("qk_norm", "sliding_window")}
    assert ModelShape.from_json(older) == shape
    with pytest.raises(InputError, match="heads"):
        ModelShape.from_json({key: value for key, value in older.items() if key != "heads"})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5e5}, RopeShape(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeShape(5e5)),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}, RopeShape(1e4, "linear", {"factor": 2})),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, RopeShape(5e5, "llama3", LLAMA3)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}, RopeShape(5e5, "llama3", LLAMA3)),
        ({"rope_scaling": {"rope_type": "yarn", **YARN}}, RopeShape(1e4, "yarn", YARN)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, RopeShape(1e4, "dynamic", {"factor": 2.0})),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5}, RopeShape(1e4, partial=0.5)),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
            RopeShape(1e4, partial=0.5),
        ),
    ],
)
def test_rope_in_either_spelling(fields, expected):
    shape = read_shape(CONFIG | fields)
    assert shape.rope == expected
    both = with_both_spellings(CONFIG | fields, shape.rope, "bfloat16")
    assert read_shape(both) == shape and both.items() >= {**CONFIG, **fields}.items()
    assert read_shape({k: v for k, v in both.items() if k != "rope_parameters"}) == shape
    fourth = ("rope_theta", "rope_scaling", "partial_rotary_factor")
    assert read_shape({k: v for k, v in both.items() if k not in fourth}) == shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type = 'gpt_neox'.*llama, mistral, phi3, qwen2, qwen3"),
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
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type.*'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "low": 1.0}}, "factor.*low"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, "positive"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate = 1"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "only default exist"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn'"),
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


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_windows(family):
    config = CONFIG | {"model_type": family, "num_key_value_heads": 2, "sliding_window": 4096, "max_window_layers": 1}
    assert read_shape(config).sliding_window is None
    assert read_shape(config | {"max_window_layers": 2, "use_sliding_window": True}).sliding_window is None
    on = read_shape(config | {"use_sliding_window": True})
    assert (on.sliding_window, on.full_attention_layers) == (4096, (0,))
    named = read_shape(config | {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]})
    assert (named.sliding_window, named.full_attention_layers) == (4096, (1,))
    assert ModelShape.from_json(json.loads(json.dumps(named.to_json()))) == named
    with pytest.raises(InputError, match="layer_types"):
        read_shape(config | {"layer_types": ["full_attention", "sliding_attention"]})
    with pytest.raises(InputError, match="layer_types"):
        read_shape(config | {"use_sliding_window": True, "layer_types": ["full_attention", "chunked_attention"]})


def test_a_window_left_out_and_a_null_window_differ():
    config = CONFIG | {"model_type": "mistral", "num_key_value_heads": 2}
    assert read_shape(config).sliding_window == 4096
    assert read_shape(config | {"sliding_window": None}).sliding_window is None
    with pytest.raises(InputError, match="sliding_window = 0"):
        read_shape(config | {"sliding_window": 0})


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


def test_a_published_phi3_config_is_read():
    """As it lies in its repository: with the names of Python files that an old transformers would have run."""
    config = CONFIG | {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "original_max_position_embeddings": 4096,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
    }
    assert read_shape(config).sliding_window == 2047
