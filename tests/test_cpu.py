"""cpu.py: every route of a linear layer against float64, what is packed, and steps by rows in use.

A product in float32 may be summed in any order, so the bound is that of the worst order and holds
for every processor. The routes: a fused loop (compiled, few rows), oneDNN's packed copy, torch's
own product, torch's int8 product.
"""

import copy
import functools
import os
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_generate import near, random_model
from torch import nn

import cpu
from cpu import CpuInt8Linear, CpuLinear, Step, can_compile, can_pack, keep_packed
from generate import Engine
from model import Transformer, compiled
from quantize import Int8Linear, quantize_rows

ROOT = Path(__file__).resolve().parent.parent
ROWS = (1, 2, 3, 12, 13, 17, 40)  # on either side of FEW_ROWS, INT8_ROWS and a packing's 16
K, N = 352, 83
DTYPES = [torch.float32, torch.bfloat16]
compile_test = pytest.mark.skipif(can_compile(torch.device("cpu")) is not None,
                                  reason="needs a C++ compiler and Python.h")
compilations = pytest.mark.parametrize(
    "compile", [False, pytest.param(True, marks=compile_test)], ids=["plain", "compiled"])


def within_bound(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
                 scale: torch.Tensor | None = None, *, product_rounded: bool = False) -> bool:
    """Whether |y - exact| <= (K + 1) ε Σ|x·w| for each element, and then rounded once to its dtype.

    ε = 2^-23. That bounds float32 sums in any order (Higham, Accuracy and Stability, 4.2): K - 1
    additions, at most one rounding for each product, one for the scale; a rounding is ε / 2, and
    hardware that cuts off instead makes it ε. product_rounded: the sum may be stored in y's
    dtype before the scale, which is one rounding more of that dtype.
    """
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    slack = (x.shape[-1] + 1) * torch.finfo(torch.float32).eps * size
    low, high = exact - slack, exact + slack
    if product_rounded:
        low = torch.minimum(low, low.to(y.dtype).double())
        high = torch.maximum(high, high.to(y.dtype).double())
    if scale is not None:
        low, high = low * scale.double(), high * scale.double()
    assert y.dtype == x.dtype and y.shape == exact.shape
    return bool(((low.to(y.dtype) <= y) & (y <= high.to(y.dtype))).all())


