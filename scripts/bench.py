"""Benchmarks: what a kernel or a pass takes, beside its rivals and beside the memory limit measured in the same run.

`int8` times y = (x · w8ᵀ) · scale for the layer shapes of Llama-3.1 (one eighth of 405B: a rank's share at eight), beside
torch's bfloat16 layer, Inductor max-autotune on the same int8 weight, and dequantise-then-matmul; then whole passes of the
bundled target, one row and K+1 rows, in int8 and as stored. Ways take turns in one run, on weights that rotate through more
memory than the caches hold; medians and quartiles; a table, and all of it as one JSON line last. On a GPU a way's calls are
one CUDA graph. GB/s counts the bytes that a way must read: each weight byte once (2 a weight in bfloat16), and x and y once.

    python scripts/bench.py int8                                   # this machine's own: GPU, or CPU with small shapes
    python scripts/bench.py int8 --json benchmarks/int8_h200.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generate import DEMO, check_writable, compiled, pick_device, pick_dtype, setup_compiler, verify  # noqa: E402
from judge import written_aside  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from quantize import Int8Linear, int8_linear_cpu, quantize_checkpoint  # noqa: E402

ROWS = (1, 2, 4, 8, 16, 25, 32, 64)
# (out, in) of the matrices of one pass: q, k, v stacked; output; gate and up stacked; down; LM head.
SHAPES = {
    "demo": {"qkv": (640, 320), "o": (320, 320), "gate_up": (1792, 320), "down": (320, 896)},
    "8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)},
    "70B": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672), "head": (128256, 8192)},
    "405B/8": {"qkv": (2304, 16384), "o": (16384, 2048), "gate_up": (13312, 16384), "down": (16384, 6656),
               "head": (16032, 16384)},
}
CPU_SHAPES = {"demo": SHAPES["demo"], "8B": {"o": SHAPES["8B"]["o"]}}
WAYS = ("int8", "bf16", "inductor", "dequantise")
ROTATION_BYTES = {"cuda": 400 << 20, "cpu": 128 << 20}  # several times the last cache of an H200, of an EPYC
NOT_MEASURED = "not measured: no GPU was at hand"


def timer(device: torch.device, run: Callable[[int], object], calls: int) -> Callable[[], float]:
    """A function that runs run(0) to run(calls - 1) and returns the seconds per call; on a GPU as one CUDA graph."""
    for i in range(3):
        run(i % calls)
    if device.type == "cpu":
        def measure() -> float:
            start = time.perf_counter()
            for i in range(calls):
                run(i)
            return (time.perf_counter() - start) / calls
        return measure
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / calls
    return measure


def take_turns(timers: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, one measurement a turn, the first turn dropped."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats + 1):
        for name, measure in timers.items():
            times[name].append(measure())
    return {name: values[1:] for name, values in times.items()}


def bandwidth(device: torch.device, repeats: int = 20) -> float:
    """Bytes a second: on a GPU read plus written by a device copy of 2 GB, on a CPU read by all threads, beyond the caches."""
    if device.type == "cuda":
        source = torch.empty(2 << 30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        measure, moved = timer(device, lambda _: target.copy_(source), 4), 2 * source.nbytes
    else:
        buffer = torch.ones(ROTATION_BYTES["cpu"] // 8, dtype=torch.int64)
        measure, moved = timer(device, lambda _: buffer.sum(), 4), buffer.nbytes
    return moved / statistics.median(take_turns({"copy": measure}, repeats)["copy"])


def layer_ways(shape: tuple[int, int], M: int, device: torch.device, dtype: torch.dtype,
               names: list[str]) -> dict[str, Callable[[], float]]:
    """A timer for each way of `names` to multiply x [M, in] by a weight of `shape` (out, in)."""
    (N, K), gpu = shape, device.type == "cuda"
    copies = max(2, -(-ROTATION_BYTES[device.type] // (N * K)))
    linears = [torch.nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False) for _ in range(copies)]
    layers = [Int8Linear.from_linear(linear) for linear in linears]
    x = torch.randn(M, K, device=device, dtype=dtype)
    torch._dynamo.reset()
    inductor = torch.compile(lambda x, w, s: F.linear(x, w.to(x.dtype)) * s, dynamic=False, mode="max-autotune-no-cudagraphs")
    route = torch.ops.gavel.int8_linear if gpu else torch.compile(lambda x, w, s, _: int8_linear_cpu(x, w, s), dynamic=False)
    ways = {
        "int8": lambda i: route(x, layers[i].weight, layers[i].scale, layers[i].arrivals),
        "bf16": lambda i: F.linear(x, linears[i].weight),
        "inductor": lambda i: inductor(x, layers[i].weight, layers[i].scale),
        "dequantise": lambda i: F.linear(x, layers[i].weight.to(dtype) * layers[i].scale[:, None].to(dtype)),
    }
    return {name: timer(device, ways[name], copies) for name in names}


def measure_layers(shapes: dict, rows: list[int], names: list[str], device: torch.device, dtype: torch.dtype, *,
                   peak: float, repeats: int) -> list[dict]:
    """One entry a model, matrix and M: per way microseconds, quartiles, GB/s and share of `peak`."""
    entries = []
    jobs = [(model, name, shape, M) for model, matrices in shapes.items() for name, shape in matrices.items() for M in rows]
    for model, name, (N, K), M in tqdm(jobs, desc="layers", unit=" sizes"):
        entry = {"model": model, "matrix": name, "out": N, "in": K, "rows": M}
        for way, seconds in take_turns(layer_ways((N, K), M, device, dtype, names), repeats).items():
            low, median, high = statistics.quantiles(seconds, n=4)
            weight_bytes = N * K * (dtype.itemsize if way == "bf16" else 1)
            moved = (weight_bytes + dtype.itemsize * M * (N + K)) / median
            entry[way] = {"us": 1e6 * median, "us_quartiles": [1e6 * low, 1e6 * high], "gb_per_s": moved / 1e9,
                          "share": moved / peak}
        entries.append(entry)
    return entries


@torch.inference_mode()
def measure_passes(device: torch.device, dtype: torch.dtype, rows: tuple[int, ...], *, repeats: int) -> list[dict]:
    """Whole compiled passes of the bundled target (hidden states and logits), stored weights and int8 taking turns."""
    setup_compiler(device)
    with tempfile.TemporaryDirectory() as scratch:
        quantize_checkpoint(DEMO / "target", Path(scratch) / "int8")
        models = {"stored": Transformer.from_checkpoint(DEMO / "target", device=device, dtype=dtype),
                  "int8": Transformer.from_checkpoint(Path(scratch) / "int8", device=device, dtype=dtype)}
    steps = {}
    for M in rows:
        for name, model in models.items():
            model.setup_caches(1, 384)
            steps[name, M] = compiled(verify)
    timers = {}
    for (name, M), step in tqdm(steps.items(), desc="compile passes", unit=" passes"):
        tokens, input_pos = torch.ones(1, M, dtype=torch.int64, device=device), torch.arange(100, 100 + M, device=device)
        timers[f"{name} {M}"] = timer(device, lambda _, f=step, m=models[name], t=tokens, p=input_pos: f(m, t, p), 5)
    times = take_turns(timers, repeats)
    entries = []
    for M in rows:
        entry = {"rows": M}
        for name in models:
            low, median, high = statistics.quantiles(times[f"{name} {M}"], n=4)
            entry[name] = {"ms": 1e3 * median, "ms_quartiles": [1e3 * low, 1e3 * high]}
        ratios = [a / b for a, b in zip(times[f"int8 {M}"], times[f"stored {M}"])]
        entry["ratio"] = statistics.median(ratios)
        entries.append(entry)
    return entries


def machine(device: torch.device) -> dict:
    """What the figures were measured on."""
    import triton

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
        name += f", {os.cpu_count()} cores"
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
            "commit": commit or "no git repository"}


def finish(report: dict, path: str | None) -> None:
    """The report as one line, last; indented to a file where one was asked for."""
    if path:
        with written_aside(path) as file:
            file.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def print_layers(entries: list[dict]) -> None:
    ways = [way for way in WAYS if way in entries[0]]
    print(f"\n{'model':<8}{'matrix':<10}{'out x in':>15}{'rows':>6}" + "".join(f"{way + ' us':>15}" for way in ways)
          + f"{'int8 GB/s':>11}{'of memory':>11}")
    for e in entries:
        print(f"{e['model']:<8}{e['matrix']:<10}{e['out']:>8} x {e['in']:<5}{e['rows']:>5}"
              + "".join(f"{e[way]['us']:15.1f}" for way in ways) + f"{e['int8']['gb_per_s']:11.0f}{e['int8']['share']:11.0%}")


def run_int8(args: argparse.Namespace) -> None:
    check_writable(args.json)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, ModelConfig.from_checkpoint(DEMO / "target"), device)
    gpu = device.type == "cuda"
    shapes = SHAPES if gpu else CPU_SHAPES
    if args.models:
        shapes = {name: SHAPES[name] for name in args.models}
    peak = bandwidth(device)
    print(f"{machine(device)['device']}: {'copy' if gpu else 'read'} bandwidth {peak / 1e9:.0f} GB/s, x in {dtype}")
    layers = measure_layers(shapes, args.rows, ["int8", *args.ways], device, dtype, peak=peak, repeats=args.repeats)
    print_layers(layers)
    passes = measure_passes(device, dtype, (1, 17), repeats=4 * args.repeats)
    print(f"\n{'bundled target, rows':<22}{'stored ms':>11}{'int8 ms':>9}{'int8 / stored':>15}")
    for entry in passes:
        print(f"{entry['rows']:<22}{entry['stored']['ms']:11.2f}{entry['int8']['ms']:9.2f}{entry['ratio']:15.2f}")
    report = {"machine": machine(device), "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
              "bandwidth_gb_per_s": peak / 1e9, "layers": layers, "passes": passes}
    if not gpu:
        report["gpu"] = NOT_MEASURED
        print(f"\nGPU rows: {NOT_MEASURED}")
    finish(report, args.json)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    int8 = commands.add_parser("int8", help="int8 layers and passes beside their rivals")
    int8.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    int8.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of x and of the rivals' weights")
    int8.add_argument("--models", nargs="+", choices=SHAPES, help="shapes to measure (default: all; on a CPU small ones)")
    int8.add_argument("--ways", nargs="*", choices=WAYS[1:], default=WAYS[1:],
                      help="rivals (default: all; max-autotune takes several seconds a size on a GPU)")
    int8.add_argument("--rows", type=int, nargs="+", default=ROWS, help="M (default: %(default)s)")
    int8.add_argument("--repeats", type=int, default=20, help="turns (default: %(default)s)")
    int8.add_argument("--json", metavar="FILE", help="write the report")
    int8.set_defaults(run=run_int8)
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        arguments = parse_args()
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
