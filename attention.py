"""Grouped-query attention over a static key-value cache: a torch reference and a Triton kernel.

Position p lives in row p; rows past the committed position are dead until they are overwritten.
Shapes are fixed, so something must bound what a step reads. On CUDA the kernel reads positions on
the device: it costs what the length in use costs and touches no dead row. Elsewhere attention is
masked over the rows that the caller hands over; dead ones must be finite.

Shapes: B batch, S new tokens, T cache length, H heads, Hkv key-value heads, G = H/Hkv, Dh head dim.

    k, v = cache.update(input_pos, k, v)                                     # [B, Hkv, T, Dh]
    y = torch.ops.gavel.attend(q, k, v, input_pos, cache.arrivals)           # on CUDA
    y = grouped_attention(q, k[:, :, :n], v[:, :, :n], rows[:n] <= input_pos[:, None])  # elsewhere

Sources: grouped queries (arXiv 2305.13245), online softmax (1805.02867), splits (Flash-Decoding).
The kernel has no backward pass, no mask but the causal one, one set of positions a batch.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # no triton for this platform: the torch route still runs
    triton = None

MAX_TILES = 1024  # Most tiles that split attention may count; no GPU has as many multiprocessors.
jit = triton.jit if triton else lambda kernel: kernel


class KVCache(nn.Module):
    """Keys and values [B, Hkv, T, Dh] of one layer, and the kernel's arrival counters."""

    def __init__(self, batch: int, kv_heads: int, length: int, head_dim: int, *,
                 dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        shape = (batch, kv_heads, length, head_dim)
        for name, size, kind in (("k", shape, dtype), ("v", shape, dtype),
                                 ("arrivals", MAX_TILES, torch.int32)):
            zeros = torch.zeros(size, dtype=kind, device=device)
            self.register_buffer(name, zeros, persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, Hkv, S, Dh] to rows input_pos [S]; return all T rows of these B."""
        all_k, all_v = self.k[:k.shape[0]], self.v[:v.shape[0]]
        all_k[:, :, input_pos], all_v[:, :, input_pos] = k, v
        return all_k, all_v


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, H, S, Dh], k and v [B, Hkv, T, Dh], mask bool [S, T] (True: attend) -> [B, H, S, Dh].

    The G query heads of a key head become rows of one query: keys and values are read once.
    """
    (B, H, S, Dh), kv_heads = q.shape, k.shape[1]
    y = F.scaled_dot_product_attention(q.reshape(B, kv_heads, -1, Dh), k, v,
                                       attn_mask=mask.repeat(H // kv_heads, 1))
    return y.reshape(B, H, S, Dh)


def attend_torch(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
    """The reference: q [B, H, S, Dh], k and v [B, Hkv, T, Dh], input_pos [S] -> [B, H, S, Dh].

    Row s attends to cache rows 0..input_pos[s]; head h uses key head h // G. Float64 works too.
    """
    rows = torch.arange(k.shape[2], device=q.device)
    return grouped_attention(q, k, v, rows <= input_pos[:, None])


@jit
def attend_kernel(out, partial, arrivals, q, stride_qb, stride_qh, stride_qs, k, stride_kb,
                  stride_kh, stride_kt, v, stride_vb, stride_vh, stride_vt, input_pos, kv_heads,
                  group, S, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[s, g] = softmax(q[s, g] k^T / sqrt(Dh)) v over cache rows 0..input_pos[s], in fp32.

    Grid (B·Hkv, tiles of BLOCK_M of a key head's G·S query rows, splits); out is [B, S, H, Dh]. A
    tile reads the cache up to its last position, in blocks of BLOCK_N rows dealt out to the splits
    in equal runs; a split without any leaves. With SPLIT (splits > 1) each writes (acc, max, sum)
    to partial [tiles, splits, BLOCK_M · (BLOCK_D + 2)] and counts in arrivals[tile]; the last to
    arrive merges from split 0 on and sets the count back to 0. Query rows past G·S repeat row 0,
    unstored; columns past Dh are masked; this pass's rows past a query's position weigh 0 (0 · NaN
    is NaN). UPCAST: the interpreter multiplies raw bits.
    """
    head, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (head // kv_heads).to(tl.int64), head % kv_heads
    d, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    stored = (row < group * S)[:, None] & (d < HEAD_DIM)[None, :]
    row = tl.where(row < group * S, row, 0)
    s, query_head = row // group, h * group + row % group  # by position: early tiles end early
    pos = tl.load(input_pos + s).to(tl.int32)
    length = tl.max(pos) + 1
    blocks, splits = tl.cdiv(length, BLOCK_N), tl.num_programs(2)
    steps = tl.cdiv(blocks, splits)
    begin = split * steps * BLOCK_N
    end = tl.minimum(begin + steps * BLOCK_N, length)

    q_rows = q + b * stride_qb + query_head.to(tl.int64) * stride_qh + s.to(tl.int64) * stride_qs
    x = tl.load(q_rows[:, None] + d[None, :], (d < HEAD_DIM)[None, :] & (begin < end), other=0)
    k_block = k + b * stride_kb + h.to(tl.int64) * stride_kh + begin.to(tl.int64) * stride_kt
    v_block = v + b * stride_vb + h.to(tl.int64) * stride_vh + begin.to(tl.int64) * stride_vt
    # Finite, so that a row without a live key in this share gets weights exp2(-inf) = 0, not NaN.
    top, total = tl.full([BLOCK_M], -3e38, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + lane
        kt = tl.load(k_block + (lane[None, :] * stride_kt + d[:, None]),
                     (n < end)[None, :] & (d < HEAD_DIM)[:, None], other=0)  # [BLOCK_D, BLOCK_N]
        w = tl.load(v_block + (lane[:, None] * stride_vt + d[None, :]),
                    (n < end)[:, None] & (d < HEAD_DIM)[None, :], other=0)  # [BLOCK_N, BLOCK_D]
        if UPCAST:
            x, kt, w = x.to(tl.float32), kt.to(tl.float32), w.to(tl.float32)
        scores = tl.dot(x, kt, input_precision="ieee")
        scores *= 1.4426950408889634 * HEAD_DIM ** -0.5  # log2(e) / √Dh: exp2 is the faster one
        scores = tl.where(n[None, :] <= pos[:, None], scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p, rescale = tl.exp2(scores - new[:, None]), tl.exp2(top - new)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(w.dtype), w, acc * rescale[:, None], input_precision="ieee")
        top = new
        k_block, v_block = k_block + BLOCK_N * stride_kt, v_block + BLOCK_N * stride_vt

    at = out + ((b * S + s) * kv_heads * group + query_head)[:, None] * HEAD_DIM + d[None, :]
    if not SPLIT:
        tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), stored)
    elif begin < end:
        tile, size = head * tl.num_programs(1) + block, BLOCK_M * (BLOCK_D + 2)
        m = tl.arange(0, BLOCK_M)
        share = partial + tile.to(tl.int64) * splits * size
        acc_at, top_at = m[:, None] * BLOCK_D + d[None, :], BLOCK_M * BLOCK_D + m
        tl.store(share + split * size + acc_at, acc)
        tl.store(share + split * size + top_at, top)
        tl.store(share + split * size + top_at + BLOCK_M, total)
        tl.debug_barrier()  # all of it is stored before this program counts as arrived
        shares = tl.cdiv(blocks, steps)
        if tl.atomic_add(arrivals + tile, 1) == shares - 1:
            top, total = tl.full([BLOCK_M], -3e38, tl.float32), tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for i in tl.range(0, shares, loop_unroll_factor=2):  # two shares' loads in flight
                top_i = tl.load(share + i * size + top_at, cache_modifier=".cg")
                total_i = tl.load(share + i * size + top_at + BLOCK_M, cache_modifier=".cg")
                acc_i = tl.load(share + i * size + acc_at, cache_modifier=".cg")
                new = tl.maximum(top, top_i)
                old, add = tl.exp2(top - new), tl.exp2(top_i - new)
                total = total * old + total_i * add
                acc = acc * old[:, None] + acc_i * add[:, None]
                top = new
            tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), stored)
            tl.store(arrivals + tile, 0)


INTERPRETED = triton is not None and not isinstance(attend_kernel, triton.JITFunction)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere (interpreter, meta tensors) those of an H100."""
    is_cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 132


def attend_options(rows: int, heads: int, T: int, Dh: int, size: int, processors: int) -> dict:
    """SPLITS and block sizes for rows = G·S query rows on each of heads = B·Hkv key heads.

    size: bytes of an element; processors: of the GPU. Tensor cores want 16 rows, or 64 if there are
    as many; float32 multiplies in registers: small tiles. Nothing spills at Dh 64 and 128
    (scripts/aot.py). Splits give each multiprocessor a program. Each reads T / SPLITS rows of k and
    v, the last also SPLITS · BLOCK_M rows in float32: least at the root below (not yet measured).
    """
    half, block_d = size < 4, max(16, 1 << (Dh - 1).bit_length())
    block_m = 16 if rows <= 16 or not half else 32 if rows <= 32 else 64
    block_n, tiles = 64 if half else 32 if block_d <= 64 else 16, heads * -(-rows // block_m)
    splits = min(processors // tiles, -(-T // block_n), round(math.sqrt(T * size / (2 * block_m))))
    warps = 8 if block_m * block_d >= (8192 if half else 2048) else 4
    return {"SPLITS": max(1, splits) if tiles <= MAX_TILES else 1, "BLOCK_M": block_m,
            "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 2}


def attend_triton(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, arrivals: Tensor) -> Tensor:
    """attend_torch by the kernel, in bf16, fp16 or fp32; any strides. input_pos ascends, below T.

    arrivals: int32 [MAX_TILES], zeros before and after; not for two streams at once. The result
    [B, H, S, Dh] lies as [B, S, H, Dh]. ValueError without a GPU or the interpreter.
    """
    if triton is None or not (q.is_cuda or INTERPRETED):
        got = "no triton package" if triton is None else f"tensors on {q.device}"
        raise ValueError(f"impl='triton': got {got}, expected triton and a GPU; use impl='torch' "
                         "(to test: TRITON_INTERPRET=1 before the import)")
    (B, H, S, Dh), (kv_heads, T) = q.shape, k.shape[1:3]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out, group = torch.empty(B, S, H, Dh, dtype=q.dtype, device=q.device), H // kv_heads
    options = attend_options(group * S, B * kv_heads, T, Dh, q.itemsize, multiprocessors(q.device))
    grid = B * kv_heads, -(-group * S // options["BLOCK_M"]), options["SPLITS"]
    split = options.pop("SPLITS") > 1
    size = math.prod(grid) * options["BLOCK_M"] * (options["BLOCK_D"] + 2) if split else 1
    partial = torch.empty(size, dtype=torch.float32, device=q.device)
    attend_kernel[grid](out, partial, arrivals, q, *q.stride()[:3], k, *k.stride()[:3],
                        v, *v.stride()[:3], input_pos, kv_heads, group, S, HEAD_DIM=Dh,
                        SPLIT=split, UPCAST=INTERPRETED, **options)
    return out.transpose(1, 2)


torch.library.define("gavel::attend", "(Tensor q, Tensor k, Tensor v, Tensor input_pos, "
                     "Tensor(a!) arrivals) -> Tensor")
torch.library.impl("gavel::attend", ("CPU", "CUDA"), attend_triton)
torch.library.register_fake("gavel::attend", lambda q, k, v, input_pos, arrivals: (
    q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)))
