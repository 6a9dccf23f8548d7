"""quantize.py: rounding and packing by definition, kernel and reference in float64, the converter.

The kernel runs under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported:
tests/conftest.py), or on a GPU where there is one.
"""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_generate import greedy, judged, random_head, run
from torch.nn import Linear
from transformers import LlamaForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

import quantize
from checkpoint import Checkpoint, ModelConfig, tensor_names
from cpu import can_compile, compiled
from generate import Engine
from model import Transformer
from quantize import (
    Int8Linear,
    int8_linear_torch,
    int8_linear_triton,
    launch_options,
    pack,
    quantize_checkpoint,
    quantize_rows,
    unpack,
)

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available() and quantize.triton is not None and not quantize.INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
kernel_test = pytest.mark.skipif(
    not (GPU or quantize.INTERPRETED),
    reason="needs triton, and a GPU or TRITON_INTERPRET=1 before triton is imported")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# ‖Δ‖/‖ref‖ of float32 logits, two ways to the same weights: rounding gives 1e-6, a wrong last bit
# of one scale in each weight 6e-3, weights rounded to bfloat16 9e-3.
TOLERANCE = 2e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other in small products take long where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative(got: torch.Tensor, ref: torch.Tensor) -> float:
    return ((got.float() - ref).norm() / ref.norm()).item()


