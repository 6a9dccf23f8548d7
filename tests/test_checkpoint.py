"""checkpoint.py: each fault of configs, headers and shards; reading by slice; links out of them."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import (
    INT8_WEIGHTS,
    Checkpoint,
    ModelConfig,
    SafetensorsFile,
    atomic_write,
    check_shapes,
    check_writable,
    tensor_names,
)
from quantize import quantize_checkpoint

INDEX = "model.safetensors.index.json"


def edit_json(path: Path, edit) -> None:
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


# ---- config.json

def test_both_rope_spellings_read_alike(tiny_checkpoint):
    directory = tiny_checkpoint(llama3_rope=True)
    new = json.loads((directory / "config.json").read_text())
    rope = new.pop("rope_parameters")
    theta, dtype = rope.pop("rope_theta"), new.pop("dtype")
    old = new | {"rope_theta": theta, "rope_scaling": rope, "torch_dtype": dtype}
    first = ModelConfig.from_checkpoint(directory)
    (directory / "config.json").write_text(json.dumps(old))
    assert ModelConfig.from_checkpoint(directory) == first
    assert first.rope_scaling.factor > 1


def test_every_field_is_read_from_its_key():
    raw = {"model_type": "llama", "vocab_size": 11, "hidden_size": 12, "intermediate_size": 13,
           "num_hidden_layers": 14, "num_attention_heads": 6, "num_key_value_heads": 3,
           "head_dim": 8, "rms_norm_eps": 1e-3, "max_position_embeddings": 99, "rope_theta": 5e5,
           "tie_word_embeddings": True, "torch_dtype": "float16", "eos_token_id": [1, 2]}
    assert ModelConfig.from_dict(raw) == ModelConfig(
        vocab_size=11, hidden_size=12, intermediate_size=13, num_layers=14, num_heads=6,
        num_kv_heads=3, head_dim=8, rms_norm_eps=1e-3, max_position_embeddings=99, rope_theta=5e5,
        tie_word_embeddings=True, dtype=torch.float16, eos_token_ids=(1, 2))
    for key in ("num_key_value_heads", "head_dim", "torch_dtype"):
        del raw[key]
    config = ModelConfig.from_dict(raw)
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (6, 2, torch.float32)


def test_stop_tokens_come_from_generation_config_first(tiny_checkpoint):
    directory = tiny_checkpoint()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert ModelConfig.from_checkpoint(directory).eos_token_ids == (3, 5)
    (directory / "generation_config.json").write_text(json.dumps({}))
    edit_json(directory / "config.json", lambda raw: raw.update(eos_token_id=7))
    assert ModelConfig.from_checkpoint(directory).eos_token_ids == (7,)


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "expected 'llama'"),
    ({"hidden_size": None}, "hidden_size = None"),
    ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    ({"attention_bias": True}, "attention_bias"), ({"hidden_act": "gelu"}, "'gelu'"),
    ({"num_key_value_heads": 3}, "key-value heads"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
    ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
])
def test_config_errors(tiny_checkpoint, changes, message):
    directory = tiny_checkpoint()
    edit_json(directory / "config.json", lambda raw: raw.update(changes))
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_checkpoint(directory)


@pytest.mark.parametrize(("changes", "message"), [
    ({"intermediate_size": 192}, r"expected \[192, 64\] by config.json"),
    ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2"),
])
def test_weights_that_contradict_the_config(tiny_checkpoint, changes, message):
    from model import Transformer

    directory = tiny_checkpoint()
    edit_json(directory / "config.json", lambda raw: raw.update(changes))
    with pytest.raises(ValueError, match=message):
        Transformer.from_checkpoint(directory)


def weights(**changes):
    return lambda q: q["config_groups"]["group_0"]["weights"].update(changes)


def group(**changes):
    return lambda q: q["config_groups"]["group_0"].update(changes)


def top(**changes):
    return lambda q: q.update(changes)


def second_group(q: dict) -> None:
    first = q["config_groups"]["group_0"]
    q["config_groups"]["mlp"] = first | {"weights": first["weights"] | {"num_bits": 4}}


def int8_config() -> dict:
    """A config whose quantization_config is as compressed-tensors writes it."""
    return {
        "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "quantization_status": "compressed", "kv_cache_scheme": None, "ignore": ["lm_head"],
            "config_groups": {"group_0": {
                "targets": ["Linear"], "weights": dict(INT8_WEIGHTS), "input_activations": None,
                "output_activations": None}}}}


@pytest.mark.parametrize(("edit", "message"), [
    (weights(num_bits=4), "num_bits of group_0's weights 4, expected 8"),
    (second_group, "num_bits of mlp's weights 4"),
    (weights(type="float"), "type of group_0's weights 'float', expected 'int'"),
    (weights(strategy="group", group_size=128), "strategy of group_0's weights 'group', expected"),
    (weights(strategy="tensor"), "strategy of group_0's weights 'tensor'"),
    (weights(group_size=128), "group_size .* 128"),
    (weights(symmetric=False), "symmetric of group_0's weights False, expected True"),
    (weights(actorder="group"), "actorder .* 'group'"),
    (weights(dynamic=True), "dynamic of group_0's weights True"),
    (group(weights=None), "num_bits of group_0's weights None"),
    (group(input_activations={"num_bits": 8}), "input_activations of group_0 .*num_bits"),
    (group(output_activations={"num_bits": 8}), "output_activations of group_0"),
    (group(format="int-quantized"), "format of group_0 'int-quantized'"),
    (top(quant_method="gptq"), "quant_method 'gptq', expected 'compressed-tensors'"),
    (top(quant_method=None), "quant_method None"),
    (top(format="int-quantized"), "quantization format 'int-quantized', expected 'pack-quantized'"),
    (top(quantization_status="initialized"), "quantization_status 'initialized', expected"),
    (top(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme .*num_bits"),
    (top(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity format 'sparse-24-bitmask'"),
    (top(transform_config={"config_groups": {"u": {}}}), "transform_config"),
    (top(config_groups=None), "config_groups None, expected at least one"),
    (top(config_groups={}), "config_groups {}"),
])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_other_layouts_are_refused_by_name(key, edit, message):
    raw = int8_config()
    raw[key] = raw.pop("quantization_config")
    assert ModelConfig.from_dict(raw).int8
    edit(raw[key])
    with pytest.raises(ValueError, match=f"got {message}"):
        ModelConfig.from_dict(raw)


def test_layouts_that_say_less_or_the_same_otherwise_are_read():
    for edit in (weights(group_size=-1), top(sparsity_config={}, transform_config={}),
                 top(sparsity_config={"format": "dense"}), group(format="pack-quantized")):
        raw = int8_config()
        edit(raw["quantization_config"])
        assert ModelConfig.from_dict(raw).int8
    few = {key: INT8_WEIGHTS[key] for key in ("num_bits", "type", "symmetric", "strategy")}
    raw["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"a": {"weights": few}, "b": {"weights": few}}}
    assert ModelConfig.from_dict(raw).int8


# ---- directories and shards

def test_directory_errors(tiny_checkpoint, tmp_path):
    message = "got nothing there, expected a Hugging Face checkpoint directory"
    with pytest.raises(FileNotFoundError, match=message):
        ModelConfig.from_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=message):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="got a file"):
        ModelConfig.from_checkpoint(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        ModelConfig.from_checkpoint(tmp_path / "empty")
    for text, error in (("{not json", "not valid JSON"), ("[" * 100_000, "not valid JSON"),
                        ("[]", "got a JSON list")):
        (tmp_path / "empty" / "config.json").write_text(text)
        with pytest.raises(ValueError, match=error):
            ModelConfig.from_checkpoint(tmp_path / "empty")
    directory = tiny_checkpoint()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only pickles"):
        Checkpoint(directory)
    torch.save({"w": torch.zeros(3)}, directory / "model.safetensors")
    with pytest.raises(ValueError, match="got a pickle"):
        Checkpoint(directory)


def test_shard_errors(tiny_checkpoint):
    directory = tiny_checkpoint(max_shard_size="50KB")
    index = json.loads((directory / INDEX).read_text())
    file = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.ghost"] = file
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks model.ghost, which the index expects"):
        Checkpoint(directory)
    del index["weight_map"]["model.ghost"]
    (directory / INDEX).write_text(json.dumps(index))
    (directory / file).unlink()
    with pytest.raises(FileNotFoundError, match="the index expects .* tensors in it"):
        Checkpoint(directory)
    for nothing in ({}, {"weight_map": []}, {"weight_map": {}}):
        (directory / INDEX).write_text(json.dumps(nothing))
        with pytest.raises(ValueError, match="got no weight_map"):
            Checkpoint(directory)


def test_copying_a_directory_without_its_shards_fails_early(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint(max_shard_size="50KB") / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="got no weights"):
        Checkpoint(tmp_path)


# ---- headers

def rewrite_header(path: Path, edit) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    edit(header)
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + data[8 + length:])


def overlap(header: dict) -> None:
    a, b = [entry for name, entry in header.items() if name != "__metadata__"][:2]
    begin, end = b["data_offsets"]
    b["data_offsets"] = [a["data_offsets"][0], a["data_offsets"][0] + end - begin]


def first(header: dict) -> dict:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def in_float8(header: dict) -> None:
    begin, end = first(header)["data_offsets"]
    first(header).update(dtype="F8_E4M3", shape=[end - begin])


@pytest.mark.parametrize(("edit", "message"), [
    (overlap, "invalid offset for tensor"),
    (in_float8, "dtype 'F8_E4M3'"),
    (lambda h: first(h).update(dtype="F99"), "unknown variant `F99`"),
    (lambda h: first(h).update(shape=[1, 1]), "invalid shape"),
    (lambda h: first(h).update(shape=[-1, 4]), "integer `-1`, expected usize"),
    (lambda h: first(h).pop("data_offsets"), "missing field `data_offsets`"),
    (lambda h: h.update(ghost=[]), "expected struct TensorInfo"),
])
def test_headers_are_checked_before_any_tensor_is_read(tiny_checkpoint, edit, message):
    path = tiny_checkpoint() / "model.safetensors"
    rewrite_header(path, edit)
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(path)


@pytest.mark.parametrize(("text", "message"), [
    (b"{}  ", "not fully covered"), (b"[]", "invalid JSON"), (b"{]", "invalid JSON"),
    (b"\xff\xff", "invalid UTF-8"), (b"[" * 100_000, "invalid JSON"),
    (b'{"a": ' + b"1" * 5000 + b"}", "invalid JSON")], ids=lambda value: value[:9])
def test_headers_of_any_bytes_are_refused(tmp_path, text, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"!")
    with pytest.raises(ValueError, match=f"{message}.*expected a whole safetensors file"):
        SafetensorsFile(path)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_files_are_named(tiny_checkpoint, keep):
    path = tiny_checkpoint() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        SafetensorsFile(path)


def test_a_file_that_shrinks_after_its_header_was_read(tiny_checkpoint):
    path = tiny_checkpoint() / "model.safetensors"
    file = SafetensorsFile(path)
    last = max(file.tensors, key=lambda name: file.tensors[name].offset)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"end of file inside {last}"):
        file.read(last)


# ---- reading

def test_reads_by_rows_as_safetensors_does(tiny_checkpoint):
    directory = tiny_checkpoint(dtype=torch.bfloat16)
    expected = load_file(directory / "model.safetensors")
    file = SafetensorsFile(directory / "model.safetensors")
    assert set(file.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(file.read(name), tensor)
        assert torch.equal(file.read(name, 3, 7), tensor[3:7])


def test_reads_columns_scalars_and_nothing(tmp_path):
    tensors = {"matrix": torch.arange(35.0).view(5, 7), "scalar": torch.tensor(3), "empty":
               torch.empty(0, 4), "cube": torch.arange(24, dtype=torch.int16).view(2, 3, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.read(name).dtype == tensor.dtype
    for start, stop, left, right in ((0, 5, 0, 7), (1, 4, 2, 5), (4, 5, 6, 7), (2, 2, 0, 3),
                                     (0, 5, 3, 3)):
        part = checkpoint.read("matrix", start, stop, (left, right))
        assert torch.equal(part, tensors["matrix"][start:stop, left:right])
    assert torch.equal(checkpoint.read("cube", 1), tensors["cube"][1:])
    before = checkpoint.bytes_read
    checkpoint.read("matrix", 1, 4, (2, 5))
    assert checkpoint.bytes_read - before == 3 * 3 * 4


@pytest.mark.parametrize("nbytes", [1, 28, 60, 1000])
def test_chunks_cover_what_was_asked_for(tmp_path, nbytes):
    matrix = torch.arange(35.0).view(5, 7)
    save_file({"matrix": matrix}, tmp_path / "model.safetensors")
    chunks = list(Checkpoint(tmp_path).chunks("matrix", nbytes, rows=(1, 5), columns=(2, 6)))
    assert [row for row, _ in chunks] == list(range(0, 4, max(1, nbytes // 28)))
    assert torch.equal(torch.cat([rows for _, rows in chunks]), matrix[1:5, 2:6])


def test_names_and_shapes_of_stacked_parameters(tiny_checkpoint):
    directory = tiny_checkpoint()
    config, checkpoint = ModelConfig.from_checkpoint(directory), Checkpoint(directory)
    attn = "layers.1.self_attn"
    qkv = [f"model.{attn}.{name}_proj" for name in "qkv"]
    assert tensor_names(f"{attn}.qkv_proj.weight") == [f"{name}.weight" for name in qkv]
    assert tensor_names(f"{attn}.qkv_proj.weight", int8=True) == [
        f"{name}.weight_packed" for name in qkv]
    assert tensor_names(f"{attn}.qkv_proj.scale") == [
        f"{name}.weight_scale" for name in qkv]
    assert tensor_names("norm.weight") == ["model.norm.weight"]
    assert tensor_names("lm_head.weight") == ["lm_head.weight"]
    names = tensor_names(f"{attn}.qkv_proj.weight")
    check_shapes(checkpoint, names, torch.empty(128, 64, device="meta"), config)
    with pytest.raises(ValueError, match=r"got shape \[64, 64\] for .*q_proj.*expected \[64, 60\]"):
        check_shapes(checkpoint, names, torch.empty(128, 60, device="meta"), config)


# ---- nothing outside the directory

SECRET = {"model.secret": torch.ones(2, 2)}


@pytest.fixture
def outside(tmp_path) -> Path:
    """A safetensors file that no checkpoint owns."""
    path = tmp_path / "outside" / "secret.safetensors"
    path.parent.mkdir()
    save_file(SECRET, path)
    return path


def directory_with(path: Path, weight_map: dict) -> Path:
    path.mkdir()
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize("entry", [
    "../outside/secret.safetensors", "ABSOLUTE", "nested/secret.safetensors",
    "./secret.safetensors", "nested\\secret.safetensors", "..", ".", "", "secret.safetensors\0", 3,
    None, ["a"]], ids=repr)
def test_an_index_names_only_files_beside_it(tmp_path, outside, entry):
    entry = str(outside) if entry == "ABSOLUTE" else entry
    directory = directory_with(tmp_path / "model", {"model.secret": entry})
    (directory / "nested").mkdir()
    for place in (directory, directory / "nested"):
        shutil.copy(outside, place)
    with pytest.raises(ValueError, match=f"{INDEX}: got .* as the file of model.secret, expected"):
        Checkpoint(directory)


def test_a_shard_that_links_outside_is_refused(tmp_path, outside):
    directory = directory_with(tmp_path / "model", {"model.secret": "shard.safetensors"})
    for target in (outside, Path("../outside/secret.safetensors"), Path("../model-2")):
        (directory / "shard.safetensors").symlink_to(target)
        with pytest.raises(ValueError, match="shard.safetensors: got a path that leads to"):
            Checkpoint(directory)
        (directory / "shard.safetensors").unlink()
    (directory / "shard.safetensors").symlink_to("shard.safetensors")  # a circle
    with pytest.raises(FileNotFoundError, match="shard.safetensors does not exist"):
        Checkpoint(directory)


@pytest.mark.parametrize("name", [
    "model.safetensors", INDEX, "config.json", "generation_config.json"])
def test_no_file_of_a_checkpoint_may_link_outside(tiny_checkpoint, tmp_path, name):
    directory = tiny_checkpoint(**({"max_shard_size": "50KB"} if name == INDEX else {}))
    (directory / name).rename(tmp_path / "elsewhere")
    (directory / name).symlink_to(tmp_path / "elsewhere")
    read = Checkpoint if "safetensors" in name else ModelConfig.from_checkpoint
    with pytest.raises(ValueError, match=f"{name}: got a path that leads to .*elsewhere, expected"):
        read(directory)


def test_links_within_the_directory_and_to_it_are_followed(tmp_path, outside):
    directory = directory_with(tmp_path / "model", {"model.secret": "shard.safetensors"})
    shutil.copy(outside, directory / "weights.safetensors")
    (directory / "shard.safetensors").symlink_to("weights.safetensors")
    (tmp_path / "linked").symlink_to("model")
    for path in (directory, tmp_path / "linked"):
        assert torch.equal(Checkpoint(path).read("model.secret"), SECRET["model.secret"])


def as_hub_cache(directory: Path, root: Path) -> Path:
    """Lay a checkpoint out as huggingface_hub does: each file of a snapshot links to a blob."""
    repository = root / "models--a--b"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    for i, path in enumerate(files):
        shutil.copy(path, blobs / f"{i:040x}")
        link = snapshot / path.relative_to(directory)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"{i:040x}", link.parent))
    return snapshot


@pytest.mark.parametrize("shards", ["1GB", "50KB"])
def test_a_hub_cache_is_read_through_its_links(tiny_checkpoint, tmp_path, shards):
    directory = tiny_checkpoint(max_shard_size=shards)
    (directory / "original").mkdir()
    (directory / "original" / "params.json").write_text("{}")
    snapshot, plain = as_hub_cache(directory, tmp_path / "hub"), Checkpoint(directory)
    (tmp_path / "linked").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "linked"):
        assert ModelConfig.from_checkpoint(path) == ModelConfig.from_checkpoint(directory)
        checkpoint = Checkpoint(path)
        assert checkpoint.weight_map == plain.weight_map
        for name in plain.weight_map:
            assert torch.equal(checkpoint.read(name), plain.read(name))
    quantize_checkpoint(snapshot, tmp_path / "int8")
    for name in ("original/params.json", "tokenizer.json"):
        assert (tmp_path / "int8" / name).read_bytes() == (directory / name).read_bytes()
        assert not (tmp_path / "int8" / name).is_symlink()


@pytest.mark.parametrize("how", ["past the blobs", "blob", "blobs", "other repository"])
def test_a_hub_cache_leads_to_its_own_blobs_alone(tiny_checkpoint, tmp_path, outside, how):
    snapshot = as_hub_cache(tiny_checkpoint(), tmp_path / "hub")
    repository = snapshot.parent.parent
    link = snapshot / "model.safetensors"
    blob = link.resolve()
    if how == "blobs":  # the folder itself leads elsewhere
        (repository / "blobs").rename(tmp_path / "elsewhere")
        (repository / "blobs").symlink_to(tmp_path / "elsewhere")
    elif how == "blob":
        blob.unlink()
        blob.symlink_to(outside)
    else:
        link.unlink()
        (tmp_path / "hub" / "models--c--d" / "blobs").mkdir(parents=True)
        other = shutil.copy(outside, tmp_path / "hub" / "models--c--d" / "blobs" / "0")
        past = "../../blobs/../../../outside/secret.safetensors"
        link.symlink_to(other if how == "other repository" else past)
    with pytest.raises(ValueError, match="model.safetensors: got a path that leads to"):
        Checkpoint(snapshot)


@pytest.mark.parametrize("name", [
    "notes.txt", "original/params.json", "LICENSE", "judge.safetensors"])
def test_quantising_copies_nothing_from_outside(tiny_checkpoint, tmp_path, outside, name):
    directory = tiny_checkpoint()
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name}: got a path that leads to .*secret.safetensors"):
        quantize_checkpoint(directory, tmp_path / "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside"]


def test_quantising_skips_a_folder_that_links_outside(tiny_checkpoint, tmp_path, outside):
    directory = tiny_checkpoint()
    (outside.parent / "notes.txt").write_text("secret")
    (directory / "folder").symlink_to(outside.parent)
    quantize_checkpoint(directory, tmp_path / "int8")
    assert not (tmp_path / "int8" / "folder").exists()


# ---- output files

def test_a_killed_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as aside:
        aside.write_text("half")
        assert path.read_text() == "old" and aside.parent == tmp_path
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]
    with atomic_write(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["out.json"]


def test_outputs_are_checked_before_the_work(tmp_path, monkeypatch):
    check_writable(None)
    check_writable(str(tmp_path / "out.json"))
    with pytest.raises(FileNotFoundError, match="missing does not exist; make it first"):
        check_writable(str(tmp_path / "missing" / "out.json"))
    with pytest.raises(ValueError, match="got a place that cannot be written"):
        check_writable(str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match="got a place that cannot be written"):
        check_writable(str(tmp_path / "out.json"))
