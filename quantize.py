"""int8 weights: the layer that runs them, its Triton kernel, and a streaming converter.

At batch 1 a pass costs the time to read the weights: half the bytes is half the time, for one row
and for the K+1 rows of a verification alike. Each weight is rounded to the nearest of 255 steps of
its output channel, symmetric, without calibration:

    scale[n] = max_k |W[n, k]| / 127    w8 = round(W / scale)    y = (x · w8ᵀ) · scale

A converted checkpoint is a Hugging Face directory in the layout of compressed-tensors,
`pack-quantized` with 8 bits: published w8a16 checkpoints open here, and ours open in transformers.
Embedding, norms and a head tied to the embedding are copied. Activations keep the model's dtype.

The kernel reads each weight byte once for up to 64 rows of x and converts it in registers. Where
N / 128 blocks would leave the chip idle, programs split K too: they write partial sums, and the
last one to arrive adds them in a fixed order, so the same input gives the same bits. Fast on a CPU:
cpu.py. Shapes: M rows of x, N output channels (out), K input channels (in).

    python quantize.py --mode int8                            # -> checkpoints/demo/target-int8
    python quantize.py --mode int8 --checkpoint_path Llama-3.1-70B-Instruct       # -> …-int8

Conversion takes under 2 GB of memory whatever the model, and an interrupted run continues when it
is started again. Not done here: 4 bits, groups, zero points, quantised activations.
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

import checkpoint as hf
from attention import jit, multiprocessors, triton

tl = triton and triton.language  # without triton the reference still runs
DEMO_TARGET = Path(__file__).resolve().parent / "checkpoints" / "demo" / "target"
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARD_BYTES = 5_000_000_000
BUFFER_BYTES = 32 << 20  # of one tensor at a time; its float32 copies take about eight times that
COPIED = (".json", ".model", ".txt", ".md", ".jinja")  # beside LICENSE and judge.safetensors
WRITTEN = ("config.json", "model.safetensors.index.json")
BLOCK_N = 128  # 64 weight rows for each of two warp groups: the fewest that wgmma takes on the left
# Shared memory for loads in flight: two programs share 228 KB on Hopper; an AMD unit has 64 KB.
STAGE_BYTES = 48 << 10 if torch.version.hip else 96 << 10


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [R, K], floating -> int8 [R, K] within ±127, scale bfloat16 [R, 1].

    |w - int8 · scale| <= scale / 2: the scale is rounded to bfloat16 first and then divided by, in
    float32. A half step times a scale of 8 bits is a float32 number, so no weight crosses one. A
    channel of zeros gets scale 1. ValueError names the first row that holds NaN or infinity.
    """
    weight = weight.float()
    low, high = weight.aminmax(dim=1, keepdim=True)
    peak = torch.maximum(-low, high)  # [R, 1]; NaN if the row has one
    if not peak.isfinite().all():
        raise ValueError(f"NaN or infinity in row {int((~peak.isfinite()).nonzero()[0, 0])}")
    smallest = torch.finfo(torch.bfloat16).tiny
    scale = (peak / 127).clamp(min=smallest).to(torch.bfloat16).masked_fill(peak == 0, 1)
    return (weight / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale


def pack(w8: Tensor) -> Tensor:
    """int8 [R, K] -> int32 [R, ceil(K/4)]: bytes w8 + 128, the first one lowest; 0 as padding."""
    padded = F.pad(w8, (0, -w8.shape[1] % 4), value=-128)
    return (padded.view(torch.uint8) ^ 0x80).view(torch.int32)


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """int32 [R, ceil(K/4)] -> int8 [R, K]."""
    return (packed.contiguous().view(torch.uint8) ^ 0x80).view(torch.int8)[:, :in_features]


def int8_linear_torch(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The reference: x [..., K], weight int8 [N, K], scale [N] -> [..., N]; float64 if x is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide) * scale.to(wide)[:, None]).to(x.dtype)


