"""model.py: agreement with transformers, the cache in any chunking, every fault of a checkpoint by its message, attention.

The attention kernel runs under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported: tests/conftest.py), or on
a GPU where there is one.
"""

import copy
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

import model
from generate import can_compile, compiled
from model import (
    MAX_TILES,
    Attention,
    Checkpoint,
    Linear,
    ModelConfig,
    SafetensorsFile,
    Transformer,
    attend_options,
    attend_torch,
    attend_triton,
    can_pack,
    keep_packed,
)

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available() and model.triton is not None and not model.INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
kernel_test = pytest.mark.skipif(
    not (GPU or model.INTERPRETED), reason="needs triton, and a GPU or TRITON_INTERPRET=1 before triton is imported")
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


def test_the_linear_operators_describe_themselves_rightly():
    x, weight = torch.randn(5, 12), torch.randn(7, 12)
    keep_packed(weight, x.dtype)
    for operator in (torch.ops.gavel.onednn_linear, torch.ops.gavel.packed_linear):
        torch.library.opcheck(operator.default, (x, weight), test_utils=("test_schema", "test_faketensor"))


bf16_packs = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not can_pack(torch.bfloat16), reason="not packed here"))


@pytest.mark.parametrize("dtype", [torch.float32, bf16_packs])
@pytest.mark.parametrize("rows", [1, 3, 17, 130])
@pytest.mark.parametrize("compile", [False, True])
@torch.no_grad()
def test_packed_linear_is_as_good_as_torchs(rows, dtype, compile, monkeypatch):
    """In float32 oneDNN adds up in another order than MKL for few rows: its error is 1.9 times, at the most 2.6 times MKL's."""
    if compile and can_compile(torch.device("cpu")) is not None:
        pytest.skip("no C++ compiler")
    used = []
    monkeypatch.setattr(model, "packed_copy", lambda *args, real=model.packed_copy: used.append(real(*args)) or used[-1])
    torch.manual_seed(rows)
    layer, x = Linear(179, 83).to(dtype), torch.randn(1, rows, 358).to(dtype)[..., ::2]
    x[..., 3] *= 1000
    layer.packed = keep_packed(layer.weight, dtype)
    call = compiled(call_layer) if compile else call_layer
    ours, torchs = linear_error(x, layer, call(layer, x))
    assert ours <= 4 * torchs
    if not (compile and rows <= model.FEW_ROWS):
        assert used and used[-1] is not None  # the copy was used
    layer.weight[5] *= 3  # a written weight is not the packed one any more
    ours, torchs = linear_error(x, layer, call(layer, x))
    assert ours <= 4 * torchs
    layer.packed = keep_packed(layer.weight, dtype)  # packed anew
    assert model.packed_copy(layer.weight, dtype) is not None
    ours, torchs = linear_error(x, layer, call(layer, x))
    assert ours <= 4 * torchs


def test_what_cannot_be_packed_is_not(tmp_path):
    weight = torch.randn(7, 12)
    assert not keep_packed(weight.double(), torch.float64)
    with torch.inference_mode():
        assert not keep_packed(torch.randn(7, 12), torch.float32)
    layer = Linear(12, 7)
    layer.packed = keep_packed(layer.weight, torch.float32)
    with torch.no_grad():
        assert layer(torch.ones(0, 12)).shape == (0, 7)
        assert layer.double()(torch.ones(2, 12).double()).dtype is torch.float64
        torch.save(layer, tmp_path / "layer.pt")  # the copy stays behind
        again = copy.deepcopy(layer)
        assert torch.equal(again(torch.ones(2, 12).double()), layer(torch.ones(2, 12).double()))


