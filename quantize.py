"""int8 weights: a streaming converter, the layer that runs them, and its Triton kernel.

At batch 1 a pass costs the time to read the weights, so half the bytes is half the time, for one row and for the K+1 rows
that a round verifies alike. Weights are rounded to the nearest of 255 steps per output channel, symmetric, no calibration:

    scale[n] = max_k |W[n, k]| / 127        w8[n, k] = round(W[n, k] / scale[n])        y = (x · w8ᵀ) · scale

A converted checkpoint is a Hugging Face directory in the layout of compressed-tensors, `pack-quantized` with 8 bits: the
layout of published w8a16 checkpoints, which open here as well, and ours open in transformers. Embedding, norms and a head
tied to the embedding are copied. Activations stay in the model's dtype.

The kernel reads each weight byte once for up to 64 rows of x and converts it in registers; larger x (prefill) takes more
blocks of rows, and no weight is ever dequantised to GPU memory. Where N / 128 blocks would leave the chip idle, K is split
over programs too: partial sums go to a workspace, and the program that arrives last adds them in their fixed order, so that
the same input gives the same bits.

Shapes: M rows of x, N output channels (out), K input channels (in).

    python quantize.py --mode int8                                    # the bundled target -> checkpoints/demo/target-int8
    python quantize.py --mode int8 --checkpoint_path Llama-3.1-70B-Instruct    # -> Llama-3.1-70B-Instruct-int8
    python generate.py --checkpoint_path Llama-3.1-70B-Instruct-int8 --draft_checkpoint_path Llama-3.1-8B-Instruct --judge

Conversion streams: memory stays under 2 GB whatever the model, and an interrupted run continues when it is started again.
Not done here: 4 bits, groups, zero points, quantised activations.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (
    FEW_ROWS,
    SAFETENSORS_DTYPES,
    Checkpoint,
    Linear,
    ModelConfig,
    Transformer,
    checkpoint_names,
    jit,
    linear,
    multiprocessors,
    read_json,
)

try:
    import triton
    import triton.language as tl
except ImportError:  # no triton for this platform: the CPU routes still run
    triton = None

DEMO_TARGET = Path(__file__).resolve().parent / "checkpoints" / "demo" / "target"
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARD_BYTES = 5_000_000_000
BUFFER_BYTES = 32 << 20  # of one tensor in memory at a time; its float32 copies take about eight times as much
COPIED = (".json", ".model", ".txt", ".md", ".jinja")  # beside LICENSE and judge.safetensors
# What the layout is called in config.json; readers find the layers by `targets` and `ignore`.
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False,
           "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {}}

BLOCK_N = 128  # 64 rows of weights for each of two warp groups, the smallest that Hopper's wgmma takes as left operand
# Shared memory for loads in flight: on Hopper two programs share an SM of 228 KB, an AMD compute unit has 64 KB.
STAGE_BYTES = 48 << 10 if torch.version.hip else 96 << 10
# On a CPU, one pass over the bundled target's layers, 2 threads of an AMD EPYC with AVX512-BF16, torch 2.13.0, medians:
#   bfloat16   1 row: _weight_int8pack_mm 0.70 ms, multiply-and-sum 0.73 to 1.1, dequantise 2.3 (bf16 weights: 1.25)
#             12 rows: 2.1, -, 2.8 (2.7); 17 rows: 3.1, -, 3.1 (2.9); 33 rows: 5.2, -, 4.3 (3.8)
#   float32    1 row: _weight_int8pack_mm 4.1 ms, multiply-and-sum 0.9, dequantise 4.3 (float32 weights: 2.1)
#             17 rows: 82, 3.9 alone but 20 within the compiled model (where it takes a minute to compile), 5.9 (5.7)
# Inductor's int8 GEMM template, with and without freezing, was never faster than _weight_int8pack_mm. A layer of 4096 x 4096
# (64 rows, bfloat16) takes 22 ms dequantised as a whole, 10 in parts of 2^19 weights, 9 of 2^20 or 2^21 (bf16 weights: 7).
PACK_MM_ROWS = 12  # bfloat16: rows up to which _weight_int8pack_mm is the fastest, also of a weight with a packed copy
DEQUANTISE_WEIGHTS = 1 << 20  # at a time: 2 MB in bfloat16, which the product finds in the cache

def check_layout(raw: dict, where: str) -> None:
    """ValueError unless config.json's quantization_config describes 8-bit channel-wise symmetric `pack-quantized` weights."""
    def expect(what: str, got: object, *allowed: object) -> None:
        if got not in allowed:
            raise ValueError(f"{where}: got {what} {got!r}, expected {allowed[0]!r}. gavel runs compressed-tensors checkpoints "
                             "with 8-bit weights and one scale a channel (w8a16), as quantize.py writes them; take such a one.")

    groups = raw.get("config_groups")
    expect("quant_method", raw.get("quant_method"), "compressed-tensors")
    expect("quantization format", raw.get("format"), "pack-quantized")
    expect("quantization_status", raw.get("quantization_status", "compressed"), "compressed")
    expect("kv_cache_scheme", raw.get("kv_cache_scheme"), None)
    expect("sparsity format", (raw.get("sparsity_config") or {}).get("format", "dense"), "dense")
    expect("transform_config", raw.get("transform_config") or None, None)
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"{where}: got config_groups {groups!r}, expected at least one group. Download config.json again.")
    for name, group in groups.items():
        weights = (group if isinstance(group, dict) else {}).get("weights") or {}
        for key in ("num_bits", "type", "symmetric", "strategy"):
            expect(f"{key} of {name}'s weights", weights.get(key), WEIGHTS[key])
        expect(f"group_size of {name}'s weights", weights.get("group_size"), None, -1)
        expect(f"actorder of {name}'s weights", weights.get("actorder"), None)
        expect(f"dynamic of {name}'s weights", weights.get("dynamic", False), False)
        expect(f"format of {name}", group.get("format"), None, "pack-quantized")
        for key in ("input_activations", "output_activations"):
            expect(f"{key} of {name}", group.get(key), None)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [R, K], floating -> int8 [R, K] within ±127, scale bfloat16 [R, 1]; |w - int8 * scale| <= scale / 2.

    The scale is rounded to bfloat16 first and then divided by, in float32: that never rounds to the wrong side of a half
    step, as half steps times a scale of 8 bits are float32 numbers themselves. A channel of zeros gets scale 1. ValueError
    names the first row that holds NaN or infinity.
    """
    weight = weight.float()
    low, high = weight.aminmax(dim=1, keepdim=True)
    peak = torch.maximum(-low, high)  # [R, 1]; NaN if the row has one
    if not peak.isfinite().all():
        raise ValueError(f"NaN or infinity in row {int((~peak.isfinite()).nonzero()[0, 0])}")
    scale = (peak / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16).masked_fill(peak == 0, 1)
    return (weight / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale


def pack(w8: Tensor) -> Tensor:
    """int8 [R, K] -> int32 [R, ceil(K/4)]: w8 + 128 as bytes, the first in the lowest; a row's pad bytes are 0."""
    padded = F.pad(w8, (0, -w8.shape[1] % 4), value=-128)
    return (padded.view(torch.uint8) ^ 0x80).view(torch.int32)


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """int32 [R, ceil(K/4)] -> int8 [R, K]."""
    return (packed.contiguous().view(torch.uint8) ^ 0x80).view(torch.int8)[:, :in_features]