@jit
def int8_linear_kernel(out, partial, arrivals, x, stride_x, weight, scale, M, N, K,
                       SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr):
    """out[m, n] = scale[n] * sum_k x[m, k] * weight[n, k], accumulated in fp32.

    Grid: (blocks of M, fastest, so that neighbours find their weights in L2, times blocks of N;
    SPLITS of K). A program computes one tile as weight · xᵀ: wgmma reads its left operand, the
    converted weights, from registers. Rows past M or N repeat row 0 and are not stored; k past K is
    masked on both sides. With SPLITS > 1 each program stores its sums to partial [SPLITS, M, N] and
    counts itself in arrivals[block]; the last one adds them from split 0 on and resets the count.
    UPCAST: cast operands to fp32, as the interpreter multiplies bf16 as raw bits.
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
    """Block sizes and splits of a launch: of the shape and the chip alone, so results never vary.

    SPLITS takes the fewest tile-times by a model, not yet measured: two programs a multiprocessor,
    a partly filled last wave as long as one on each, partial sums written and read once a split.
    """
    # float32 multiplies without tensor cores; a K that 16 does not divide is loaded synchronously.
    small = x_bytes == 4 or K % 16
    block_m = 16 if M <= 16 else 32 if M <= 32 or small else 64 if M <= 64 else 128
    block_k = 32 if small else 64 if block_m == 128 else 128
    stages = STAGE_BYTES // (block_k * (BLOCK_N + block_m * x_bytes))
    blocks, steps = -(-M // block_m) * -(-N // BLOCK_N), -(-K // block_k)

    def cost(splits: int) -> float:
        full, rest = divmod(blocks * splits, 2 * processors)
        waves = full * 2 * processors + (max(rest, processors) if rest else 0)
        sums = 2 * splits * M * N * 4 / (BLOCK_N * block_k) if splits > 1 else 0
        return waves * -(-steps // splits) + sums

    splits = min((1, 2, 4, 8, 16), key=cost) if M <= 64 else 1
    return {"SPLITS": splits, "BLOCK_M": block_m, "BLOCK_N": BLOCK_N, "BLOCK_K": block_k,
            "EVEN_K": K % (block_k * splits) == 0, "num_warps": 4 if x_bytes == 4 else 8,
            "num_stages": max(2, min(4, stages))}


def int8_linear_triton(x: Tensor, weight: Tensor, scale: Tensor, arrivals: Tensor) -> Tensor:
    """Launch the kernel: x [M, K], weight int8 [N, K], scale [N] -> [M, N] in x's dtype.

    x and scale are bf16, fp16 or fp32. arrivals: int32 [>= N / 64 and >= 1], zeros before and
    after; streams that run at once must not share it. ValueError without triton or a GPU.
    """
    if triton is None or not (x.is_cuda or INTERPRETED):
        got = "no triton package" if triton is None else f"tensors on {x.device}"
        raise ValueError(f"int8_linear_triton: got {got}, expected triton and a GPU (to test: "
                         "TRITON_INTERPRET=1 before the import)")
    (M, K), N = x.shape, weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    options = launch_options(M, N, K, x.element_size(), multiprocessors(x.device))
    splits, blocks = options["SPLITS"], -(-M // options["BLOCK_M"]) * -(-N // BLOCK_N)
    size = splits * M * N if splits > 1 else 1
    partial = torch.empty(size, dtype=torch.float32, device=x.device)
    int8_linear_kernel[(blocks, splits)](out, partial, arrivals, x, x.stride(0), weight, scale,
                                         M, N, K, UPCAST=INTERPRETED, **options)
    return out


torch.library.define(
    "gavel::int8_linear", "(Tensor x, Tensor weight, Tensor scale, Tensor(a!) arrivals) -> Tensor")
torch.library.impl("gavel::int8_linear", ("CPU", "CUDA"), int8_linear_triton)
torch.library.register_fake("gavel::int8_linear", lambda x, weight, scale, arrivals: (
    x.new_empty(x.shape[0], weight.shape[0])))


class Int8Linear(nn.Module):
    """x [..., K] -> x · (weight · scale)ᵀ [..., N] in x's dtype: weight int8 [N, K], scale [N].

    On CUDA by the kernel, elsewhere by the reference.
    """

    def __init__(self, in_features: int, out_features: int, *,
                 scale_dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        weight = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.ones(out_features, dtype=scale_dtype), requires_grad=False)
        arrivals = torch.zeros(-(-out_features // BLOCK_N) * 2, dtype=torch.int32)
        self.register_buffer("arrivals", arrivals, persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Quantise a layer's weight as the converter does."""
        layer = cls(linear.in_features, linear.out_features).to(linear.weight.device)
        w8, scale = quantize_rows(linear.weight.detach())
        layer.weight.data, layer.scale.data = w8, scale[:, 0]
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return int8_linear_torch(x, self.weight, self.scale)
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.gavel.int8_linear(rows, self.weight, self.scale, self.arrivals)
        return y.view(*x.shape[:-1], -1)


