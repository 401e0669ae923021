"""Conversion there and back: bit-exact tensors, every config field, any layout; and every refusal by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpt_mega.errors import CheckpointError, InputError
from cpt_mega.hf.convert import export_hf, import_hf
from cpt_mega.hf.model_info import copy_model_files, read_model_info
from cpt_mega.hf.tensor_map import Block, Run, Target
from cpt_mega.hf.torch_dist import FORMAT, read_index, write_blocks
from cpt_mega.lineage import COMPLETE, damaged_files, seal_folder, sealed_files
from tests.helpers.models import MODELS, tiny_llama, tiny_qwen2, tiny_qwen3

# How tensors are stored: dtypes, shards, tokenizers beside them. MODELS has one of each family and arrangement.
STORED = {
    "llama-bf16-tied": (tiny_llama, {"dtype": torch.bfloat16, "tie_word_embeddings": True}),
    "llama-shards": (tiny_llama, {"max_shard_size": "60KB"}),
    "llama-fp16": (tiny_llama, {"head_dim": 12, "dtype": torch.float16}),
    "llama-vocab-128": (tiny_llama, {"vocab_size": 256}),
    "qwen2-bf16-shards": (tiny_qwen2, {"dtype": torch.bfloat16, "max_shard_size": "40KB"}),
    "qwen2-tied-tokenizer": (tiny_qwen2, {"tie_word_embeddings": True, "tokenizer": True}),
    "qwen3-tied-shards": (tiny_qwen3, {"tie_word_embeddings": True, "max_shard_size": "40KB"}),
}


def tensors_of(folder) -> dict:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits_of(folder) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(40)[None] * 7 % 256).logits


def assert_same_tensors(one, other) -> None:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", [*MODELS, *STORED])
def test_round_trip(tmp_path, name):
    make, options = (MODELS | STORED)[name]
    source = make(tmp_path / "hf", **options)
    imported = import_hf(source, tmp_path / "ckpt")
    exported = export_hf(tmp_path / "ckpt", tmp_path / "out")
    assert_same_tensors(source, tmp_path / "out")
    assert imported.tensors == exported.tensors == len(tensors_of(source))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert {key: after[key] for key in before} == before
    assert {"rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype"} <= after.keys()
    for path in source.iterdir():
        if path.name != "config.json" and "safetensors" not in path.name:
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert torch.equal(logits_of(source), logits_of(tmp_path / "out"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama and its import; tests copy before they change anything."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(folder / "hf", tokenizer=True, max_shard_size="100KB")
    import_hf(folder / "hf", folder / "ckpt")
    return folder


def test_checkpoint_has_core_layout(llama):
    index = {key: tuple(entry.size) for key, entry in read_index(llama / "ckpt").items()}
    assert index == {
        "embedding.word_embeddings.weight": (384, 48),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (3, 48),
        "decoder.layers.self_attention.linear_qkv.weight": (3, 80, 48),
        "decoder.layers.self_attention.linear_proj.weight": (3, 48, 48),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (3, 48),
        "decoder.layers.mlp.linear_fc1.weight": (3, 160, 48),
        "decoder.layers.mlp.linear_fc2.weight": (3, 48, 80),
        "decoder.final_layernorm.weight": (48,),
        "output_layer.weight": (384, 48),
    }
    assert json.loads((llama / "ckpt" / "metadata.json").read_text()) == FORMAT
    assert not damaged_files(llama / "ckpt", sealed_files(llama / "ckpt"))


def test_tensors_stand_where_core_expects(llama):
    import torch.distributed.checkpoint as dcp

    hf, index = tensors_of(llama / "hf"), read_index(llama / "ckpt")
    core = {key: torch.full(entry.size, torch.nan) for key, entry in index.items()}
    dcp.load(core, storage_reader=dcp.FileSystemReader(llama / "ckpt"), no_dist=True)
    q, k, v = (hf[f"model.layers.1.self_attn.{part}_proj.weight"].view(2, -1, 8, 48) for part in "qkv")
    expected = torch.cat([q, k, v], dim=1).view(80, 48)  # per group: its query heads, its key, its value
    assert torch.equal(core["decoder.layers.self_attention.linear_qkv.weight"][1], expected)
    gate_up = torch.cat([hf[f"model.layers.2.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(core["decoder.layers.mlp.linear_fc1.weight"][2], gate_up)
    for key, name in (("embedding.word_embeddings", "model.embed_tokens"), ("output_layer", "lm_head")):
        assert torch.equal(core[f"{key}.weight"][:301], hf[f"{name}.weight"])
        assert not core[f"{key}.weight"][301:].any()


def test_model_info(llama):
    info = read_model_info(llama / "ckpt")
    assert (info.dtype, info.shape.family, info.shape.padded_vocab_size) == ("float32", "llama", 384)
    assert info.tokenizer_digest and info.base_digest and info.source == str(llama / "hf")


def resharded(llama, folder, dtype=torch.float32):
    """The import as a trainer would save it: cut by rows and by columns, several layers a chunk, optimizer beside."""
    import torch.distributed.checkpoint as dcp

    core = {key: torch.empty(entry.size) for key, entry in read_index(llama / "ckpt").items()}
    dcp.load(core, storage_reader=dcp.FileSystemReader(llama / "ckpt"), no_dist=True)
    core = {key: tensor.to(dtype) for key, tensor in core.items()}
    core["optimizer.state.exp_avg.output_layer.weight"] = torch.ones(384, 48, dtype=dtype)
    pieces = [(key, piece) for key, tensor in core.items() for piece in chunks_of(tensor)]
    by_place = {(key, offsets): piece for key, (offsets, piece) in pieces}
    blocks = [_Chunk(key, offsets, tuple(piece.shape), tuple(core[key].shape)) for key, (offsets, piece) in pieces]
    folder.mkdir()
    write_blocks(folder, blocks, dtype, lambda block: by_place[block.target.key, block.offsets].clone())
    copy_model_files(llama / "ckpt", folder)
    seal_folder(folder)
    return folder


class _Chunk:
    """What ``write_blocks`` asks of a Block, for a chunk cut along any axis."""

    def __init__(self, key, offsets, shape, global_shape):
        self.target, self.offsets, self.shape = Target(key, (), global_shape), offsets, shape
        self.elements = torch.Size(shape).numel()


def chunks_of(tensor):
    """(offsets, chunk): halves along the last axis, and for stacked tensors a first layer apart from the others."""
    width = tensor.shape[-1] // 2
    for start in (0, width):
        half = tensor[..., start : start + width]
        tail = (0,) * (tensor.dim() - 2) + (start,) if tensor.dim() > 1 else ()
        if tensor.dim() == 1:
            yield (start,), half
        else:
            yield (0, *tail), half[:1]
            yield (1, *tail), half[1:]


def test_export_of_any_chunking(llama, tmp_path):
    report = export_hf(resharded(llama, tmp_path / "iter_0000003"), tmp_path / "out", max_shard_bytes=50_000)
    assert_same_tensors(llama / "hf", tmp_path / "out")
    assert report.ignored == 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes
    assert sorted(set(index["weight_map"].values())) == report.files and len(report.files) > 3


def test_dtype_follows_the_tensors(llama, tmp_path):
    export_hf(resharded(llama, tmp_path / "ckpt", torch.bfloat16), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    export_hf(llama / "ckpt", tmp_path / "half", dtype="bfloat16")
    assert_same_tensors(tmp_path / "half", tmp_path / "out")
    with pytest.raises(InputError, match="dtype"):
        export_hf(llama / "ckpt", tmp_path / "wrong", dtype="int8")


def test_float16_overflow_is_refused(llama, tmp_path):
    hf = change(llama, tmp_path, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    import_hf(hf, tmp_path / "ckpt")
    with pytest.raises(InputError, match="cannot represent"):
        export_hf(tmp_path / "ckpt", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def change(llama, tmp_path, edit, **config):
    """A copy of the model as one file, after ``edit(tensors)`` and with config fields set (None: taken out)."""
    folder = tmp_path / "changed"
    folder.mkdir()
    tensors = tensors_of(llama / "hf")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = {**json.loads((llama / "hf" / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return folder


EDITS = {
    "missing": (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "model.layers.2.mlp.up_proj.weight.*missing"),
    "extra": (lambda t: t.update({"score.weight": torch.ones(2, 48)}), "score.weight.*no place"),
    "misshapen": (lambda t: t.update({"lm_head.weight": torch.ones(300, 48)}), r"lm_head.*\[300, 48\].*\[301, 48\]"),
    "transposed": (lambda t: t.update({"model.norm.weight": torch.ones(48, 1)}), r"model.norm.weight.*\[48, 1\]"),
    "mixed dtypes": (lambda t: t.update({"model.norm.weight": torch.ones(48).half()}), "model.norm.weight.*F16"),
    "integers": (lambda t: [t.update({n: t[n].int()}) for n in list(t)], "I32.*supported dtypes"),
}


@pytest.mark.parametrize("name", EDITS)
def test_refused_tensors(llama, tmp_path, name):
    edit, message = EDITS[name]
    with pytest.raises(InputError, match=message):
        import_hf(change(llama, tmp_path, edit), tmp_path / "ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"]


def test_tied_copy_of_the_embedding(llama, tmp_path):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    hf = change(llama, tmp_path, tie, tie_word_embeddings=True)
    report = import_hf(hf, tmp_path / "ckpt")
    assert report.dropped.keys() == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    shutil.rmtree(hf)
    with pytest.raises(InputError, match="lm_head.weight.*differs"):
        import_hf(change(llama, tmp_path, lambda tensors: None, tie_word_embeddings=True), tmp_path / "other")


def test_refused_folders(llama, tmp_path):
    with pytest.raises(InputError, match=r"config.json.*cannot be read"):
        import_hf(tmp_path, tmp_path / "ckpt")
    shutil.copy(llama / "hf" / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"holds neither model.safetensors"):
        import_hf(tmp_path, tmp_path / "ckpt")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"cannot be read as safetensors"):
        import_hf(tmp_path, tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="not empty"):
        import_hf(llama / "hf", llama / "ckpt")
    with pytest.raises(CheckpointError, match="not empty"):
        export_hf(llama / "ckpt", llama / "hf")


def test_index_must_agree_with_its_files(llama, tmp_path):
    shutil.copytree(llama / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "lm_head.weight": "../x.safetensors"}}))
    with pytest.raises(InputError, match="same folder"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt")
    name = "model.norm.weight"  # shares its file with others
    path.write_text(json.dumps({"weight_map": {n: f for n, f in index["weight_map"].items() if n != name}}))
    with pytest.raises(InputError, match=f"{name}.*not listed"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt")


def damaged_copy(llama, tmp_path, name, position=-100):
    shutil.copytree(llama / "ckpt", tmp_path / "ckpt")
    content = bytearray((tmp_path / "ckpt" / name).read_bytes())
    content[position] ^= 1
    (tmp_path / "ckpt" / name).write_bytes(content)
    return tmp_path / "ckpt"


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "hf/tokenizer.json", "model.json"])
def test_one_flipped_bit_is_refused(llama, tmp_path, name):
    position = 100_000 if name.endswith("distcp") else -100
    with pytest.raises(CheckpointError, match="damaged|cannot be read"):
        export_hf(damaged_copy(llama, tmp_path, name, position), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_checkpoints(llama, tmp_path):
    with pytest.raises(CheckpointError, match="import it first"):
        export_hf(llama / "hf", tmp_path / "out")
    shutil.copytree(llama / "ckpt", tmp_path / "ckpt")
    (tmp_path / "ckpt" / COMPLETE).unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        export_hf(tmp_path / "ckpt", tmp_path / "out")


def test_interruption_leaves_nothing(llama, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_hf(llama / "hf", tmp_path / "ckpt", progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_hf(llama / "ckpt", tmp_path / "out", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_the_same_model_is_the_same_bytes(llama, tmp_path):
    for convert, source in ((import_hf, "hf"), (export_hf, "ckpt")):
        found = []
        for name in ("a", "b"):
            convert(llama / source, tmp_path / source / name)
            files = [path for path in (tmp_path / source / name).rglob("*") if path.is_file()]
            found.append({path.relative_to(tmp_path / source / name): path.read_bytes() for path in files})
        assert found[0] == found[1]


def test_progress_reaches_the_total(llama, tmp_path):
    for convert, source in ((import_hf, "hf"), (export_hf, "ckpt")):
        seen = []
        convert(llama / source, tmp_path / source, progress=lambda *now, seen=seen: seen.append(now))
        assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_blocks_are_cut_by_rows():
    block = Block(Target("k", (2,), (10, 4)), (1,), 0, 10, (Run("a", 0, 0, 3), Run("b", 5, 3, 5)))
    parts = list(block.cut(16))
    assert [(part.rows, part.offsets) for part in parts] == [(4, (1, 0, 0)), (4, (1, 4, 0)), (2, (1, 8, 0))]
    assert parts[0].runs == (Run("a", 0, 0, 3), Run("b", 5, 3, 1)) and parts[1].runs == (Run("b", 6, 4, 4),)
    assert parts[2].runs == ()