@jit
def int8_linear_kernel(out, partial, arrivals, x, stride_x, weight, scale, M, N, K, SPLITS: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
                       UPCAST: tl.constexpr):
    """out[m, n] = scale[n] * sum_k x[m, k] * weight[n, k], accumulated in fp32.

    Grid (blocks of M fastest, so that neighbours find their weights in L2, times blocks of N; SPLITS of K). The product is
    taken as weight · xᵀ: the converted weights are the left operand, which wgmma reads from registers. Rows past M or N
    repeat row 0 and are not stored; k past K is masked on both sides. With SPLITS > 1, partial [SPLITS, M, N] holds the sums and
    arrivals[program] counts; the last to arrive adds them from split 0 on and sets the count back to 0. UPCAST: the
    interpreter multiplies bf16 as raw bits.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    blocks_m = tl.cdiv(M, BLOCK_M)
    m = (block % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (block // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    k = split * steps * BLOCK_K + tl.arange(0, BLOCK_K)
    w_rows = weight + tl.where(n < N, n, 0).to(tl.int64)[:, None] * K
    x_rows = x + tl.where(m < M, m, 0).to(tl.int64)[None, :] * stride_x
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for _ in range(steps):
        if EVEN_K:
            w = tl.load(w_rows + k[None, :])  # [BLOCK_N, BLOCK_K]
            xt = tl.load(x_rows + k[:, None])  # [BLOCK_K, BLOCK_M]
        else:
            w = tl.load(w_rows + k[None, :], (k < K)[None, :], other=0)
            xt = tl.load(x_rows + k[:, None], (k < K)[:, None], other=0)
        if UPCAST:
            acc += tl.dot(w.to(tl.float32), xt.to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(w.to(xt.dtype), xt, acc, input_precision="ieee")
        k += BLOCK_K
    live = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    s = tl.load(scale + n, n < N, other=0).to(tl.float32)[:, None]
    if SPLITS == 1:
        tl.store(out + at, (acc * s).to(out.dtype.element_ty), live)
    else:
        plane = M * N  # below 2^31 with all splits: M <= 64 here
        tl.store(partial + split * plane + at, acc, live)
        tl.debug_barrier()  # all of it is stored before this program counts as arrived
        if tl.atomic_add(arrivals + block, 1) == SPLITS - 1:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for i in range(SPLITS):
                total += tl.load(partial + i * plane + at, live, other=0, cache_modifier=".cg")
            tl.store(out + at, (total * s).to(out.dtype.element_ty), live)
            tl.store(arrivals + block, 0)


INTERPRETED = triton is not None and not isinstance(int8_linear_kernel, triton.JITFunction)


def launch_options(M: int, N: int, K: int, x_bytes: int, processors: int) -> dict[str, int]:
    """Block sizes and splits for a launch: a function of the shape and the chip alone, so that results never vary.

    x is read again by every block of N, and partial sums are written and read once by every split, so both count in the choice
    of SPLITS: the fewest tile-times for the slots of the chip (two programs a multiprocessor), where a last wave of
    programs takes at least as long as one program on every multiprocessor. A model, not yet measured on a device.
    """
    small = x_bytes == 4 or K % 16  # float32 multiplies without tensor cores; a K of odd size is not loaded asynchronously
    block_m = 16 if M <= 16 else 32 if M <= 32 or small else 64 if M <= 64 else 128
    block_k = 32 if small else 64 if block_m == 128 else 128
    stages = STAGE_BYTES // (block_k * (BLOCK_N + block_m * x_bytes))
    blocks, steps = -(-M // block_m) * -(-N // BLOCK_N), -(-K // block_k)

    def cost(splits: int) -> float:
        full, rest = divmod(blocks * splits, 2 * processors)
        tiles = (full * 2 * processors + (max(rest, processors) if rest else 0)) * -(-steps // splits)
        return tiles + (2 * splits * M * N * 4 / (BLOCK_N * block_k) if splits > 1 else 0)

    splits = min((1, 2, 4, 8, 16), key=cost) if M <= 64 else 1
    return {"SPLITS": splits, "BLOCK_M": block_m, "BLOCK_N": BLOCK_N, "BLOCK_K": block_k,
            "EVEN_K": K % (block_k * splits) == 0, "num_warps": 4 if x_bytes == 4 else 8, "num_stages": max(2, min(4, stages))}


def int8_linear_triton(x: Tensor, weight: Tensor, scale: Tensor, arrivals: Tensor) -> Tensor:
    """x [M, K] bf16, fp16 or fp32, weight int8 [N, K], scale [N] of any of them -> [M, N] in x's dtype, by the kernel.

    arrivals: int32 [>= N / 64 and >= 1] zeros, and zeros again afterwards; not to be shared by streams that run at once.
    """
    if triton is None or not (x.is_cuda or INTERPRETED):
        raise ValueError(f"impl='triton': got {'no triton package' if triton is None else f'tensors on {x.device}'}, expected "
                         "triton and a GPU; use impl='cpu' or 'torch' (to test: TRITON_INTERPRET=1 before the import)")
    (M, K), N = x.shape, weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    options = launch_options(M, N, K, x.element_size(), multiprocessors(x.device))
    splits = options["SPLITS"]
    partial = torch.empty((splits, M, N) if splits > 1 else 1, dtype=torch.float32, device=x.device)
    blocks = -(-M // options["BLOCK_M"]) * -(-N // BLOCK_N)
    int8_linear_kernel[(blocks, splits)](out, partial, arrivals, x, x.stride(0), weight, scale, M, N, K, UPCAST=INTERPRETED,
                                         **options)
    return out


torch.library.define("gavel::int8_linear", "(Tensor x, Tensor weight, Tensor scale, Tensor arrivals) -> Tensor")
torch.library.impl("gavel::int8_linear", ("CPU", "CUDA"), int8_linear_triton)
torch.library.register_fake("gavel::int8_linear", lambda x, weight, scale, arrivals: x.new_empty(x.shape[0], weight.shape[0]))


def int8_linear_torch(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The reference: x [M, K], weight int8 [N, K], scale [N] -> [M, N], computed in float32 (float64 if x is)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide) * scale.to(wide)[:, None]).to(x.dtype)


def int8_linear_cpu(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The fastest route on a CPU by x's rows and dtype, as measured above, for weights without a packed copy in x's dtype."""
    if x.dtype is scale.dtype is torch.bfloat16 and x.shape[0] <= PACK_MM_ROWS:
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight, scale)
    if weight.numel() > DEQUANTISE_WEIGHTS and x.shape[0] > FEW_ROWS:
        return torch.ops.gavel.int8_linear_in_parts(x, weight, scale)
    return (linear(x, weight.to(x.dtype)) * scale).to(x.dtype)  # int8 to bfloat16 is exact