def python(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, timeout=300, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_rounded_to_the_nearest_step(dtype):
    limits = torch.finfo(dtype)
    weight = torch.randn(11, 203, generator=torch.Generator().manual_seed(0))
    weight[1, 5] *= 1000
    weight[2:5] = 0
    weight[3, 7], weight[4, 8] = limits.max, -limits.max
    weight[5] *= limits.smallest_normal  # half of it subnormal
    weight[6] = limits.smallest_normal * torch.linspace(-0.9, 0.9, 203)
    weight[7] *= limits.max / 8
    # A peak of 127 times a scale of 253 / 256, and values next to half steps on either side.
    steps = (torch.arange(203) - 101) * 1.253
    nudge = 1 + torch.tensor([-1, 0, 1]).repeat(68)[:203] * 2**-23
    weight[10] = (steps.trunc() + 0.5) * (253 / 256) * nudge
    weight[10, 0] = 127 * 253 / 256
    weight = weight.to(dtype)
    w8, scale = quantize_rows(weight)
    assert (w8.dtype, scale.dtype, scale.shape) == (torch.int8, torch.bfloat16, (11, 1))
    error = (weight.double() - w8.double() * scale.double()).abs() / scale.double()
    assert (error <= 0.5 * (1 + 1e-6)).all()  # cutting the quotient off gives 1.0
    assert w8.min() >= -127 and w8[2].eq(0).all() and scale[2] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rounding_names_the_row_that_is_not_finite(value):
    weight = torch.randn(5, 7)
    weight[3, 2] = value
    with pytest.raises(ValueError, match="NaN or infinity in row 3"):
        quantize_rows(weight)


def test_packing():
    w8 = torch.tensor([[-127, 0, 1, 127, 5]], dtype=torch.int8)
    assert pack(w8).tolist() == [[0xFF818001 - 2**32, 0x85]]
    for columns in range(1, 10):
        w8 = torch.randint(-128, 128, (3, columns), dtype=torch.int8)
        assert torch.equal(unpack(pack(w8), columns), w8)
        assert torch.equal(pack(w8), pack_to_int32(w8, 8))


def make_layer(N: int, K: int, scale_dtype: torch.dtype = torch.bfloat16) -> tuple:
    """int8 [N, K], scale [N]: a channel of zeros, one of outliers, a -128 as others write it."""
    weight = 0.02 * torch.randn(N, K, generator=torch.Generator().manual_seed(N * K))
    weight[1:2] = 0
    weight[2:3] *= 100
    w8, scale = quantize_rows(weight)
    w8[0, K // 2] = -128
    scale = 1.0013 * scale[:, 0].float()  # more bits than bfloat16 has, where they are kept
    return w8.to(DEVICE), scale.to(scale_dtype).to(DEVICE)


def make_rows(M: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(M))
    x[:, K // 3] *= 30  # an outlier, as hidden states have
    return x.to(dtype).to(DEVICE)


def make_arrivals(N: int) -> torch.Tensor:
    return torch.zeros(-(-N // 128) * 2, dtype=torch.int32, device=DEVICE)


def stored(value: torch.Tensor, dtype: torch.dtype, *, cut: bool) -> torch.Tensor:
    """float64 in the dtype it is stored in; cut: towards zero, as the interpreter stores bf16."""
    if dtype is torch.bfloat16 and cut:
        return (value.float().view(torch.int32) & -65536).view(torch.float32)
    return value.to(dtype)


def assert_product(y: torch.Tensor, x: torch.Tensor, w8: torch.Tensor, scale: torch.Tensor, *,
                   cut: bool = quantize.INTERPRETED) -> None:
    """|y - exact| <= (K + 1) ε Σ|x·w| for each element, with ε = 2^-23, and then rounded once.

    That is the bound for sums in any order (Higham, Accuracy and Stability, 4.2): K - 1 additions,
    at most one rounding for each product, one for the scale. Tensor cores may cut a sum off where
    others round it, hence ε and not ε / 2.
    """
    weight = w8.double() * scale.double()[:, None]
    exact, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    slack = (x.shape[1] + 1) * torch.finfo(torch.float32).eps * size
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert (stored(exact - slack, y.dtype, cut=cut) <= y).all()
    assert (y <= stored(exact + slack, y.dtype, cut=cut)).all()


@kernel_test
@pytest.mark.parametrize("M", [1, 2, 7, 16, 25, 33, 64, 131])
@pytest.mark.parametrize(("dtype", "scale_dtype"), [
    (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16), (torch.float32, torch.float32)], ids=str)
def test_kernel_follows_float64(monkeypatch, M, dtype, scale_dtype):
    # Up to 4 splits; a large chip takes 16, and the interpreter long.
    monkeypatch.setattr(quantize, "multiprocessors", lambda _: 8)
    N, K = 131, 301
    x, arrivals = make_rows(M, K, dtype), make_arrivals(N)
    w8, scale = make_layer(N, K, scale_dtype)
    y = int8_linear_triton(x, w8, scale, arrivals)
    assert_product(y, x, w8, scale)
    assert torch.equal(int8_linear_triton(x, w8, scale, arrivals), y) and not arrivals.any()


@kernel_test
@pytest.mark.parametrize("splits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("M", "N", "K"), [
    (1, 1, 1), (3, 1, 700), (5, 257, 16), (16, 128, 2048), (64, 256, 512), (40, 130, 304)])
def test_kernel_in_any_size_and_number_of_splits(monkeypatch, M, N, K, splits):
    """From splits that have nothing to add to sizes that every block divides."""
    def options(*args):
        chosen = launch_options(*args)
        return chosen | {"SPLITS": splits, "EVEN_K": K % (chosen["BLOCK_K"] * splits) == 0}
    monkeypatch.setattr(quantize, "launch_options", options)
    for dtype in (torch.bfloat16, torch.float32):
        x, (w8, scale), arrivals = make_rows(M, K, dtype), make_layer(N, K), make_arrivals(N)
        assert_product(int8_linear_triton(x, w8, scale, arrivals), x, w8, scale)
        assert not arrivals.any()


@kernel_test
@pytest.mark.parametrize("layout", ["strided", "transposed", "repeated", "sliced"])
def test_kernel_takes_any_layout_of_x(layout):
    (w8, scale), arrivals = make_layer(131, 301), make_arrivals(131)
    x = {"strided": make_rows(27, 301, torch.float16)[::3],
         "transposed": make_rows(301, 9, torch.float16).T,
         "repeated": make_rows(1, 301, torch.float16).expand(9, -1),
         "sliced": make_rows(9, 602, torch.float16)[:, ::2]}[layout]
    assert_product(int8_linear_triton(x, w8, scale, arrivals), x, w8, scale)


@kernel_test
@pytest.mark.parametrize(("M", "processors"), [(1, 1), (1, 132), (33, 1), (33, 132), (70, 132)])
def test_kernel_touches_nothing_outside(M, processors):
    """NaN follows each row of x, the last scale and partial sums; marks surround what it writes."""
    N, K = 131, 301
    x = torch.full((M + 3, K + 5), float("nan"), device=DEVICE)
    x[:M, :K] = make_rows(M, K, torch.float32)
    x = x[:M, :K]
    w8, scale = make_layer(N, K)
    after = torch.full((3 * K,), 127, dtype=torch.int8, device=DEVICE)
    w8 = torch.cat((w8.flatten(), after))[:N * K].view(N, K)
    scale = torch.cat((scale, torch.full((128,), float("nan"), device=DEVICE)))[:N]
    options = launch_options(M, N, K, 4, processors)
    splits, blocks = options["SPLITS"], -(-M // options["BLOCK_M"]) * -(-N // quantize.BLOCK_N)
    assert (splits > 1) == (processors > 1 and M <= 64)
    out = torch.full((M + 2, N), 7.0, device=DEVICE)
    partial = torch.full((splits * M * N + 2,), float("nan"), device=DEVICE)
    arrivals = torch.tensor([5, *[0] * blocks, 5], dtype=torch.int32, device=DEVICE)
    quantize.int8_linear_kernel[(blocks, splits)](
        out[1:-1], partial[1:-1], arrivals[1:-1], x, x.stride(0), w8, scale, M, N, K,
        UPCAST=quantize.INTERPRETED, **options)
    assert_product(out[1:-1], x, w8, scale)
    assert out[0].eq(7).all() and out[-1].eq(7).all() and partial[[0, -1]].isnan().all()
    assert arrivals.tolist() == [5, *[0] * blocks, 5]


def test_splits_follow_shape_and_chip():
    assert launch_options(1, 8192, 8192, 2, 132)["SPLITS"] > 1
    assert launch_options(64, 1024, 8192, 2, 132)["SPLITS"] > 1
    assert launch_options(1, 57344, 8192, 2, 132)["SPLITS"] == 1
    assert launch_options(1, 8192, 8192, 2, 8)["SPLITS"] == 1
    # Partial sums of many rows would cost more than they save.
    assert launch_options(65, 1024, 65536, 2, 132)["SPLITS"] == 1
    for K in (512, 1000, 8192):
        options = launch_options(1, 1024, K, 2, 132)
        assert options["EVEN_K"] == (K % (options["BLOCK_K"] * options["SPLITS"]) == 0)


@kernel_test
def test_no_rows_give_no_rows():
    w8, scale = make_layer(5, 12)
    y = int8_linear_triton(make_rows(0, 12, torch.float32), w8, scale, make_arrivals(5))
    assert y.shape == (0, 5)


@pytest.mark.parametrize("M", [1, 4, 40])
@pytest.mark.parametrize(("dtype", "scale_dtype"), [
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_reference_follows_float64(M, dtype, scale_dtype):
    x, (w8, scale) = make_rows(M, 301, dtype), make_layer(131, 301, scale_dtype)
    assert_product(int8_linear_torch(x, w8, scale), x, w8, scale, cut=False)
    wide = int8_linear_torch(x.double(), w8, scale)
    exact = x.double() @ (w8.double() * scale.double()[:, None]).T
    assert wide.dtype == torch.float64 and torch.allclose(wide, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_layer_takes_its_devices_route(dtype):
    linear = torch.nn.Linear(45, 37, bias=False).to(DEVICE)
    layer = Int8Linear.from_linear(linear)
    w8, scale = quantize_rows(linear.weight)
    assert torch.equal(layer.weight, w8) and torch.equal(layer.scale, scale[:, 0])
    x = make_rows(6, 45, dtype)
    y = layer(x.view(2, 3, 45))
    rows = (int8_linear_triton(x, w8, scale[:, 0], layer.arrivals) if GPU
            else int8_linear_torch(x, w8, scale[:, 0]))
    assert y.shape == (2, 3, 37) and torch.equal(y.view(6, 37), rows)


def operator(x: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
    return torch.ops.gavel.int8_linear(x, layer.weight, layer.scale, layer.arrivals)


@kernel_test
@torch.no_grad()
def test_operator_describes_itself_rightly():
    layer = Int8Linear.from_linear(torch.nn.Linear(45, 37, bias=False)).to(DEVICE)
    arguments = make_rows(6, 45, torch.float32), layer.weight, layer.scale, layer.arrivals
    torch.library.opcheck(torch.ops.gavel.int8_linear.default, arguments)
    assert "Tensor(a!) arrivals" in str(torch.ops.gavel.int8_linear.default._schema)


@kernel_test
@pytest.mark.skipif(can_compile(torch.device(DEVICE)) is not None, reason="no C++ compiler")
@torch.no_grad()
def test_compiled_operator_is_the_kernel(monkeypatch):
    monkeypatch.setattr(quantize, "multiprocessors", lambda _: 8)  # splits, so that programs count
    layer = Int8Linear.from_linear(torch.nn.Linear(700, 37, bias=False)).to(DEVICE)
    x, counts = make_rows(6, 700, torch.float32), layer.arrivals
    call = compiled(operator)
    for _ in range(3):
        y = call(x, layer)
        assert torch.equal(y, operator(x, layer)) and not layer.arrivals.any()
    assert_product(y, x, layer.weight, layer.scale)
    assert layer.arrivals is counts


def test_the_kernel_is_never_replaced_in_silence(monkeypatch):
    monkeypatch.setattr(quantize, "INTERPRETED", False)
    message = r"got (no triton package|tensors on cpu), expected triton and a GPU"
    with pytest.raises(ValueError, match=message):
        operator(torch.zeros(1, 8), Int8Linear(8, 8))


@pytest.mark.slow
@pytest.mark.skipif(quantize.triton is None, reason="needs triton")
def test_builds_ahead_of_time_without_spills():
    """64 KiB of shared memory is gfx942's, 99 KiB the smallest of NVIDIA's chips since sm_80."""
    targets = {"sm_80": 101376, "sm_90": 101376, "gfx942": 65536}
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = python("scripts/aot.py", "--module", "quantize", "--target", *targets, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    built = [json.loads(line) for line in out.stdout.splitlines()]
    for target, shared in targets.items():
        kernels = [entry for entry in built if entry["target"] == target]
        assert {entry["kernel"].split()[1] for entry in kernels} == {"bf16", "fp16", "fp32"}
        assert len({entry["grid"][1] for entry in kernels}) > 1  # with and without splits
        assert all(entry["spills"] == 0 < entry["registers"] and entry["shared"] <= shared
                   for entry in kernels), kernels


HEADS = {"untied": ({}, False), "kept": ({}, True), "tied": ({"tie_word_embeddings": True}, False)}
ODD = {"hidden_size": 66, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 18,
       "intermediate_size": 91}


def converted(directory: Path, **options) -> Path:
    output = directory.with_name(f"{directory.name}-int8")
    quantize_checkpoint(directory, output, **options)
    return output


@torch.no_grad()
def dequantised(directory: Path, *, head: bool, dtype: torch.dtype = torch.float32) -> Transformer:
    """The source in float32, its quantised weights as code times scale, rounded to `dtype`."""
    model = Transformer.from_checkpoint(directory, dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and (head or name != "lm_head"):
            w8, scale = quantize_rows(layer.weight)
            layer.weight.copy_((w8.float() * scale.float()).to(dtype))
    return model


@torch.no_grad()
def logits_of(model: Transformer) -> torch.Tensor:
    tokens = torch.randint(0, 712, (2, 31), generator=torch.Generator().manual_seed(0))
    if isinstance(model, Transformer):
        return model.logits(model(tokens))
    return model.eval()(tokens).logits


@pytest.mark.parametrize(("options", "keep"), [
    *HEADS.values(), ({"dtype": torch.bfloat16}, False), ({"dtype": torch.float16}, True),
    (ODD, False), ({"max_shard_size": "50KB"}, False)], ids=str)
def test_converted_checkpoint_opens_with_the_rounded_weights(tiny_checkpoint, options, keep):
    directory = tiny_checkpoint(**options)
    output = converted(directory, keep_lm_head=keep)
    plain_head = keep or options.get("tie_word_embeddings", False)
    model = Transformer.from_checkpoint(output, dtype=torch.float32)
    reference = dequantised(directory, head=not plain_head)
    assert relative(logits_of(model), logits_of(reference)) < TOLERANCE
    plain = [name for name, layer in model.named_modules() if isinstance(layer, Linear)]
    assert plain == (["lm_head"] if plain_head else [])
    source, checkpoint = Checkpoint(directory), Checkpoint(output)
    copied = set(source.weight_map) & set(checkpoint.weight_map)
    assert {name.split(".")[-2] for name in copied} == {
        "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm",
        *(["lm_head"] if keep else [])}
    for name in copied:
        assert checkpoint.read(name).dtype == options.get("dtype", torch.float32)
        assert torch.equal(checkpoint.read(name), source.read(name))
    before, after = (json.loads((path / "config.json").read_text()) for path in (directory, output))
    quantization = after.pop("quantization_config")
    assert after == before and ModelConfig.from_checkpoint(output).int8
    assert quantization["ignore"] == (["lm_head"] if plain_head else [])
    [group] = quantization["config_groups"].values()
    assert group["targets"] == (["Linear"] if plain_head else ["Linear", "lm_head"])


@torch.no_grad()
def test_converter_and_from_linear_agree(tiny_checkpoint):
    directory = tiny_checkpoint(dtype=torch.bfloat16)
    output = converted(directory)
    source, model = Transformer.from_checkpoint(directory), Transformer.from_checkpoint(output)
    for name, layer in source.named_modules():
        if isinstance(layer, Linear):
            ours, theirs = Int8Linear.from_linear(layer), model.get_submodule(name)
            assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.scale, theirs.scale)
    assert model.dtype == torch.bfloat16


def test_shards_are_whole_files_in_order(tiny_checkpoint):
    directory = tiny_checkpoint(max_shard_size="50KB", dtype=torch.bfloat16, **ODD)
    output = converted(directory, shard_bytes=30_000)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(names) > 2 and names == sorted(set(index["weight_map"].values()))
    count = len(names)
    assert names == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    size = 0
    for name in names:
        with open(output / name, "rb") as raw:
            header = json.loads(raw.read(start := struct.unpack("<Q", raw.read(8))[0]))
        assert header.pop("__metadata__") == {"format": "pt"}
        with safe_open(output / name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        for key, tensor in tensors.items():
            assert index["weight_map"][key] == name
            assert (8 + start + header[key]["data_offsets"][0]) % tensor.itemsize == 0
            size += tensor.nbytes
    assert size == index["metadata"]["total_size"]
    places = index["weight_map"]
    assert len(places) == len(Checkpoint(output).weight_map)
    for layer in {key.removesuffix("_packed") for key in places if key.endswith("_packed")}:
        assert len({places[f"{layer}_{part}"] for part in ("packed", "scale", "shape")}) == 1


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes()
            for path in directory.rglob("*") if path.is_file()}


def test_a_small_buffer_gives_the_same_bytes(tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint(dtype=torch.bfloat16)
    sizes = quantize_checkpoint(directory, tmp_path / "small", buffer_bytes=1000)
    assert files(tmp_path / "small") == files(converted(directory))
    checkpoint = Checkpoint(tmp_path / "small")
    assert sizes["written"] == sum(checkpoint.info(name).nbytes for name in checkpoint.weight_map)
    source = Checkpoint(directory)
    assert sizes["read"] == sum(source.info(name).nbytes for name in source.weight_map)


def test_small_files_are_copied_and_other_weights_are_not(tiny_checkpoint):
    directory = tiny_checkpoint()
    expected = {"LICENSE", "README.md", "chat_template.jinja", "judge.safetensors",
                "tokenizer.model", "original/params.json"}
    for name in (*expected, "pytorch_model.bin", "original/consolidated.00.pth", "training_args.pt",
                 "consolidated.safetensors", ".cache/state.json", ".gitattributes", "model.gguf"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(name.encode())
    output = converted(directory)
    copied = {name for name, data in files(output).items() if data == files(directory).get(name)}
    assert copied == expected | {
        "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(files(output)) == copied | {"config.json", "model.safetensors"}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("options", "keep"), HEADS.values(), ids=HEADS)
def test_transformers_reads_what_we_write(tiny_checkpoint, options, keep):
    directory = tiny_checkpoint(dtype=torch.bfloat16, **options)
    output = converted(directory, keep_lm_head=keep)
    theirs, report = LlamaForCausalLM.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    ours = Transformer.from_checkpoint(output, dtype=torch.float32)
    assert relative(logits_of(theirs), logits_of(ours)) < TOLERANCE
    dequantize = CompressedTensorsConfig(dequantize=True)
    theirs = LlamaForCausalLM.from_pretrained(
        output, dtype=torch.float32, quantization_config=dequantize)
    # Dequantised as it is loaded, a weight is rounded to its scale's dtype: 9e-3 from its code.
    ours = dequantised(directory, head=not (keep or options), dtype=torch.bfloat16)
    assert relative(logits_of(theirs), logits_of(ours)) < TOLERANCE


def pack_theirs(directory: Path, output: Path, *, scale_dtype: torch.dtype, ignore: list) -> None:
    """Round and pack a checkpoint as compressed-tensors does, in shards."""
    model = LlamaForCausalLM.from_pretrained(directory)
    weights = QuantizationArgs(num_bits=8, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=ignore, quantization_status="frozen")
    apply_quantization_config(model, config)
    for layer in model.modules():
        if hasattr(layer, "quantization_scheme"):
            scale, _ = calculate_qparams(*layer.weight.aminmax(dim=1, keepdim=True), scheme.weights)
            layer.weight_scale = torch.nn.Parameter(scale.to(scale_dtype), requires_grad=False)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(output, max_shard_size="60KB")
    compressor.update_config(output)


def edit_config(directory: Path, edit) -> None:
    raw = json.loads((directory / "config.json").read_text())
    edit(raw)
    (directory / "config.json").write_text(json.dumps(raw))


def rename_group(raw: dict) -> None:
    groups = raw["quantization_config"]["config_groups"]
    groups["W8A16"] = groups.pop("group_0")
    raw["compression_config"] = raw.pop("quantization_config")


@pytest.mark.parametrize("ignore", [[], ["lm_head"]], ids=["head", "no head"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_what_compressed_tensors_packed_opens_bit_for_bit(
        tiny_checkpoint, tmp_path, scale_dtype, ignore):
    pack_theirs(tiny_checkpoint(**ODD), tmp_path, scale_dtype=scale_dtype, ignore=ignore)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    if ignore:
        edit_config(tmp_path, rename_group)
    stored, model = {}, Transformer.from_checkpoint(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        stored |= load_file(path)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}
    assert ("lm_head" in layers) == (not ignore) and len(layers) == 8 + (not ignore)
    for name, layer in layers.items():
        sources = tensor_names(f"{name}.weight")
        shapes = [torch.Size(stored[f"{source}_shape"].tolist()) for source in sources]
        codes = [unpack_from_int32(stored[f"{source}_packed"], 8, shape)
                 for source, shape in zip(sources, shapes)]
        scale = torch.cat([stored[f"{source}_scale"] for source in sources])[:, 0]
        assert torch.equal(layer.weight, torch.cat(codes)) and layer.scale.dtype == scale_dtype
        assert torch.equal(layer.scale, scale)
    assert relative(logits_of(model), logits_of(theirs)) < TOLERANCE


MEMORY = """
import sys
from pathlib import Path
from quantize import quantize_checkpoint

def peak():  # of this program alone: ru_maxrss begins with its parent's
    status = open("/proc/self/status").readlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before = peak()
quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), buffer_bytes=4 << 20)
print(peak() - before)
"""


def write_large(directory: Path) -> None:
    """1.5 GB in two shards, with one tensor to copy and one to round of 0.5 GB each."""
    block = (0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))).bfloat16()
    block = block.view(torch.uint8).numpy().tobytes()
    layer = "model.layers.0"
    shapes = {
        "model-00001-of-00002.safetensors": {
            "model.embed_tokens.weight": (1 << 18, 1024),
            f"{layer}.self_attn.q_proj.weight": (1 << 16, 2048)},
        "model-00002-of-00002.safetensors": {
            f"{layer}.mlp.down_proj.weight": (1 << 13, 1 << 15),
            f"{layer}.self_attn.o_proj.weight": (1 << 16, 1024)}}
    for name, tensors in shapes.items():
        header, end = {}, 0
        for tensor, (rows, columns) in tensors.items():
            offsets = [end, end := end + 2 * rows * columns]
            header[tensor] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": offsets}
        text = json.dumps(header).encode()
        with open(directory / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _ in range(end // len(block)):
                file.write(block)
    index = {"weight_map": {tensor: name for name, tensors in shapes.items() for tensor in tensors}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "vocab_size": 1 << 18, "hidden_size": 1024,
              "intermediate_size": 1 << 15, "num_hidden_layers": 1, "num_attention_heads": 16,
              "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak memory")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    try:
        (tmp_path / "large").mkdir()
        write_large(tmp_path / "large")
        # What is freed goes back at once: the peak is what the converter holds, not malloc.
        env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = python("-c", MEMORY, tmp_path / "large", tmp_path / "int8", env=env)
        assert done.returncode == 0, done.stderr
        assert sum(path.stat().st_size for path in (tmp_path / "int8").iterdir()) > 1e9
        # 35 MB are taken; 3.1 GB where tensors are read whole.
        assert int(done.stdout) <= 300 << 10, f"{done.stdout} KB"
    finally:
        shutil.rmtree(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from quantize import quantize_checkpoint

def progress(*_):
    if len(list(Path(sys.argv[2] + ".partial").glob("*.safetensors"))) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), shard_bytes=60_000, progress=progress)
"""


def test_a_killed_run_leaves_nothing_that_loads_and_is_continued(tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint(max_shard_size="50KB")
    output, partial = tmp_path / "int8", tmp_path / "int8.partial"
    assert python("-c", KILLED, directory, output).returncode == -signal.SIGKILL
    assert not output.exists() and len(list(partial.glob("*.tmp"))) == 1
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        Transformer.from_checkpoint(partial)
    whole = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    starts = set()
    quantize_checkpoint(directory, output, shard_bytes=60_000,
                        progress=lambda read, total, start: starts.add(start))
    assert len(whole) == 2 and {name: (output / name).stat().st_mtime_ns for name in whole} == whole
    assert len(starts) == 1 and starts.pop() > 0 and not partial.exists()
    quantize_checkpoint(directory, tmp_path / "at once", shard_bytes=60_000)
    assert files(output) == files(tmp_path / "at once")


@pytest.mark.parametrize("change", ["nothing", "source", "options"])
def test_an_interrupted_run_starts_anew_where_its_job_changed(tiny_checkpoint, tmp_path, change):
    directory, output = tiny_checkpoint(max_shard_size="50KB"), tmp_path / "int8"
    shard = "model-00001-of-00004.safetensors"

    def interrupt(*_):
        if (tmp_path / "int8.partial" / shard).exists():
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(directory, output, shard_bytes=60_000, progress=interrupt)
    assert [path.name for path in (tmp_path / "int8.partial").glob("model*")] == [shard]
    kept = (tmp_path / "int8.partial" / shard).stat().st_mtime_ns
    if change == "source":
        name = max(set(Checkpoint(directory).weight_map.values()))
        tensors = load_file(directory / name)
        save_file({key: 2 * tensor for key, tensor in tensors.items()}, directory / name)
    options = {"shard_bytes": 60_000, "keep_lm_head": change == "options"}
    quantize_checkpoint(directory, output, **options)
    quantize_checkpoint(directory, tmp_path / "at once", **options)
    assert files(output) == files(tmp_path / "at once")
    if change != "options":  # which change the number of shards
        assert ((output / shard).stat().st_mtime_ns == kept) == (change == "nothing")


def test_a_full_disk_is_named_before_and_keeps_whole_shards_midway(
        tiny_checkpoint, tmp_path, monkeypatch):
    directory, output = tiny_checkpoint(), tmp_path / "int8"
    shard = "model-00001-of-00004.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(quantize.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        message = r"int8 needs 0\.0 GB more and its disk has 0\.0 GB free"
        with pytest.raises(OSError, match=message) as error:
            quantize_checkpoint(directory, output)
    assert error.value.errno == errno.ENOSPC

    shards = []

    def shard_blocks(*args, blocks=quantize.shard_blocks):
        shards.append(args)
        for block in blocks(*args):
            yield block
            if len(shards) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "shard_blocks", shard_blocks)
        message = "the disk of .*int8 is full; .* the shards that are whole are kept"
        with pytest.raises(OSError, match=message):
            quantize_checkpoint(directory, output, shard_bytes=60_000)
    assert sorted(path.name for path in (tmp_path / "int8.partial").iterdir()) == ["job", shard]
    kept = (tmp_path / "int8.partial" / shard).stat().st_mtime_ns
    quantize_checkpoint(directory, output, shard_bytes=60_000)
    assert (output / shard).stat().st_mtime_ns == kept


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace or add tensors of a checkpoint in one file; None takes one out."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [
    "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(tiny_checkpoint, tmp_path, name, value):
    directory = tiny_checkpoint(dtype=torch.bfloat16)
    weight = load_file(directory / "model.safetensors")[name]
    weight.view(-1)[-3] = value
    edit_tensors(directory, **{name: weight})
    message = rf"got NaN or infinity.* of {name} .*the checkpoint is damaged: download it again"
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(directory, tmp_path / "int8", buffer_bytes=1000)
    assert not (tmp_path / "int8").exists()


def drop_shard(directory: Path) -> None:
    min(directory.glob("model-*.safetensors")).unlink()


def invent_tensor(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost"] = min(index["weight_map"].values())
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("damage", "error", "message"), [
    (drop_shard, FileNotFoundError, "does not exist; the index expects .* tensors in it"),
    (invent_tensor, ValueError, "lacks model.ghost, which the index expects there"),
    (lambda d: edit_config(d, lambda raw: raw.update(model_type="mistral")), ValueError,
     "expected 'llama'"),
    (lambda d: edit_config(d, lambda raw: raw.update(quantization_config={"quant_method": "gptq"})),
     ValueError, "got a checkpoint that is quantised already"),
    (lambda d: edit_config(d, lambda raw: raw.update(compression_config={"format": "?"})),
     ValueError, "got a checkpoint that is quantised already"),
    (lambda d: shutil.rmtree(d), FileNotFoundError,
     "got nothing there, expected a Hugging Face checkpoint directory"),
    (lambda d: (d / "config.json").unlink(), FileNotFoundError, r"config\.json does not exist"),
])
def test_a_source_that_cannot_be_converted(tiny_checkpoint, tmp_path, damage, error, message):
    directory = tiny_checkpoint(max_shard_size="50KB")
    damage(directory)
    with pytest.raises(error, match=message):
        quantize_checkpoint(directory, tmp_path / "int8")
    assert not list(tmp_path.iterdir())


def test_other_faults_of_source_and_output(tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint()
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="got an output that exists, expected a new place"):
        quantize_checkpoint(directory, tmp_path / "there")
    with pytest.raises(FileNotFoundError, match="got a parent that is no writable directory"):
        quantize_checkpoint(directory, tmp_path / "missing" / "int8")
    edit_tensors(directory, **{"model.steps": torch.zeros(3, dtype=torch.int64)})
    message = "got dtype torch.int64 for model.steps, expected floating-point weights"
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(directory, tmp_path / "int8")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only pickles"):
        quantize_checkpoint(directory, tmp_path / "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.fixture(scope="module")
def int8_checkpoint(tiny_checkpoint):
    """One converted checkpoint, not to be changed."""
    return converted(tiny_checkpoint(dtype=torch.bfloat16))


DOWN, K_PROJ = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(("changes", "message"), [
    ({f"{DOWN}.weight_zero_point": torch.zeros(64, 1)},
     f"got {DOWN}.weight_zero_point, expected weight_packed"),
    ({f"{K_PROJ}.weight_g_idx": torch.zeros(64)},
     f"got {K_PROJ}.weight_g_idx, expected weight_packed"),
    ({f"{K_PROJ}.weight_packed": None, f"{K_PROJ}.weight": torch.zeros(32, 64)},
     "got int8 for .*q_proj, .*v_proj alone"),
    ({f"{DOWN}.weight_shape": torch.tensor([64, 175])},
     rf"got weight_shape \[64, 175\] beside {DOWN}.weight_packed, expected"),
    ({f"{DOWN}.weight_packed": torch.zeros(64, 45, dtype=torch.int32)},
     rf"got shape \[64, 45\] for {DOWN}.weight_packed"),
    ({f"{DOWN}.weight_packed": torch.zeros(64, 44, dtype=torch.int64)},
     f"got dtype int64 for {DOWN}.weight_packed, expected"),
    ({f"{DOWN}.weight_scale": None}, f"lacks the tensor {DOWN}.weight_scale"),
    ({f"{K_PROJ}.weight_scale": None}, f"lacks the tensor {K_PROJ}.weight_scale"),
    ({f"{DOWN}.weight_shape": None}, f"lacks the tensor {DOWN}.weight_shape"),
    ({f"{DOWN}.weight_packed": None}, f"lacks the tensor {DOWN}.weight,"),
    ({f"{DOWN}.weight_scale": torch.ones(64, 2)},
     rf"got shape \[64, 2\] for {DOWN}.weight_scale, expected \[64, 1\]"),
    ({f"{DOWN}.weight_scale": torch.ones(64, 1, dtype=torch.float64)},
     f"got dtype float64 for {DOWN}.weight_scale, expected"),
])
def test_tensors_that_contradict_the_layout(int8_checkpoint, tmp_path, changes, message):
    directory = shutil.copytree(int8_checkpoint, tmp_path / "damaged")
    edit_tensors(directory, **changes)
    with pytest.raises(ValueError, match=message):
        Transformer.from_checkpoint(directory)


@pytest.mark.parametrize("which", ["target", "draft", "both"])
@torch.no_grad()
def test_engine_runs_int8_models_in_every_rule(tiny_checkpoint, which):
    directory = tiny_checkpoint()
    output = converted(directory)
    target, draft = (
        Transformer.from_checkpoint(output if which in (role, "both") else directory,
                                    dtype=torch.float32) for role in ("target", "draft"))
    draft.layers = draft.layers[:1]  # agrees with the target at times
    prompt, head = [456, 7, 3, 11, 5], random_head(64)
    alone = greedy(target, prompt, 20)
    engine = Engine(target, draft, head, speculate_k=4, stop_tokens=(), max_seq_length=128)
    for rule in ("none", "exact"):
        assert run(engine, prompt, 20, rule=rule) == alone, rule
    blocks = list(engine.generate(prompt, max_new_tokens=20))
    tokens, sources = judged(target, draft, head, prompt, 20, 4, 0.5)
    assert [token for block in blocks for token in block.tokens] == tokens
    assert [source for block in blocks for source in block.sources] == sources
    assert {"exact", "judge"} < set(sources)


def test_command_line_as_a_user_runs_it(tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint(dtype=torch.bfloat16)
    output = directory.with_name(f"{directory.name}-int8")
    command = ("quantize.py", "--mode", "int8", "--checkpoint_path", directory)
    done = python(*command)
    assert done.returncode == 0, done.stderr
    assert f"{directory}: 0.000 GB of weights\n{output}: 0.000 GB (6" in done.stdout
    assert "python generate.py" in done.stdout
    again = python(*command)
    assert again.returncode == 2 and again.stdout == ""
    assert f"quantize.py: {output}: got an output that exists, expected a new place" in again.stderr
    assert "Traceback" not in again.stderr
    done = python("generate.py", "--no-compile", "--checkpoint_path", output, "--prompt", "hi",
                  "--max_new_tokens", 4, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    [sample] = json.loads((tmp_path / "out.json").read_text())
    assert sample["new_tokens"] == 4 or sample["finish_reason"] == "stop"