def test_a_cpu_without_bfloat16_runs_it_unpacked(tiny_checkpoint):
    """oneDNN as on a CPU with AVX2 alone."""
    code = ("import sys, torch; sys.path.insert(0, '.'); from model import *; from generate import Engine\n"
            "target = Transformer.from_checkpoint(sys.argv[1], dtype=torch.bfloat16)\n"
            "blocks = list(Engine(target, max_seq_length=64).generate([1, 2, 3], max_new_tokens=5)); print(len(blocks))")
    out = subprocess.run([sys.executable, "-c", code, str(tiny_checkpoint())], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert out.returncode == 0 and int(out.stdout) >= 1, out.stderr


def call_layer(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x)


@torch.no_grad()
def test_small_models_are_packed_on_a_cpu(tiny_checkpoint, monkeypatch):
    def logits(of: Transformer) -> torch.Tensor:
        return of.logits(of(torch.arange(12)[None])).float()

    plain, packed, large = (Transformer.from_checkpoint(tiny_checkpoint(), dtype=torch.float32) for _ in range(3))
    packed.pack()
    assert all(layer.packed for layer in packed.modules() if isinstance(layer, Linear))
    monkeypatch.setattr(model, "MAX_PACKED_BYTES", 1000)
    large.pack()
    assert not any(layer.packed for layer in large.modules() if isinstance(layer, Linear))
    ref = logits(plain)
    assert torch.equal(logits(large), ref) and relative(logits(packed), ref) < TOLERANCE
    packed.to(torch.bfloat16)  # replaces the weights
    assert relative(logits(packed), ref) < 0.1
    packed.pack()
    assert relative(logits(packed), ref) < 0.1


# ---- attention over the cache

LENGTH = 384  # T


def make_attention(S: int, length: int, G: int, Dh: int, dtype: torch.dtype, *, batch: int = 1, dead: str = "zero") -> tuple:
    """(q, k, v, input_pos) as Attention has them: q a part of the stacked projections, k and v a part of larger caches.

    Two key heads; a key row of outliers. Rows past the last position hold zeros, or what `dead` names.
    """
    generator = torch.Generator().manual_seed(S * length * G * Dh)
    q = torch.randn(batch, S, 2 * G + 4, Dh, generator=generator).transpose(1, 2)
    caches = torch.randn(2, batch + 1, 3, LENGTH, Dh, generator=generator)
    caches[0, :, :, length // 2] *= 4
    caches[:, :, :, length:] = {"zero": 0.0, "nan": float("nan"), "inf": float("inf"), "noise": 1e4}[dead]
    k, v = caches.to(dtype).to(DEVICE)[:, :batch, 1:]
    return q.to(dtype).to(DEVICE)[:, :2 * G], k, v, torch.arange(length - S, length, device=DEVICE)


def make_arrivals() -> torch.Tensor:
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=DEVICE)


def force_splits(monkeypatch, splits: int) -> None:
    monkeypatch.setattr(model, "attend_options", lambda *args: attend_options(*args) | {"SPLITS": splits})


def stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 as the kernel stores it: the interpreter cuts float32 off where bfloat16 ends, and does not round."""
    if dtype is torch.bfloat16 and model.INTERPRETED:
        return (value.float().view(torch.int32) & -65536).view(torch.float32)
    return value.to(dtype)


def assert_attention(y: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, input_pos: torch.Tensor) -> None:
    """y is within twice the largest error that torch makes in the same dtype, relative to Σ p·|v|, and then rounded once.

    A mask off by one, either way, and a merge without rescaling fail in every dtype.
    """
    exact, size = (attend_torch(q.double(), k.double(), values, input_pos) for values in (v.double(), v.double().abs()))
    slack = 2 * ((attend_torch(q, k, v, input_pos) - exact).abs() / size).max().clamp(min=2**-24) * size
    assert y.dtype == q.dtype and y.shape == q.shape
    assert (stored(exact - slack, y.dtype) <= y).all() and (y <= stored(exact + slack, y.dtype)).all()


@pytest.mark.parametrize("S", [1, 5])
def test_reference_attends_to_rows_up_to_each_position(S):
    q, k, v, input_pos = make_attention(S, 33, 4, 16, torch.float64, batch=2, dead="noise")
    y = attend_torch(q, k, v, input_pos)
    for b, h, s in itertools.product(range(2), range(8), range(S)):
        rows = input_pos[s] + 1
        p = (k[b, h // 4, :rows] @ q[b, h, s] / 4).softmax(0)
        torch.testing.assert_close(y[b, h, s], p @ v[b, h // 4, :rows], rtol=1e-12, atol=1e-12)


@kernel_test
@pytest.mark.parametrize("S", [1, 2, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_kernel_follows_float64(monkeypatch, dtype, S):
    """Every pair of group, head dim, length and splits; whatever dead rows hold."""
    for i, j in itertools.product(range(3), range(3)):
        G, Dh = (1, 4, 8)[i], (16, 40, 128)[j]
        length, splits, dead = max(S, (1, 33, 300)[(i + j) % 3]), (1, 2, 5)[(i + 2 * j) % 3], ("nan", "inf", "noise")[j]
        force_splits(monkeypatch, splits)
        arrivals = make_arrivals()
        y = attend_triton(*make_attention(S, length, G, Dh, dtype, dead=dead), arrivals)
        assert_attention(y, *make_attention(S, length, G, Dh, dtype))
        assert not arrivals.any()


@kernel_test
@pytest.mark.parametrize(("S", "G", "batch"), [(100, 4, 1), (17, 8, 3), (1, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_kernel_in_row_blocks_and_batches(dtype, S, G, batch):
    arrivals = make_arrivals()
    y = attend_triton(*make_attention(S, 171, G, 80, dtype, batch=batch, dead="nan"), arrivals)
    assert_attention(y, *make_attention(S, 171, G, 80, dtype, batch=batch))
    assert not arrivals.any()


@kernel_test
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_attention_kernel_repeats_itself_to_the_bit(monkeypatch, splits):
    force_splits(monkeypatch, splits)
    arguments, arrivals = make_attention(17, 300, 4, 40, torch.float32), make_arrivals()
    first = attend_triton(*arguments, arrivals)
    assert torch.equal(attend_triton(*arguments, arrivals), first) and not arrivals.any()


@kernel_test
def test_attention_kernel_takes_any_layout():
    q, k, v, input_pos = make_attention(2, 65, 4, 40, torch.float32)
    y = attend_triton(q, k, v, input_pos, make_arrivals())
    for layout in (lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT, lambda x: x.repeat(1, 1, 1, 2)[..., :40]):
        assert torch.equal(attend_triton(*map(layout, (q, k, v)), input_pos, make_arrivals()), y)


@kernel_test
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("S", [1, 9])
def test_attention_kernel_touches_nothing_outside(S, splits):
    """NaN follows the queries and every dead row, marks surround what may be written; scratch is NaN before."""
    q, k, v, input_pos = make_attention(S, 100, 4, 40, torch.float32, dead="nan")
    queries = torch.full((S + 2, 8, 48), float("nan"), device=DEVICE)
    queries[:S, :, :40] = q[0].transpose(0, 1)
    options = attend_options(4 * S, 2, LENGTH, 40, 4, 132)
    del options["SPLITS"]
    grid = 2, -(-4 * S // options["BLOCK_M"]), splits
    size = grid[0] * grid[1] * splits * options["BLOCK_M"] * (options["BLOCK_D"] + 2)
    out = torch.full((S + 2, 8, 40), 7.0, device=DEVICE)
    partial = torch.full((size + 2,), float("nan"), device=DEVICE)
    arrivals = torch.tensor([5, *[0] * (grid[0] * grid[1]), 5], dtype=torch.int32, device=DEVICE)
    model.attend_kernel[grid](out[1:-1], partial[1:-1], arrivals[1:-1], queries, 0, 48, 8 * 48, k, *k.stride()[:3], v,
                              *v.stride()[:3], input_pos, 2, 4, S, HEAD_DIM=40, SPLIT=splits > 1,
                              UPCAST=model.INTERPRETED, **options)
    assert_attention(out[1:-1].transpose(0, 1)[None], *make_attention(S, 100, 4, 40, torch.float32))
    assert out[0].eq(7).all() and out[-1].eq(7).all() and partial[[0, -1]].isnan().all()
    assert arrivals.tolist() == [5, *[0] * (grid[0] * grid[1]), 5] and partial[1:-1].isnan().all() == (splits == 1)


def test_attention_splits_follow_shape_and_chip():
    decode, verify, prefill = (attend_options(rows, 8, 4096, 128, 2, 132) for rows in (4, 68, 2048))
    assert decode["SPLITS"] * 8 <= 132 < (decode["SPLITS"] + 1) * 8 and 1 < verify["SPLITS"] < decode["SPLITS"]
    assert prefill["SPLITS"] == attend_options(4, 256, 4096, 128, 2, 132)["SPLITS"] == 1
    assert attend_options(4, 1, 100, 64, 2, 132)["SPLITS"] <= 2 and attend_options(4, 2000, 10**6, 128, 2, 10**6)["SPLITS"] == 1


def attend(*arguments: torch.Tensor) -> torch.Tensor:
    return torch.ops.gavel.attend(*arguments)


@kernel_test
@pytest.mark.skipif(can_compile(torch.device(DEVICE)) is not None, reason="no compiler")
@torch.no_grad()
def test_compiled_attention_operator_is_the_kernel():
    arguments = *make_attention(5, 33, 4, 16, torch.float32), make_arrivals()
    y = attend(*arguments)
    assert torch.equal(compiled(attend)(*arguments), y) and y.transpose(1, 2).is_contiguous()
    torch.library.opcheck(torch.ops.gavel.attend.default, arguments, test_utils=("test_schema", "test_faketensor"))


def hidden_states(model: Transformer, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
    return model(tokens, input_pos)


@kernel_test
@pytest.mark.parametrize("compile", [False, True])
@torch.no_grad()
def test_model_with_the_kernel_agrees_whatever_dead_rows_hold(tiny_checkpoint, compile):
    if compile and can_compile(torch.device(DEVICE)) is not None:
        pytest.skip("no compiler")
    ours, theirs = pair(tiny_checkpoint(llama3_rope=True))
    tokens = torch.randint(0, ours.config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(0))
    ref = theirs(tokens).logits
    ours = ours.to(DEVICE)
    ours.setup_caches(max_batch_size=3, max_seq_length=100)
    for layer in ours.layers:
        layer.self_attn.impl = "triton"
        layer.self_attn.cache.k.fill_(float("nan"))
        layer.self_attn.cache.v.fill_(float("nan"))
    step = compiled(hidden_states) if compile else hidden_states
    rows = [step(ours, tokens[:, i:j].to(DEVICE), torch.arange(i, j, device=DEVICE))
            for i, j in itertools.pairwise((0, 17, 18, 35, 37))]
    assert relative(ours.logits(torch.cat(rows, dim=1)).cpu(), ref) < TOLERANCE
    assert not any(layer.self_attn.cache.arrivals.any() for layer in ours.layers)


@pytest.mark.skipif(can_compile(torch.device("cpu")) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("S, G, Dh, dead", [(1, 1, 40, "zero"), (2, 4, 64, "noise"), (1, 8, 24, "noise")])
def test_compiled_attention_of_few_rows_follows_float64(S, G, Dh, dead, dtype):
    inputs = make_attention(S, 171, G, Dh, dtype, dead=dead)
    assert_attention(compiled(attend_torch)(*inputs), *inputs)


def test_attention_routes_never_replace_each_other(tiny_checkpoint, monkeypatch):
    directory = tiny_checkpoint()
    with pytest.raises(ValueError, match="got impl 'cuda', expected 'triton' or 'torch'"):
        Attention(ModelConfig.from_checkpoint(directory), impl="cuda")
    ours = Transformer.from_checkpoint(directory)
    ours.setup_caches(max_batch_size=1, max_seq_length=8)
    ours.layers[0].self_attn.impl = "triton"
    monkeypatch.setattr(model, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"impl='triton': got (no triton package|tensors on cpu), expected triton and a GPU"):
        ours(torch.zeros(1, 1, dtype=torch.int64), torch.arange(1))


@pytest.mark.skipif(model.triton is None, reason="needs triton")
def test_attention_builds_ahead_of_time_without_spills():
    """64 KiB of shared memory is gfx942's, 99 KiB the smallest of NVIDIA's chips since sm_80."""
    targets = {"sm_80": 101376, "sm_90": 101376, "gfx942": 65536}
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "scripts/aot.py", "--module", "model", "--target", *targets], cwd=ROOT, env=env,
                         capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    built = [json.loads(line) for line in out.stdout.splitlines()]
    for target, shared in targets.items():
        kernels = [entry for entry in built if entry["target"] == target]
        assert {entry["kernel"].split()[1] for entry in kernels} == {"bf16", "fp16", "fp32"}
        assert {entry["kernel"].split()[-1] for entry in kernels} == {"64", "128"}
        assert len({entry["grid"][2] for entry in kernels}) > 1  # with and without splits
        assert all(entry["spills"] == 0 < entry["registers"] and entry["shared"] <= shared for entry in kernels), kernels