class Output(NamedTuple):
    """One tensor to write: which `part` ('shape', 'packed', 'scale' or 'copy') of which source."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: str
    part: str

    nbytes = property(lambda self: self.dtype.itemsize * torch.Size(self.shape).numel())


def plan_shards(checkpoint: hf.Checkpoint, *, plain_head: bool,
                shard_bytes: int) -> dict[str, list[Output]]:
    """What goes into which file, by file name; the parts of one tensor stay together.

    Larger elements come first in a file, as safetensors orders them: then all are aligned.
    """
    quantised = LINEAR_LAYERS if plain_head else (*LINEAR_LAYERS, "lm_head")
    files, shards = checkpoint.weight_map, [[]]
    for name in sorted(files, key=lambda name: (files[name], checkpoint.info(name).offset)):
        info, (layer, _, leaf) = checkpoint.info(name), name.rpartition(".")
        if not info.dtype.is_floating_point:
            raise hf.refusal(checkpoint.path, f"dtype {info.dtype} for {name}",
                             "floating-point weights", "Download the checkpoint in bfloat16.")
        group = [Output(name, info.dtype, info.shape, name, "copy")]
        if leaf == "weight" and layer.rpartition(".")[2] in quantised:
            rows, words = info.shape[0], -(-info.shape[1] // 4)
            group = [Output(f"{layer}.weight_shape", torch.int64, (2,), name, "shape"),
                     Output(f"{layer}.weight_packed", torch.int32, (rows, words), name, "packed"),
                     Output(f"{layer}.weight_scale", torch.bfloat16, (rows, 1), name, "scale")]
        if shards[-1] and sum(output.nbytes for output in shards[-1] + group) > shard_bytes:
            shards.append([])
        shards[-1] += group
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    return {name: sorted(shard, key=lambda output: -output.dtype.itemsize)
            for name, shard in zip(names, shards)}


def shard_header(outputs: list[Output]) -> bytes:
    """The head of a safetensors file, padded so that data begins at a multiple of 8 bytes."""
    dtypes = {dtype: name for name, dtype in hf.SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for output in outputs:
        header[output.name] = {"dtype": dtypes[output.dtype], "shape": output.shape,
                               "data_offsets": (end, end := end + output.nbytes)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_blocks(outputs: list[Output], checkpoint: hf.Checkpoint,
                 buffer_bytes: int) -> Iterator[tuple[Tensor, int]]:
    """(what to write next, bytes of the source read for it): all tensors, a buffer at a time."""
    scales: dict[str, list[Tensor]] = {}
    for output in outputs:
        if output.part == "shape":
            yield torch.tensor(checkpoint.info(output.source).shape), 0
        elif output.part == "scale":  # 2 bytes a row, kept from when the weight was read
            yield torch.cat(scales.pop(output.source)), 0
        else:
            for start, rows in checkpoint.chunks(output.source, buffer_bytes):
                bad, nbytes = (~rows.isfinite()).nonzero(), rows.nbytes
                if len(bad):
                    raise ValueError(
                        f"{checkpoint.path}: got NaN or infinity at {bad[0].tolist()} of "
                        f"{output.source} (counted from row {start}), expected finite weights; "
                        "the checkpoint is damaged: download it again")
                if output.part == "packed":
                    w8, scale = quantize_rows(rows)
                    scales.setdefault(output.source, []).append(scale)
                    rows = pack(w8)
                yield rows, nbytes


def quantize_checkpoint(source: Path, output: Path, *, keep_lm_head: bool = False,
                        shard_bytes: int = SHARD_BYTES, buffer_bytes: int = BUFFER_BYTES,
                        progress=lambda *_: None) -> dict[str, int]:
    """Write `output`, an int8 copy of the checkpoint `source`; {"read", "written"}: weight bytes.

    Shards go one by one to `output`.partial, config.json last; then that directory is renamed. A
    killed run leaves nothing that loads, and the next one keeps its whole shards. `progress(read,
    total, start)` gets bytes of the source. ValueError or FileNotFoundError for a wrong source or
    output, before anything is written; ValueError for NaN or infinity, OSError for a full disk.
    """
    checkpoint, raw = hf.Checkpoint(source), hf.read_json(source / "config.json")
    if raw.get("quantization_config") or raw.get("compression_config"):
        raise hf.refusal(source, "a checkpoint that is quantised already", "one in bfloat16, "
                         "float16 or float32", "If it is int8, generate.py runs it as it is.")
    plain_head = hf.ModelConfig.from_checkpoint(source).tie_word_embeddings or keep_lm_head
    if output.exists():
        raise hf.refusal(output, "an output that exists", "a new place",
                         "Remove it, or choose another --output.")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise FileNotFoundError(f"{output}: got a parent that is no writable directory, expected "
                                "one; make it first, or choose another --output")
    shards = plan_shards(checkpoint, plain_head=plain_head, shard_bytes=shard_bytes)
    copies, partial = small_files(source), output.with_name(f"{output.name}.partial")
    missing = resume(partial, shards, checkpoint)
    needed = sum(output.nbytes for name in missing for output in shards[name])
    if needed > (free := shutil.disk_usage(partial).free):
        raise OSError(errno.ENOSPC, f"{output} needs {needed / 1e9:.1f} GB more and its disk has "
                      f"{free / 1e9:.1f} GB free; free some space, or choose another --output")
    total = sum(checkpoint.info(name).nbytes for name in checkpoint.weight_map)
    sources = {output.source for name in missing for output in shards[name]}
    read = start = total - sum(checkpoint.info(name).nbytes for name in sources)
    for name in missing:
        try:
            with hf.atomic_write(partial / name) as aside, open(aside, "wb") as file:
                file.write(shard_header(shards[name]))
                for block, nbytes in shard_blocks(shards[name], checkpoint, buffer_bytes):
                    file.write(block.flatten().view(torch.uint8).numpy())
                    read += nbytes
                    progress(read, total, start)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(errno.ENOSPC, f"the disk of {output} is full; free some space and start "
                                        "again: the shards that are whole are kept") from None
    finish(partial, shards, source, copies, raw, plain_head=plain_head)
    os.rename(partial, output)
    written = sum(output.nbytes for outputs in shards.values() for output in outputs)
    return {"read": total, "written": written}


def resume(partial: Path, shards: dict[str, list[Output]], checkpoint: hf.Checkpoint) -> list[str]:
    """The shards to write: to a new `partial`, or beside those that a run of this job left."""
    stats = {name: file.path.stat() for name, file in checkpoint.files.items()}
    job = json.dumps([str(checkpoint.path.resolve()),
                      {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()},
                      [shard_header(outputs)[8:].decode() for outputs in shards.values()]])
    if not (partial / "job").is_file() or (partial / "job").read_text() != job:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / "job").write_text(job)
    for leftover in partial.glob("*.tmp"):
        leftover.unlink()
    return [name for name in shards if not (partial / name).is_file()]


def small_files(source: Path) -> list[Path]:
    """Tokenizer, licence, head: what is copied. ValueError for a link that leads elsewhere."""
    found = []
    for path in sorted(source.rglob("*")):
        wanted = path.suffix in COPIED or path.name in ("LICENSE", "judge.safetensors")
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if wanted and not hidden and path.name not in WRITTEN and path.is_file():
            hf.check_inside(path, source)
            found.append(path)
    return found


def finish(partial: Path, shards: dict[str, list[Output]], source: Path, copies: list[Path],
           raw: dict, *, plain_head: bool) -> None:
    """Small files, the index, and config.json at the very end."""
    for path in copies:
        place = partial / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    if len(shards) > 1:
        outputs = [(output, name) for name, shard in shards.items() for output in shard]
        index = {"metadata": {"total_size": sum(output.nbytes for output, _ in outputs)},
                 "weight_map": {output.name: name for output, name in outputs}}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    targets = ["Linear"] if plain_head else ["Linear", "lm_head"]
    raw = raw | {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"] if plain_head else [],
        "config_groups": {"group_0": {"targets": targets, "weights": hf.INT8_WEIGHTS}}}}
    (partial / "job").unlink()
    (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["int8"], default="int8", help="default: %(default)s")
    parser.add_argument("--checkpoint_path", type=Path, default=DEMO_TARGET, metavar="DIR",
                        help="a Hugging Face directory (default: the demo target)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: CHECKPOINT_PATH-int8")
    parser.add_argument("--keep_lm_head", action="store_true", help="leave an untied head as it is")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run the command line; ValueError and OSError are a user's mistakes."""
    from tqdm import tqdm  # for this command alone: a model runs without it

    source = args.checkpoint_path
    output = args.output or source.resolve().with_name(f"{source.resolve().name}-int8")
    with tqdm(desc="quantise", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        def progress(read: int, total: int, start: int) -> None:
            if bar.total is None:
                bar.total, bar.initial, bar.n = total, start, start
            bar.update(read - bar.n)

        read, written = quantize_checkpoint(
            source, output, keep_lm_head=args.keep_lm_head, progress=progress).values()
    print(f"{source}: {read / 1e9:.3f} GB of weights\n{output}: {written / 1e9:.3f} GB "
          f"({written / read:.0%})\nRun it: python generate.py --checkpoint_path {output}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("\nquantize.py: stopped; the same command continues where it was")
    except (ValueError, OSError) as error:
        print(f"quantize.py: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        sys.exit(2)