def int8_linear_in_parts(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [M, K], weight int8 [N, K], scale [N] -> [M, N], dequantising DEQUANTISE_WEIGHTS at a time."""
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    step = max(1, DEQUANTISE_WEIGHTS // weight.shape[1])
    for n in range(0, weight.shape[0], step):
        y[:, n:n + step] = linear(x, weight[n:n + step].to(x.dtype)) * scale[n:n + step]
    return y


torch.library.define("gavel::int8_linear_in_parts", "(Tensor x, Tensor weight, Tensor scale) -> Tensor")
torch.library.impl("gavel::int8_linear_in_parts", "CPU", int8_linear_in_parts)
torch.library.register_fake("gavel::int8_linear_in_parts", lambda x, weight, scale: x.new_empty(x.shape[0], weight.shape[0]))


class Int8Linear(nn.Module):
    """x [..., K] -> x · (weight · scale)ᵀ [..., N] in x's dtype: weight int8 [N, K], scale [N] as it is stored.

    impl: 'triton' (CUDA), 'cpu' or 'torch' (the reference, anywhere); by default the device's own. None replaces another.
    """

    def __init__(self, in_features: int, out_features: int, *, scale_dtype: torch.dtype = torch.bfloat16,
                 impl: str | None = None):
        super().__init__()
        if impl not in (None, "triton", "cpu", "torch"):
            raise ValueError(f"got impl {impl!r}, expected 'triton', 'cpu' or 'torch'")
        self.impl, self.packed = impl, False
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(out_features, dtype=scale_dtype), requires_grad=False)
        self.register_buffer("arrivals", torch.zeros(-(-out_features // BLOCK_N) * 2, dtype=torch.int32), persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, impl: str | None = None) -> Int8Linear:
        """Quantise a layer's weight as the converter does."""
        layer = cls(linear.in_features, linear.out_features, impl=impl)
        w8, scale = quantize_rows(linear.weight.detach())
        layer.weight.data, layer.scale.data = w8, scale[:, 0]
        return layer.to(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        impl = self.impl or ("triton" if x.is_cuda else "cpu")
        if impl == "triton":
            y = torch.ops.gavel.int8_linear(rows, self.weight, self.scale, self.arrivals)
        elif impl == "cpu" and self.packed and rows.shape[0] > (PACK_MM_ROWS if x.dtype is torch.bfloat16 else FEW_ROWS):
            y = (torch.ops.gavel.packed_linear(rows, self.weight) * self.scale).to(x.dtype)
        else:
            y = (int8_linear_cpu if impl == "cpu" else int8_linear_torch)(rows, self.weight, self.scale)
        return y.view(*x.shape[:-1], -1)


def int8_layers(model: Transformer, checkpoint: Checkpoint) -> None:
    """Put an Int8Linear in the place of each Linear whose weights `checkpoint` holds in int8 (model on the meta device).

    ValueError where layers that gavel stacks are not all int8, or where a layer has what the layout does not know.
    """
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Linear) or (name == "lm_head" and model.config.tie_word_embeddings):
            continue
        sources = [source.removesuffix(".weight") for source in checkpoint_names(f"{name}.weight", model.config)]
        packed = [source for source in sources if f"{source}.weight_packed" in checkpoint.weight_map]
        if packed and packed != sources:
            raise ValueError(f"{checkpoint.path}: got int8 for {', '.join(packed)} alone, expected it for all of "
                             f"{', '.join(sources)}, which gavel reads as one matrix; quantise all or none of them")
        for source in packed:
            for extra in ("weight_zero_point", "weight_g_idx", "weight_global_scale", "input_scale"):
                if f"{source}.{extra}" in checkpoint.weight_map:
                    raise ValueError(f"{checkpoint.path}: got {source}.{extra}, expected weight_packed, weight_scale and "
                                     "weight_shape alone (symmetric, 8 bits, one scale a channel); take such a checkpoint")
        if packed:
            parent, _, child = name.rpartition(".")
            scale_dtype = checkpoint.info(f"{sources[0]}.weight_scale").dtype
            with torch.device("meta"):
                setattr(model.get_submodule(parent), child,
                        Int8Linear(layer.in_features, layer.out_features, scale_dtype=scale_dtype))


class Output(NamedTuple):
    """One tensor to write: `part` of what the source tensor becomes ('shape', 'packed', 'scale', or 'copy')."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: str
    part: str

    nbytes = property(lambda self: self.dtype.itemsize * int(torch.Size(self.shape).numel()))


def plan_shards(checkpoint: Checkpoint, config: ModelConfig, *, keep_lm_head: bool, shard_bytes: int) -> dict[str, list[Output]]:
    """What goes into which file, by file name; the parts of one tensor stay together.

    Within a file tensors are ordered by the size of their elements, as safetensors orders them: every one is aligned.
    """
    groups = []
    for name in sorted(checkpoint.weight_map, key=lambda name: (checkpoint.weight_map[name], checkpoint.info(name).offset)):
        info, parts = checkpoint.info(name), name.split(".")
        head = parts[-2] == "lm_head" if len(parts) > 1 else False
        if not info.dtype.is_floating_point:
            raise ValueError(f"{checkpoint.path}: got dtype {info.dtype} for {name}, expected floating-point weights; "
                             "download the checkpoint as published in bfloat16")
        if parts[-1] != "weight" or not (parts[-2] in LINEAR_LAYERS or head and not (keep_lm_head or config.tie_word_embeddings)):
            groups.append([Output(name, info.dtype, info.shape, name, "copy")])
            continue
        (rows, columns), layer = info.shape, name.removesuffix(".weight")
        groups.append([Output(f"{layer}.weight_shape", torch.int64, (2,), name, "shape"),
                       Output(f"{layer}.weight_packed", torch.int32, (rows, -(-columns // 4)), name, "packed"),
                       Output(f"{layer}.weight_scale", torch.bfloat16, (rows, 1), name, "scale")])
    shards: list[list[Output]] = [[]]
    size = 0
    for group in groups:
        nbytes = sum(output.nbytes for output in group)
        if size + nbytes > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1] += group
        size += nbytes
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    return {name: sorted(shard, key=lambda output: -output.dtype.itemsize) for name, shard in zip(names, shards)}


def shard_header(outputs: list[Output]) -> bytes:
    """The head of a safetensors file: its length, and the place of each tensor; data begins at a multiple of 8."""
    dtypes = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    begin = 0
    for output in outputs:
        end = begin + output.nbytes
        header[output.name] = {"dtype": dtypes[output.dtype], "shape": output.shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_blocks(outputs: list[Output], checkpoint: Checkpoint, *, buffer_bytes: int) -> Iterator[tuple[Tensor, int]]:
    """(what to write next, bytes of the source that were read for it), tensor after tensor, a buffer at a time."""
    scales: dict[str, list[Tensor]] = {}
    for output in outputs:
        if output.part == "shape":
            yield torch.tensor(checkpoint.info(output.source).shape), 0
        elif output.part == "scale":  # 2 bytes a row, kept from when the weight was read
            yield torch.cat(scales.pop(output.source)), 0
        else:
            for start, rows in checkpoint.chunks(output.source, buffer_bytes):
                try:
                    if output.part == "packed":
                        w8, scale = quantize_rows(rows)
                        scales.setdefault(output.source, []).append(scale)
                        yield pack(w8), rows.nbytes
                    elif rows.isfinite().all():
                        yield rows, rows.nbytes
                    else:
                        raise ValueError("NaN or infinity")
                except ValueError as error:
                    raise ValueError(f"{checkpoint.path}: got {error} of {output.source} (counted from row {start}), expected "
                                     "finite weights; the checkpoint is damaged: download it again") from None


def quantize_checkpoint(source: Path, output: Path, *, keep_lm_head: bool = False, shard_bytes: int = SHARD_BYTES,
                        buffer_bytes: int = BUFFER_BYTES, progress=None) -> dict[str, int]:
    """Write `output`, an int8 copy of the checkpoint `source`; returns {"read": bytes, "written": bytes}, weights only.

    Shards are written one by one to `output`.partial, config.json last, and that directory is renamed when all is there: a
    killed run leaves nothing that loads, and the next one keeps the shards that are whole. `progress(read, total, start)` is
    called with bytes of the source. ValueError or FileNotFoundError before anything is written: what is wrong with source
    or output; ValueError for NaN or infinity in a weight; OSError for a full disk.
    """
    source, output = Path(source), Path(output)
    raw = read_json(source / "config.json") if source.is_dir() else {}
    if raw.get("quantization_config") or raw.get("compression_config"):
        raise ValueError(f"{source}: got a checkpoint that is quantised already, expected one in bfloat16, float16 or float32; "
                         "if it is int8, generate.py runs it as it is")
    config, checkpoint = ModelConfig.from_checkpoint(source), Checkpoint(source)
    if output.exists():
        raise ValueError(f"{output}: got an output that exists, expected a new place; remove it, or choose another --output")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise FileNotFoundError(f"{output}: got a parent that is no writable directory ({output.parent}), expected one; make it "
                                "first, or choose another --output")
    shards = plan_shards(checkpoint, config, keep_lm_head=keep_lm_head, shard_bytes=shard_bytes)
    partial = output.with_name(f"{output.name}.partial")
    done = resume(partial, shards, checkpoint)
    sizes = {name: sum(o.nbytes for o in outputs) for name, outputs in shards.items()}
    totals = {name: sum(checkpoint.info(o.source).nbytes for o in outputs if o.part in ("packed", "copy"))
              for name, outputs in shards.items()}
    needed, free = sum(size for name, size in sizes.items() if name not in done), shutil.disk_usage(partial).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{output} needs {needed / 1e9:.1f} GB more and its disk has {free / 1e9:.1f} GB free; free "
                                    "some space, or choose another --output")
    read = sum(totals[name] for name in done)
    for name, outputs in shards.items():
        if name in done:
            continue
        aside = partial / f"{name}.{os.getpid()}.tmp"
        try:
            with open(aside, "wb", buffering=0) as file:
                write_all(file, shard_header(outputs))
                for block, nbytes in shard_blocks(outputs, checkpoint, buffer_bytes=buffer_bytes):
                    write_all(file, block.contiguous().view(-1).view(torch.uint8).numpy())
                    read += nbytes
                    if progress:
                        progress(read, sum(totals.values()), sum(totals[name] for name in done))
            os.replace(aside, partial / name)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(errno.ENOSPC, f"the disk of {output} is full; free some space and start again: the shards that are "
                                        "whole are kept") from None
        finally:
            aside.unlink(missing_ok=True)
    finish(partial, shards, source, raw, plain_head=keep_lm_head or config.tie_word_embeddings)
    os.rename(partial, output)
    return {"read": sum(totals.values()), "written": sum(sizes.values())}


def write_all(file, data) -> None:
    """Write every byte: one unbuffered write takes at most 2 GB."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[file.write(view):]


def resume(partial: Path, shards: dict[str, list[Output]], checkpoint: Checkpoint) -> set[str]:
    """Make `partial`, or keep of it what an interrupted run of the very same job finished: names of whole shards."""
    stats = {name: (file.path.stat().st_size, file.path.stat().st_mtime_ns) for name, file in checkpoint.files.items()}
    job = json.dumps([str(checkpoint.path.resolve()), stats, [shard_header(outputs)[8:].decode() for outputs in shards.values()]])
    if partial.is_dir() and (partial / "job").is_file() and (partial / "job").read_text() == job:
        for leftover in partial.glob("*.tmp"):
            leftover.unlink()
        return {name for name in shards if (partial / name).is_file()}
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    (partial / "job").write_text(job)
    return set()


def finish(partial: Path, shards: dict[str, list[Output]], source: Path, raw: dict, *, plain_head: bool) -> None:
    """Tokenizer and other small files, the index, and config.json at the very end."""
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        wanted = path.suffix in COPIED or path.name in ("LICENSE", "judge.safetensors")
        hidden = any(part.startswith(".") for part in place.parts)
        if path.is_file() and wanted and not hidden and place.name not in ("config.json", "model.safetensors.index.json"):
            (partial / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, partial / place)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(o.nbytes for outputs in shards.values() for o in outputs)},
                 "weight_map": {o.name: name for name, outputs in shards.items() for o in outputs}}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    group = {"targets": ["Linear"] if plain_head else ["Linear", "lm_head"], "weights": WEIGHTS, "input_activations": None,
             "output_activations": None}
    raw = raw | {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "global_compression_ratio": None, "kv_cache_scheme": None, "ignore": ["lm_head"] if plain_head else [],
        "config_groups": {"group_0": group}}}
    (partial / "job").unlink()
    (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["int8"], default="int8", help="default: %(default)s")
    parser.add_argument("--checkpoint_path", type=Path, metavar="DIR", help="a Hugging Face directory (default: the demo target)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="what to write (default: DIR-int8 beside the checkpoint)")
    parser.add_argument("--keep_lm_head", action="store_true",
                        help="leave an untied head as it is, for readers that cannot load a quantised one")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run the command line; ValueError and OSError are a user's mistakes."""
    from tqdm import tqdm  # for this command alone: a model runs without it

    source = args.checkpoint_path or DEMO_TARGET
    output = args.output or source.resolve().with_name(f"{source.resolve().name}-int8")
    with tqdm(desc="quantise", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        def progress(read: int, total: int, start: int) -> None:
            if bar.total is None:
                bar.total, bar.initial, bar.n = total, start, start
            bar.update(read - bar.n)

        sizes = quantize_checkpoint(source, output, keep_lm_head=args.keep_lm_head, progress=progress)
    print(f"{source}: {sizes['read'] / 1e9:.3f} GB of weights\n{output}: {sizes['written'] / 1e9:.3f} GB "
          f"({sizes['written'] / sizes['read']:.0%})\nRun it: python generate.py --checkpoint_path {output}")


if __name__ == "__main__":
    sys.modules["quantize"] = sys.modules["__main__"]  # model.py imports this module by its name to read int8 checkpoints
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("\nquantize.py: stopped; the same command continues where it was")
    except (ValueError, OSError) as error:
        print(f"quantize.py: {error.strerror if isinstance(error, OSError) and error.strerror else error}", file=sys.stderr)
        sys.exit(2)
