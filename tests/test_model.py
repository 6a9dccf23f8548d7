"""model.py: agreement with transformers, the cache in any chunking, and every fault of a checkpoint by its message."""

import json
import shutil
import struct

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from model import Checkpoint, Linear, ModelConfig, SafetensorsFile, Transformer

TOLERANCE = 2e-5  # ‖Δ‖/‖ref‖ against float32 transformers; a missing RoPE scaling gives 1e-1, a wrong theta 1e-1


def relative(got: torch.Tensor, ref: torch.Tensor) -> float:
    return ((got - ref).norm() / ref.norm()).item()


def pair(directory):
    return (Transformer.from_checkpoint(directory, device="cpu", dtype=torch.float32),
            LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())


@pytest.mark.parametrize("options", [
    {}, {"llama3_rope": True}, {"tie_word_embeddings": True}, {"head_dim": 24}, {"num_key_value_heads": 4},
    {"num_key_value_heads": 1}, {"max_shard_size": "50KB"}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}], ids=str)
@torch.no_grad()
def test_logits_agree_with_transformers(tiny_checkpoint, options):
    ours, theirs = pair(tiny_checkpoint(**options))
    tokens = torch.randint(0, ours.config.vocab_size, (3, 41), generator=torch.Generator().manual_seed(0))
    ref = theirs(tokens).logits
    assert relative(ours.logits(ours(tokens)), ref) < TOLERANCE
    ours.setup_caches(max_batch_size=4, max_seq_length=64)
    assert relative(ours.logits(ours(tokens, torch.arange(41))), ref) < TOLERANCE


@torch.no_grad()
def test_far_positions_agree_with_transformers(tiny_checkpoint):
    ours, theirs = pair(tiny_checkpoint(llama3_rope=True, max_position_embeddings=16384, num_hidden_layers=1))
    tokens = torch.randint(0, ours.config.vocab_size, (1, 8400), generator=torch.Generator().manual_seed(0))
    ref = theirs(tokens, logits_to_keep=150).logits
    ours.setup_caches(max_batch_size=1, max_seq_length=8500)
    for start in range(0, 8400, 700):
        hidden = ours(tokens[:, start:start + 700], torch.arange(start, start + 700))
    assert relative(ours.logits(hidden[:, -150:]), ref) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 3, 16, 37])
@torch.no_grad()
def test_any_chunking_gives_the_same_logits_whatever_dead_rows_hold(tiny_checkpoint, chunk):
    ours, theirs = pair(tiny_checkpoint(llama3_rope=True))
    tokens = torch.randint(0, ours.config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(0))
    ref = theirs(tokens).logits
    ours.setup_caches(max_batch_size=2, max_seq_length=50)
    for layer in ours.layers:
        layer.self_attn.cache.k.normal_(std=1e4)
        layer.self_attn.cache.v.normal_(std=1e4)
    rows = [ours(tokens[:, i:i + chunk], torch.arange(i, min(i + chunk, 37))) for i in range(0, 37, chunk)]
    assert relative(ours.logits(torch.cat(rows, dim=1)), ref) < TOLERANCE


@torch.no_grad()
def test_rows_may_be_rewritten(tiny_checkpoint):
    """What speculation leans on: rejected rows are overwritten, and never read before that."""
    ours, theirs = pair(tiny_checkpoint())
    tokens = torch.randint(0, ours.config.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))
    ours.setup_caches(max_batch_size=1, max_seq_length=32)
    ours(torch.cat((tokens[:, :9], torch.zeros(1, 8, dtype=torch.int64)), 1), torch.arange(17))
    hidden = ours(tokens[:, 9:], torch.arange(9, 20))
    assert relative(ours.logits(hidden), theirs(tokens).logits[:, 9:]) < TOLERANCE


def test_both_rope_spellings_read_alike(tiny_checkpoint):
    directory = tiny_checkpoint(llama3_rope=True)
    new = json.loads((directory / "config.json").read_text())
    rope = new.pop("rope_parameters")
    old = new | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": new.pop("dtype")}
    first = ModelConfig.from_checkpoint(directory)
    (directory / "config.json").write_text(json.dumps(old))
    assert ModelConfig.from_checkpoint(directory) == first
    assert first.rope_scaling.factor > 1


def test_stop_tokens_come_from_generation_config_first(tiny_checkpoint):
    directory = tiny_checkpoint()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert ModelConfig.from_checkpoint(directory).eos_token_ids == (3, 5)
    (directory / "generation_config.json").write_text(json.dumps({}))
    raw = json.loads((directory / "config.json").read_text()) | {"eos_token_id": 7}
    (directory / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_checkpoint(directory).eos_token_ids == (7,)


def edit_config(directory, **changes):
    raw = json.loads((directory / "config.json").read_text())
    raw.update(changes)
    (directory / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "expected 'llama'"),
    ({"hidden_size": None}, "hidden_size = None"), ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    ({"attention_bias": True}, "attention_bias"), ({"hidden_act": "gelu"}, "'gelu'"),
    ({"num_key_value_heads": 3}, "key-value heads"), ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
    ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ({"intermediate_size": 192}, r"expected \[192, 64\] by config.json"),
    ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2"),
])
def test_config_errors(tiny_checkpoint, changes, message):
    directory = tiny_checkpoint()
    edit_config(directory, **changes)
    with pytest.raises(ValueError, match=message):
        Transformer.from_checkpoint(directory)


