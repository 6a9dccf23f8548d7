"""attention.py: the kernel and torch against float64, whatever dead rows hold, layouts and splits.

The kernel runs on a GPU where there is one, else under Triton's interpreter (TRITON_INTERPRET=1
before triton is imported: tests/conftest.py).
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from types import FunctionType

import pytest
import torch

import attention
from attention import MAX_TILES, KVCache, attend_options, attend_torch, attend_triton

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available() and attention.triton is not None and not attention.INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
kernel_test = pytest.mark.skipif(
    not (GPU or attention.INTERPRETED),
    reason="needs triton, and a GPU or TRITON_INTERPRET=1 before triton is imported")
COMPILERS = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
compile_test = pytest.mark.skipif(
    not (any(map(shutil.which, COMPILERS))
         and Path(sysconfig.get_path("include"), "Python.h").is_file()),
    reason="needs a C++ compiler and Python.h")
LENGTH = 384  # T


def make_attention(S: int, length: int, G: int, Dh: int, dtype: torch.dtype, *, batch: int = 1,
                   dead: str = "zero") -> tuple:
    """(q, k, v, input_pos) as a model has them: parts of stacked projections and of larger caches.

    Two key heads; a key row of outliers. Rows past the last position hold what `dead` names.
    """
    generator = torch.Generator().manual_seed(S * length * G * Dh)
    q = torch.randn(batch, S, 2 * G + 4, Dh, generator=generator).transpose(1, 2)
    caches = torch.randn(2, batch + 1, 3, LENGTH, Dh, generator=generator)
    caches[0, :, :, length // 2] *= 4
    caches[:, :, :, length:] = {"zero": 0.0, "nan": torch.nan, "inf": torch.inf, "noise": 1e4}[dead]
    k, v = caches.to(dtype).to(DEVICE)[:, :batch, 1:]
    return q.to(dtype).to(DEVICE)[:, :2 * G], k, v, torch.arange(length - S, length, device=DEVICE)


def make_arrivals() -> torch.Tensor:
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=DEVICE)


def force_splits(monkeypatch, splits: int) -> None:
    monkeypatch.setattr(attention, "attend_options",
                        lambda *args: attend_options(*args) | {"SPLITS": splits})


def attention_bound(q, k, v, input_pos, *, weights: float, scores: float, products: float) -> tuple:
    """(y, bound) [B, H, S, Dh] in float64: exact attention, and how far fp32 sums can be from it.

    With s = q·k/√Dh, a = Σ|q·k|/√Dh >= |s|, n live rows, and ε = 2^-23 a rounding (twice that of
    float32, as tensor cores cut off), in the worst case:

    - A score is off by ε (Dh + 3) a: Dh products, each in Dh additions at most, the constant
      log2 e / √Dh, and the product with it. Stored in 16 bits it is off by `scores` |s| more.
    - A weight exp(s - max) is off, relatively, as its argument is: a difference, rounded. Later
      exp(old max - new max) rescales it, in its split and in the merge. Each of these kinds of
      differences adds up to 2 max a, with half an ε: ε 4 max a for all of them.
    - Σ p and Σ p v take n additions, and fewer than n + 16 exponentials, products and quotients.
    - So e = exp(ε ((Dh + 3) a + 4 max a + 2 n + 16) + scores |s|) - 1 bounds each weight's relative
      error, and that of Σ p v over Σ p is within (Σ p e |v| + |y| Σ p e) / (1 - Σ p e).
    - Weights stored in 16 bits, for the second product alone, add `weights` Σ p |v|, and 2^-24
      Σ |v| where float16 ends, as Σ p is 1 at least before the division. A second product stored
      in 16 bits adds `products` Σ p |v|.

    No processor can be past it, in whatever order it adds; nothing in it was fitted.
    """
    eps, Dh, group = 2.0**-23, q.shape[-1], q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, dim=1) for x in (k, v))
    live = torch.arange(k.shape[2], device=q.device) <= input_pos[:, None]  # [S, T]
    s, a = (x @ y.mT * Dh**-0.5 for x, y in ((q, k), (q.abs(), k.abs())))
    s, a = s.masked_fill(~live, -torch.inf), a.masked_fill(~live, 0)
    p, n = s.softmax(-1), live.sum(-1)[:, None]
    e = torch.expm1(eps * ((Dh + 3) * a + 4 * a.amax(-1, keepdim=True) + 2 * n + 16)
                    + scores * s.abs().masked_fill(~live, 0))
    y, wrong = p @ v, (p * e).sum(-1, keepdim=True)
    bound = ((p * e) @ v.abs() + y.abs() * wrong) / (1 - wrong)
    bound += (weights + products) * (p @ v.abs())
    return y, bound + (weights > 0) * 2.0**-24 * (live.double() @ v.abs())


def within_bound(y, q, k, v, input_pos, *, reference: bool = False) -> bool:
    """Whether every element is within attention_bound and one rounding to y.dtype of float64.

    That rounding is a whole ε of the dtype, as Triton's interpreter cuts bfloat16 off, and
    float16's smallest step. The interpreter keeps weights in float32 and a GPU rounds them to v's
    dtype; torch, the `reference`, may store every intermediate in that dtype.
    """
    assert y.dtype == q.dtype and y.shape == q.shape
    half, eps = y.dtype is not torch.float32, torch.finfo(y.dtype).eps
    exact, bound = attention_bound(
        q, k, v, input_pos, weights=half * (GPU or reference) * eps / 2,
        scores=half * reference * eps, products=half * reference * eps)
    bound += eps * (exact.abs() + bound) + 2.0**-24 * (y.dtype is torch.float16)
    return bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("S", [1, 5])
def test_reference_attends_to_rows_up_to_each_position(S):
    q, k, v, input_pos = make_attention(S, 33, 4, 16, torch.float64, batch=2, dead="noise")
    y = attend_torch(q, k, v, input_pos)
    for b, h, s in itertools.product(range(2), range(8), range(S)):
        rows = input_pos[s] + 1
        p = (k[b, h // 4, :rows] @ q[b, h, s] / 4).softmax(0)
        torch.testing.assert_close(y[b, h, s], p @ v[b, h // 4, :rows], rtol=1e-12, atol=1e-12)


def test_cache_keeps_position_p_in_row_p():
    cache = KVCache(3, 2, 10, 4, dtype=torch.bfloat16, device=DEVICE)
    k, v = torch.randn(2, 2, 2, 3, 4, device=DEVICE).bfloat16()
    rows = torch.tensor([4, 5, 6], device=DEVICE)
    all_k, all_v = cache.update(rows, k, v)
    assert all_k.shape == all_v.shape == (2, 2, 10, 4) and all_k.data_ptr() == cache.k.data_ptr()
    for got, new, kept in ((all_k, k, cache.k), (all_v, v, cache.v)):
        assert torch.equal(got[:, :, rows], new)
        assert kept[2].eq(0).all() and kept.count_nonzero() == new.count_nonzero()
    assert cache.arrivals.tolist() == [0] * MAX_TILES and not cache.state_dict()


def merge(q, k, v, input_pos, *, rescale: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Attention in blocks of 32 rows, summed in `dtype`, each by its own max if not `rescale`."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    s = (q.float() @ k.float().mT * q.shape[-1]**-0.5).masked_fill(
        torch.arange(k.shape[2], device=q.device) > input_pos[:, None], -torch.inf)
    top, acc, total = s.amax(-1, keepdim=True), torch.zeros_like(q, dtype=dtype), 0.0
    for part, rows in zip(s.split(32, dim=-1), v.split(32, dim=2)):
        live = part.amax(-1, keepdim=True).clamp(min=-1e38)
        p = torch.exp(part - (top if rescale else live))
        acc, total = (acc + p @ rows.float()).to(dtype), total + p.sum(-1, keepdim=True)
    return (acc / total).to(q.dtype)


@pytest.mark.parametrize("Dh", [16, 128])
@pytest.mark.parametrize("S", [1, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bound_lets_no_planted_bug_pass(dtype, S, Dh):
    """Masks off by one, merges without maxima, another head's keys, sums in bfloat16, TF32.

    A GPU rounds weights to bfloat16, and sums in bfloat16 err no more: float32 and float16 show
    them. One row of TF32 can be as good as the worst float32 allowed; 17 rows cannot.
    """
    inputs = q, k, v, input_pos = make_attention(S, 300, 4, Dh, dtype)
    k[:, :, 300], v[:, :, 300] = k[:, :, 7], v[:, :, 7]  # the first dead row is one like others
    assert within_bound(merge(*inputs, rescale=True), *inputs)
    assert not within_bound(merge(q, k, v, input_pos - 1, rescale=True), *inputs)
    assert not within_bound(merge(q, k, v, input_pos + 1, rescale=True), *inputs)
    assert not within_bound(merge(*inputs, rescale=False), *inputs)
    assert not within_bound(merge(q, k.flip(1), v.flip(1), input_pos, rescale=True), *inputs)
    if not (GPU and dtype is torch.bfloat16):
        assert not within_bound(merge(*inputs, rescale=True, dtype=torch.bfloat16), *inputs)
    if dtype is torch.float32 and S > 1:
        q, k, v = ((x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for x in (q, k, v))
        assert not within_bound(merge(q, k, v, input_pos, rescale=True), *inputs)


@kernel_test
@pytest.mark.parametrize("S", [1, 2, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_kernel_follows_float64(monkeypatch, dtype, S):
    """Every pair of group, head dim, length and splits; whatever dead rows hold."""
    for i, j in itertools.product(range(3), range(3)):
        G, Dh = (1, 4, 8)[i], (16, 40, 128)[j]
        length, splits = max(S, (1, 33, 300)[(i + j) % 3]), (1, 2, 5)[(i + 2 * j) % 3]
        dead = ("nan", "inf", "noise")[j]
        force_splits(monkeypatch, splits)
        arrivals = make_arrivals()
        y = attend_triton(*make_attention(S, length, G, Dh, dtype, dead=dead), arrivals)
        assert within_bound(y, *make_attention(S, length, G, Dh, dtype))
        assert not arrivals.any()


@kernel_test
@pytest.mark.parametrize(("S", "G", "batch"), [(70, 4, 1), (17, 8, 2), (1, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_kernel_in_row_blocks_and_batches(dtype, S, G, batch):
    arrivals = make_arrivals()
    y = attend_triton(*make_attention(S, 171, G, 80, dtype, batch=batch, dead="nan"), arrivals)
    assert within_bound(y, *make_attention(S, 171, G, 80, dtype, batch=batch))
    assert not arrivals.any()


@kernel_test
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_attention_kernel_repeats_itself_to_the_bit(monkeypatch, splits):
    force_splits(monkeypatch, splits)
    arguments, arrivals = make_attention(7, 300, 4, 40, torch.float32), make_arrivals()
    first = attend_triton(*arguments, arrivals)
    assert torch.equal(attend_triton(*arguments, arrivals), first) and not arrivals.any()


@kernel_test
def test_attention_kernel_takes_any_layout():
    q, k, v, input_pos = make_attention(2, 65, 4, 40, torch.float32)
    y = attend_triton(q, k, v, input_pos, make_arrivals())
    for layout in (lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT,
                   lambda x: x.repeat(1, 1, 1, 2)[..., :40]):
        assert torch.equal(attend_triton(*map(layout, (q, k, v)), input_pos, make_arrivals()), y)


@kernel_test
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("S", [1, 9])
def test_attention_kernel_touches_nothing_outside(S, splits):
    """NaN after the queries, in dead rows and in scratch; marks around what may be written."""
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
    attention.attend_kernel[grid](
        out[1:-1], partial[1:-1], arrivals[1:-1], queries, 0, 48, 8 * 48, k, *k.stride()[:3],
        v, *v.stride()[:3], input_pos, 2, 4, S, HEAD_DIM=40, SPLIT=splits > 1,
        UPCAST=attention.INTERPRETED, **options)
    y = out[1:-1].transpose(0, 1)[None]
    assert within_bound(y, *make_attention(S, 100, 4, 40, torch.float32))
    assert out[0].eq(7).all() and out[-1].eq(7).all() and partial[[0, -1]].isnan().all()
    assert arrivals.tolist() == [5, *[0] * (grid[0] * grid[1]), 5]
    assert partial[1:-1].isnan().all() == (splits == 1)


def test_attention_splits_follow_shape_and_chip():
    def splits(*args):
        return attend_options(*args)["SPLITS"]

    decode, verify, prefill = (splits(rows, 8, 4096, 128, 2, 132) for rows in (4, 68, 2048))
    assert decode * 8 <= 132 < (decode + 1) * 8 and 1 < verify < decode
    assert prefill == splits(4, 256, 4096, 128, 2, 132) == 1
    assert splits(4, 1, 100, 64, 2, 132) <= 2 and splits(4, 2000, 10**6, 128, 2, 10**6) == 1


def compiled(function):
    """A copy of function, compiled: torch counts recompilations by code object."""
    copy = FunctionType(function.__code__.replace(), function.__globals__,
                        closure=function.__closure__)
    return torch.compile(copy, dynamic=False, fullgraph=True)


def attend(*arguments: torch.Tensor) -> torch.Tensor:
    return torch.ops.gavel.attend(*arguments)


@kernel_test
def test_attention_operator_tells_torch_what_it_writes(monkeypatch):
    force_splits(monkeypatch, 2)
    operator = torch.ops.gavel.attend.default
    inputs = make_attention(5, 65, 4, 16, torch.float32)
    torch.library.opcheck(operator, (*inputs, make_arrivals()))
    assert [a.name for a in operator._schema.arguments if a.is_write] == ["arrivals"]


@kernel_test
@compile_test
@torch.no_grad()
def test_compiled_attention_operator_is_the_kernel(monkeypatch):
    """Two calls in one graph share the arrival counters, and find them zero."""
    def twice(q, k, v, input_pos, arrivals):
        y = attend(q, k, v, input_pos, arrivals)
        return attend(y, k, v, input_pos, arrivals)

    force_splits(monkeypatch, 3)
    arguments, arrivals = make_attention(5, 100, 4, 16, torch.float32), make_arrivals()
    y = attend(*arguments, arrivals)
    y = attend(y, *arguments[1:], arrivals)
    got = compiled(twice)(*arguments, arrivals)
    assert torch.equal(got, y) and got.stride() == y.stride() and y.transpose(1, 2).is_contiguous()
    assert not arrivals.any()


@compile_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("S", "G", "Dh", "dead"),
                         [(1, 1, 40, "zero"), (2, 4, 64, "noise"), (1, 8, 24, "noise")])
@torch.no_grad()
def test_compiled_attention_of_few_rows_follows_float64(S, G, Dh, dead, dtype):
    y = compiled(attend_torch)(*make_attention(S, 171, G, Dh, dtype, dead=dead))
    assert within_bound(y, *make_attention(S, 171, G, Dh, dtype), reference=True)


def test_attention_kernel_without_gpu_and_interpreter_is_an_error(monkeypatch):
    monkeypatch.setattr(attention, "INTERPRETED", False)
    arguments = [x.cpu() for x in (*make_attention(1, 33, 4, 16, torch.float32), make_arrivals())]
    with pytest.raises(ValueError, match=r"impl='triton': got (no triton package|tensors on cpu), "
                                         r"expected triton and a GPU"):
        attend_triton(*arguments)


def test_module_works_where_triton_is_missing():
    script = """
        import sys
        sys.modules["triton"] = None
        import torch, attention
        q, pos = torch.randn(1, 2, 3, 8), torch.arange(3)
        print(attention.attend_torch(q, q, q, pos).shape == q.shape, attention.INTERPRETED)
        try:
            torch.ops.gavel.attend(q, q, q, pos, torch.zeros(1))
        except ValueError as error:
            print(error)"""
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT,
                         capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.startswith("True False\nimpl='triton': got no triton package, expected ")


@pytest.mark.slow
@pytest.mark.skipif(attention.triton is None, reason="needs triton")
def test_attention_builds_ahead_of_time_without_spills():
    """64 KiB of shared memory is gfx942's, 99 KiB the smallest of NVIDIA's chips since sm_80."""
    targets = {"sm_80": 101376, "sm_90": 101376, "gfx942": 65536}
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "scripts/aot.py", "--module", "attention", "--target", *targets]
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    built = [json.loads(line) for line in out.stdout.splitlines()]
    for target, shared in targets.items():
        kernels = [entry for entry in built if entry["target"] == target]
        assert {entry["kernel"].split()[1] for entry in kernels} == {"bf16", "fp16", "fp32"}
        assert {entry["kernel"].split()[-1] for entry in kernels} == {"64", "128"}
        assert len({entry["grid"][2] for entry in kernels}) > 1  # with and without splits
        for entry in kernels:
            assert entry["spills"] == 0 < entry["registers"] and entry["shared"] <= shared, entry