def make_rows(rows: int, dtype: torch.dtype, columns: int = K) -> torch.Tensor:
    """x [1, rows, columns], every other column of a larger tensor, with an outlier."""
    x = torch.randn(1, rows, 2 * columns, generator=torch.Generator().manual_seed(rows))
    x[..., 2 * (columns // 2)] *= 1000
    return x.to(dtype)[..., ::2]


def make_linear(dtype: torch.dtype, *, packed: bool, seed: int = 0) -> CpuLinear:
    torch.manual_seed(seed)
    layer = CpuLinear(K, N, bias=False).to(dtype)
    layer.packed = packed and keep_packed(layer.weight, dtype)
    return layer


def make_int8(scale_dtype: torch.dtype = torch.bfloat16, columns: int = K) -> CpuInt8Linear:
    """A channel of zeros, one of outliers; scales in float32 have bits that bfloat16 lacks."""
    weight = 0.02 * torch.randn(N, columns, generator=torch.Generator().manual_seed(1))
    weight[1] = 0
    weight[2] *= 100
    layer = CpuInt8Linear(columns, N, scale_dtype=scale_dtype)
    layer.weight.data, scale = quantize_rows(weight)
    layer.scale.data = (1.0013 * scale[:, 0].float()).to(scale_dtype)
    return layer


def products(layers: list[nn.Module], xs: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [[layer(x) for x in xs] for layer in layers]


# ---- linear layers

@compilations
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_linear_follows_float64(dtype, compile, monkeypatch):
    """In every number of rows, with a packed copy and without; in one graph where compiled."""
    copies = []
    real = cpu.packed_copy
    layers = [make_linear(dtype, packed=False), make_linear(dtype, packed=True, seed=1)]
    monkeypatch.setattr(cpu, "packed_copy", lambda *args: copies.append(real(*args)) or copies[-1])
    assert layers[1].packed == can_pack(dtype)
    xs = [make_rows(rows, dtype) for rows in ROWS]
    found = (compiled(products) if compile else products)(layers, xs)
    for layer, ys in zip(layers, found):
        for x, y in zip(xs, ys):
            assert y.shape == (*x.shape[:2], N)
            assert within_bound(y[0], x[0], layer.weight), x.shape
    looped = sum(rows <= cpu.FEW_ROWS for rows in ROWS) if compile else 0
    assert len(copies) == (len(ROWS) - looped) * layers[1].packed
    assert all(found is not None for found in copies)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@compilations
@torch.no_grad()
def test_int8_linear_follows_float64(dtype, scale_dtype, compile):
    """torch's int8 product, which takes bfloat16 alone, accumulates in float32. The last route
    stores the product in x's dtype before it scales it."""
    alike = dtype is scale_dtype is torch.bfloat16
    layer, xs = make_int8(scale_dtype), [make_rows(rows, dtype) for rows in ROWS]
    [ys] = (compiled(products) if compile else products)([layer], xs)
    for x, y in zip(xs, ys):
        rows = x.shape[1]
        last = not (alike and rows <= cpu.INT8_ROWS or compile and rows <= cpu.FEW_ROWS)
        assert y.shape == (1, rows, N)
        assert within_bound(y[0], x[0], layer.weight, layer.scale, product_rounded=last), rows


@pytest.mark.parametrize("columns", [7, 8, 24, 91, 179, 301])
@pytest.mark.parametrize("rows", [1, 5, 12])
@torch.no_grad()
def test_int8_linear_takes_any_number_of_inputs(columns, rows):
    """torch's int8 product reads 16 inputs at once: past the end, a wrong sum or a crash."""
    layer, x = make_int8(columns=columns), make_rows(rows, torch.bfloat16, columns)
    y = layer(x)[0]
    assert within_bound(y, x[0], layer.weight, layer.scale, product_rounded=True)


def in_bfloat16(x, weight):
    return functools.reduce(torch.add, (x[:, None, k] * weight[:, k] for k in range(x.shape[1])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 17])
@torch.no_grad()
def test_bound_lets_no_planted_bug_pass(rows, dtype):
    """Sums in bfloat16, an input left out, a neighbour's weights or scale, a scale in bfloat16."""
    x, layer = make_rows(rows, dtype)[0], make_int8(torch.float32)
    weight, scale = layer.weight.to(dtype), layer.scale
    exact = (x.double() @ weight.double().T * scale.double()).to(dtype)
    rounded = (F.linear(x, weight) * scale).to(dtype)
    short = (F.linear(x[:, :-1], weight[:, :-1]) * scale).to(dtype)
    for y, right in ((exact, True), (rounded, True), (short, False),
                     ((in_bfloat16(x.bfloat16(), weight.bfloat16()) * scale).to(dtype), False),
                     ((F.linear(x, weight) * scale.roll(1)).to(dtype), False),
                     ((F.linear(x, weight.roll(1, 0)) * scale).to(dtype), False),
                     ((F.linear(x, weight) * scale.bfloat16()).to(dtype), False)):
        assert within_bound(y, x, weight, scale, product_rounded=True) is right


def test_the_packed_operator_describes_itself_rightly():
    x, weight = torch.randn(5, 12), torch.randn(7, 12)
    keep_packed(weight, x.dtype)
    torch.library.opcheck(torch.ops.gavel.packed_linear.default, (x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_written_weight_is_not_the_packed_one(dtype):
    if not can_pack(dtype):
        pytest.skip(f"this CPU does not pack {dtype}")
    layer, x = make_linear(dtype, packed=True), make_rows(3, dtype)
    assert cpu.packed_copy(layer.weight, dtype) is not None
    layer.weight[5] *= 3
    assert cpu.packed_copy(layer.weight, dtype) is None
    assert within_bound(layer(x)[0], x[0], layer.weight)
    layer.packed = keep_packed(layer.weight, dtype)  # packed anew
    assert cpu.packed_copy(layer.weight, dtype) is not None
    assert within_bound(layer(x)[0], x[0], layer.weight)
    layer.weight = nn.Parameter(layer.weight + 1)
    assert cpu.packed_copy(layer.weight, dtype) is None
    assert within_bound(layer(x)[0], x[0], layer.weight)


def test_what_cannot_be_packed_is_not(tmp_path, monkeypatch):
    weight = torch.randn(7, 12)
    assert not keep_packed(weight.double(), torch.float64)
    with torch.inference_mode():
        assert not keep_packed(torch.randn(7, 12), torch.float32)
    layer = CpuLinear(12, 7, bias=False)
    layer.packed = keep_packed(layer.weight, torch.float32)
    assert layer.packed
    with torch.no_grad():
        assert layer(torch.ones(0, 12)).shape == (0, 7)
        assert layer.double()(torch.ones(2, 12).double()).dtype is torch.float64
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_pack(torch.float32) and not keep_packed(weight, torch.float32)


@torch.no_grad()
def test_a_copy_of_a_layer_leaves_the_packed_one_behind(tmp_path):
    layer, x = make_linear(torch.float32, packed=True), make_rows(3, torch.float32)
    size = layer.weight.nbytes
    torch.save(layer, tmp_path / "layer.pt")
    assert (tmp_path / "layer.pt").stat().st_size < 1.5 * size
    read = torch.load(tmp_path / "layer.pt", weights_only=False)
    for other in (copy.deepcopy(layer), read):
        assert type(other) is CpuLinear and cpu.packed_copy(other.weight, torch.float32) is None
        other.weight[:] *= 2
        assert within_bound(other(x)[0], x[0], 2 * layer.weight)
    assert within_bound(layer(x)[0], x[0], layer.weight)


def test_linear_is_differentiable():
    layer, x = make_linear(torch.float32, packed=True), make_rows(3, torch.float32)
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad[0], layer.weight.grad[N - 1])
    torch.testing.assert_close(layer.weight.grad[0], x[0].sum(0))


# ---- whole models

@torch.no_grad()
def test_prepare_gives_layers_their_routes_and_packs_what_fits(monkeypatch):
    def logits(model: Transformer) -> torch.Tensor:
        return model.logits(model(torch.arange(12)[None])).float()

    plain, packed, large = (random_model(1) for _ in range(3))
    for model in (packed, large):
        model.layers[0].mlp.down_proj = Int8Linear.from_linear(model.layers[0].mlp.down_proj)
    plain.layers[0].mlp.down_proj = Int8Linear.from_linear(plain.layers[0].mlp.down_proj)
    cpu.prepare(packed)
    size = sum(m.weight.numel() for m in large.modules() if isinstance(m, nn.Linear)) * 4
    monkeypatch.setattr(cpu, "MAX_PACKED_BYTES", size - 1)
    cpu.prepare(large)
    for model, fits in ((packed, True), (large, False)):
        kinds = [type(m) for m in model.modules() if isinstance(m, nn.Linear | Int8Linear)]
        assert kinds.count(CpuLinear) == 8 and kinds.count(CpuInt8Linear) == 1 == len(kinds) - 8
        assert {m.packed for m in model.modules() if isinstance(m, CpuLinear)} == {fits}
    ref = logits(plain)
    for model in (packed, large):
        torch.testing.assert_close(logits(model), ref, rtol=0, atol=1e-4)
    monkeypatch.setattr(cpu, "MAX_PACKED_BYTES", size)  # exactly what it takes
    cpu.prepare(large)
    assert all(m.packed for m in large.modules() if isinstance(m, CpuLinear))
    packed.to(torch.bfloat16)  # replaces the weights
    assert (logits(packed) - ref).norm() < 0.1 * ref.norm()
    assert type(copy.deepcopy(packed).lm_head) is CpuLinear


def test_a_cpu_without_bfloat16_runs_it_unpacked(tiny_checkpoint):
    """oneDNN as on a CPU with AVX2 alone."""
    code = """
        import sys, torch
        from generate import Engine
        from model import Transformer
        target = Transformer.from_checkpoint(sys.argv[1], dtype=torch.bfloat16)
        engine = Engine(target, max_seq_length=64, stop_tokens=())
        print(*[token for block in engine.generate([1, 2, 3], max_new_tokens=5)
                for token in block.tokens], target.lm_head.packed)"""
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tiny_checkpoint())],
                         cwd=ROOT, capture_output=True, text=True, timeout=120,
                         env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert out.returncode == 0, out.stderr
    *tokens, packed = out.stdout.split()
    assert len(tokens) == 5 and packed == "False"


# ---- steps

def hidden_states(model, tokens, input_pos, *, rows, steps=1):
    return model(tokens, input_pos, rows)


def with_cache(length: int, *, dead: float) -> Transformer:
    model = random_model(1, num_layers=1)
    model.setup_caches(1, length)
    for rows in (model.layers[0].self_attn.cache.k, model.layers[0].self_attn.cache.v):
        rows.fill_(dead)
    return model


@pytest.mark.parametrize("pos, steps, rows", [
    (0, 1, 64), (63, 1, 64), (64, 1, 128), (60, 5, 128), (60, 4, 64), (130, 1, 192),
    (193, 1, 199), (198, 1, 199)])
def test_rows_in_use_are_rounded_up_and_never_all(pos, steps, rows):
    """Never all: a dynamic size that may be the whole cache's would compile twice."""
    model = with_cache(200, dead=0.0)
    step = Step(lambda model, tokens, input_pos, rows, steps=1: rows, compile=False)
    seen = step(model, torch.zeros(1, 2).long(), torch.tensor([max(pos - 1, 0), pos]), steps=steps)
    assert torch.equal(seen, torch.arange(rows))
    assert seen.data_ptr() == model.rows.data_ptr()


@compilations
@torch.no_grad()
def test_steps_agree_whatever_dead_rows_hold_and_compile_once(compile):
    """Rows past those in use hold NaN, dead rows among them noise. Of one step all positions are
    one graph; short chunks run uncompiled where lengths are dynamic."""
    from torch._dynamo.utils import counters

    T = 500
    tokens = torch.randint(0, 97, (1, T - 1), generator=torch.Generator().manual_seed(0))
    model = with_cache(T, dead=float("nan"))
    reference = model(tokens)
    read, one = (Step(hidden_states, compile=compile, dynamic=dynamic) for dynamic in (True, False))
    calls, graphs = [], []
    plain = read.plain
    read.plain = lambda *args, **options: calls.append(args[1].shape[1]) or plain(*args, **options)
    if not compile:
        read.run = read.plain
    lengths = [17, 1, 16, 15, 40, 1, 130, 2, 80, 61, 1, 90]
    start = 0
    for length in lengths:
        end = start + length
        used = -(-end // cpu.ROW_STEP) * cpu.ROW_STEP
        for rows in (model.layers[0].self_attn.cache.k, model.layers[0].self_attn.cache.v):
            rows[:, :, start:used] = 1e4 * torch.randn(rows[:, :, start:used].shape)
        step = one if length == 1 else read
        hidden = step(model, tokens[:, start:end], torch.arange(start, end))
        torch.testing.assert_close(hidden, reference[:, start:end], rtol=1e-4, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
        start = end
    if compile:
        assert calls == [length for length in lengths if 1 < length < cpu.PREFILL_COMPILED]
        first = {kind: lengths.index(kind) for kind in (17, 1)}
        assert graphs[-1] == graphs[max(first.values())]


def test_an_engine_reads_no_row_past_those_in_use():
    """NaN there would reach every token through 0 · NaN."""
    target = random_model(1)
    engine = Engine(target, near(target, 0.05), speculate_k=4, stop_tokens=(), max_seq_length=256)
    prompt = [7, 3, 11, 5]

    def answer():
        return [token for block in engine.generate(prompt, max_new_tokens=40)
                for token in block.tokens]

    first = answer()
    for model in engine.models:
        for layer in model.layers:
            layer.self_attn.cache.k[:, :, 64:] = layer.self_attn.cache.v[:, :, 64:] = torch.nan
    assert answer() == first


def test_whether_torch_can_compile(monkeypatch, tmp_path):
    device = torch.device("cpu")
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    assert can_compile(device) is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert can_compile(device) == "no C++ compiler (no-such-compiler) found"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert can_compile(device) == "no C++ compiler (g++ or clang++) found"
    compiler.rename(tmp_path / "clang++")
    assert can_compile(device) is None
    (tmp_path / "Python.h").unlink()
    assert "no Python.h found" in can_compile(device)
    assert can_compile(torch.device("cuda")) is None