def test_directory_errors(tiny_checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="got nothing there, expected a Hugging Face checkpoint directory"):
        Transformer.from_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="got a file"):
        Transformer.from_checkpoint(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        Transformer.from_checkpoint(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="not valid JSON"):
        Transformer.from_checkpoint(tmp_path / "empty")
    directory = tiny_checkpoint()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only pickles"):
        Transformer.from_checkpoint(directory)
    torch.save({"w": torch.zeros(3)}, directory / "model.safetensors")
    with pytest.raises(ValueError, match="got a pickle"):
        Transformer.from_checkpoint(directory)


def test_shard_errors(tiny_checkpoint):
    directory = tiny_checkpoint(max_shard_size="50KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.ghost"] = file
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks model.ghost, which the index expects"):
        Checkpoint(directory)
    del index["weight_map"]["model.ghost"]
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / file).unlink()
    with pytest.raises(FileNotFoundError, match="the index expects .* tensors in it"):
        Checkpoint(directory)


def rewrite_header(path, edit):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    edit(header)
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + data[8 + length:])


def overlap(header):
    names = [n for n in header if n != "__metadata__"]
    a, b = header[names[0]], header[names[1]]
    b["data_offsets"] = [a["data_offsets"][0], a["data_offsets"][0] + b["data_offsets"][1] - b["data_offsets"][0]]


def first(header):
    return next(entry for name, entry in header.items() if name != "__metadata__")


@pytest.mark.parametrize("edit, message", [
    (overlap, "where the one before it ends"),
    (lambda h: first(h).update(dtype="F8_E4M3"), "dtype 'F8_E4M3'"),
    (lambda h: first(h).update(shape=[1, 1]), "whose shape"),
    (lambda h: first(h).update(shape=[-1, 4]), "shape"),
    (lambda h: first(h).pop("data_offsets"), "without dtype, shape and data_offsets"),
])
def test_headers_are_checked_before_any_tensor_is_read(tiny_checkpoint, edit, message):
    path = tiny_checkpoint() / "model.safetensors"
    rewrite_header(path, edit)
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(path)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_files_are_named(tiny_checkpoint, keep):
    path = tiny_checkpoint() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        SafetensorsFile(path)


def test_reads_by_rows_as_safetensors_does(tiny_checkpoint):
    from safetensors.torch import load_file

    directory = tiny_checkpoint(dtype=torch.bfloat16)
    expected = load_file(directory / "model.safetensors")
    file = SafetensorsFile(directory / "model.safetensors")
    assert set(file.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(file.read(name), tensor)
        assert torch.equal(file.read(name, 3, 7), tensor[3:7])


def test_tokens_of_two_rows_do_not_see_each_other(tiny_checkpoint):
    ours, _ = pair(tiny_checkpoint())
    tokens = torch.randint(0, ours.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    ours.setup_caches(max_batch_size=2, max_seq_length=16)
    both = ours(tokens, torch.arange(9))
    alone = ours(tokens[1:], torch.arange(9))
    assert relative(both[1:], alone) < TOLERANCE


def test_copying_a_directory_without_its_shards_fails_early(tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint(max_shard_size="50KB")
    shutil.copy(directory / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="got no weights"):
        Transformer.from_checkpoint(tmp_path)


# ---- linear layers on a CPU

def linear_error(x: torch.Tensor, layer: Linear, y: torch.Tensor) -> tuple[float, float]:
    """Relative error against float64, of y and of F.linear in the same precision."""
    exact = x.double() @ layer.weight.double().T
    return tuple(((other.double() - exact).norm() / exact.norm()).item() for other in (y, F.linear(x, layer.weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 5, 16, 17, 33])
@torch.no_grad()
def test_linear_is_as_good_as_torchs(rows, dtype):
    torch.manual_seed(rows)
    layer, x = Linear(179, 83).to(dtype), torch.randn(1, rows, 179).to(dtype)
    x[..., 3] *= 1000  # an outlier, as hidden states have
    ours, torchs = linear_error(x, layer, layer(x))
    assert ours <= 2 * torchs


@pytest.mark.parametrize("dtype, rows", [(torch.float32, 1), (torch.float32, 3), (torch.float32, 6), (torch.bfloat16, 2)])
@torch.no_grad()
def test_compiled_linear_is_as_good_as_torchs(dtype, rows):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(rows)
    layer, x = Linear(179, 83).to(dtype), torch.randn(1, rows, 179).to(dtype)
    ours, torchs = linear_error(x, layer, torch.compile(lambda x: layer(x), dynamic=False, fullgraph=True)(x))
    assert ours <= 2 * torchs


def test_the_linear_operator_describes_itself_rightly():
    arguments = torch.randn(5, 12), torch.randn(7, 12)
    torch.library.opcheck(torch.ops.gavel.onednn_linear.default, arguments, test_utils=("test_schema", "test_faketensor"))
