"""Benchmarks: what gavel takes, beside its rivals and beside the memory limit measured in the same run.

    pair     a draft and a target: every rule, and transformers on the same weights, prompt by prompt in turns
    limit    draft step, target step and verify of K+1 rows against the time to read their weights once
    kernel   the acceptance rule's fused kernel beside its torch reference, eager and compiled
    long     decoding against the length in use, and against the length allocated
    scale    random weights in the shapes of Llama-3.1-8B, 70B and a rank's share of 405B: whole rounds at a forced acceptance
    start    seconds until an engine of such shapes is ready (scale runs it twice, for a cold and a warm start)
    int8     int8 layers and passes beside their rivals
    ranks    weights on a rank and bytes handed to collectives, computed from shapes

Every run prints a table, and all of it as one JSON line last, with the machine, versions, commit
and command. Ways that are compared take turns in one run; figures are medians, with quartiles. On a
GPU a way's calls are one CUDA graph; what needs a GPU says so on a CPU. `bench.py COMMAND --help`
explains each.

    python scripts/bench.py pair                                   # the bundled pair on its held-out problems
    python scripts/bench.py limit --json benchmarks/limit_cpu.json
    python scripts/bench.py scale --models 70B-int8 --speculate_k 25 --force_accepted 19       # a GPU, no checkpoint
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cpu  # noqa: E402
from checkpoint import DTYPES, ModelConfig  # noqa: E402
from generate import Engine, setup_compiler  # noqa: E402
from judge import RULES, Judge, JudgeHead, accept_torch, accept_triton, probs  # noqa: E402
from model import Transformer, compiled  # noqa: E402
from quantize import Int8Linear, quantize_checkpoint  # noqa: E402
from scripts import bench_pair, bench_scale  # noqa: E402
from scripts.bench_tools import (  # noqa: E402
    BEYOND_CACHES,
    NOT_MEASURED,
    ROTATION_BYTES,
    SIZES,
    Steps,
    bandwidth,
    bandwidth_timer,
    cache_bytes,
    collective_bytes,
    draft_name,
    finish,
    fits,
    free_memory,
    machine,
    model_config,
    quartiles,
    random_model,
    rank_bytes,
    spread,
    start,
    take_turns,
    timer,
    twin_of,
    weight_bytes,
)
from terminal import DEMO  # noqa: E402
from tp import check_world, pick_dtype  # noqa: E402

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
RIVALS = {"cuda": ("bf16", "dequantise"), "cpu": WAYS[1:]}  # max-autotune: seconds a size on a GPU
# K, V, D of one round: the paper's longest at 405B, the same on 70B, a short one; what a CPU can turn over.
KERNEL_SHAPES = {"cuda": ((25, 128256, 16384), (25, 128256, 8192), (8, 128256, 8192)),
                 "cpu": ((16, 864, 320), (8, 16032, 4096))}
KERNEL_MODES = ("greedy", "sampled", "top_k")
TOP_K = 50
MAX_COPIES = 256


def layer_ways(shape: tuple[int, int], M: int, device: torch.device, dtype: torch.dtype,
               names: list[str]) -> dict[str, Callable[[], float]]:
    """A timer for each way of `names` to multiply x [M, in] by a weight of `shape` (out, in)."""
    (N, K), gpu = shape, device.type == "cuda"
    copies = max(2, -(-ROTATION_BYTES[device.type] // (N * K)))
    linears = [torch.nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False) for _ in range(copies)]
    layers = torch.nn.ModuleList(Int8Linear.from_linear(linear) for linear in linears)
    layers.device, layers.dtype = device, dtype  # as a model has them
    cpu.prepare(layers)
    x = torch.randn(M, K, device=device, dtype=dtype)
    torch._dynamo.reset()
    inductor = torch.compile(lambda x, w, s: F.linear(x, w.to(x.dtype)) * s, dynamic=False, mode="max-autotune-no-cudagraphs")
    def call(x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        return layer(x)

    route = call if gpu else torch.compile(call, dynamic=False)
    ways = {
        "int8": lambda i: route(x, layers[i]),
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
            weight_bytes = N * K * (dtype.itemsize if way == "bf16" else 1)
            moved = (weight_bytes + dtype.itemsize * M * (N + K)) / statistics.median(seconds)
            entry[way] = spread(seconds, "us") | {"gb_per_s": moved / 1e9, "share": moved / peak}
        entries.append(entry)
    return entries


@torch.no_grad()
def measure_passes(device: torch.device, dtype: torch.dtype, rows: tuple[int, ...], *, repeats: int) -> list[dict]:
    """Whole compiled passes of the bundled target (hidden states and logits), stored weights and int8 taking turns."""
    setup_compiler(device)
    with tempfile.TemporaryDirectory() as scratch:
        paths = {"stored": DEMO / "target", "int8": Path(scratch) / "int8"}
        quantize_checkpoint(paths["stored"], paths["int8"])
        models = {name: Transformer.from_checkpoint(path, device=device, dtype=dtype)
                  for name, path in paths.items()}
    steps, timers = Steps(100, 384, compile=True, calls=5), {}
    jobs = [(name, M) for M in rows for name in models]
    for name, M in tqdm(jobs, desc="compile passes", unit=" passes"):
        timers[f"{name} {M}"] = steps.verify(models[name], M)
    times = take_turns(timers, repeats)
    entries = []
    for M in rows:
        entry = {"rows": M}
        for name in models:
            entry[name] = spread(times[f"{name} {M}"], "ms")
        ratios = [a / b for a, b in zip(times[f"int8 {M}"], times[f"stored {M}"])]
        entry["ratio"] = statistics.median(ratios)
        entries.append(entry)
    return entries


def print_layers(entries: list[dict]) -> None:
    ways = [way for way in WAYS if way in entries[0]]
    print(f"\n{'model':<8}{'matrix':<10}{'out x in':>15}{'rows':>6}" + "".join(f"{way + ' us':>15}" for way in ways)
          + f"{'int8 GB/s':>11}{'of memory':>11}")
    for e in entries:
        print(f"{e['model']:<8}{e['matrix']:<10}{e['out']:>8} x {e['in']:<5}{e['rows']:>5}"
              + "".join(f"{e[way]['us']:15.1f}" for way in ways) + f"{e['int8']['gb_per_s']:11.0f}{e['int8']['share']:11.0%}")


def run_int8(args: argparse.Namespace) -> None:
    """y = (x · w8ᵀ) · scale for the layer shapes of Llama-3.1 (one eighth of 405B: a rank's share at eight), beside torch's
    bfloat16 layer, Inductor max-autotune on the same int8 weight (on a GPU where --ways names it), and dequantise-then-matmul;
    then whole passes of the bundled target, one row and K+1 rows, in int8 and as stored. int8 is the kernel on a GPU, and on a
    CPU the layer as cpu.prepare leaves it. Weights rotate through more memory than the caches hold. GB/s counts
    the bytes that a way must read: each weight byte once (2 a weight in bfloat16), and x and y once.
    """
    device = start(args)
    dtype = pick_dtype(args.dtype, ModelConfig.from_checkpoint(DEMO / "target"), device)
    gpu = device.type == "cuda"
    rivals = RIVALS[device.type] if args.ways is None else args.ways
    shapes = SHAPES if gpu else CPU_SHAPES
    if args.models:
        shapes = {name: SHAPES[name] for name in args.models}
    peak = bandwidth(device)
    print(f"{machine(device)['device']}: {'copy' if gpu else 'read'} bandwidth {peak / 1e9:.0f} GB/s, x in {dtype}")
    layers = measure_layers(shapes, args.rows, ["int8", *rivals], device, dtype, peak=peak,
                            repeats=args.repeats)
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


def load(path: str | None, name: str | None, bundled: Path, device: torch.device, dtype: str | None) -> tuple[Transformer, str]:
    """A checkpoint, random weights in the shapes of `name`, or the bundled model: (model, what to call it)."""
    if path and name:
        raise ValueError(f"got both the checkpoint {path} and random weights {name}; give one of them")
    if name:
        return random_model(name, device), f"{name}, random weights"
    where = Path(path or bundled)
    kind = pick_dtype(dtype, ModelConfig.from_checkpoint(where), device)
    model = Transformer.from_checkpoint(where, device=device, dtype=kind)
    return model, path or f"bundled {where.name}"


def copy_bandwidth(device: torch.device, repeats: int) -> dict:
    """Of a GPU, with its buffers given back afterwards: they would take memory that models need."""
    measure, moved = bandwidth_timer(device, 0)
    seconds = take_turns({"copy": measure}, repeats)["copy"]
    del measure
    free_memory(device)
    return speed(seconds, moved)


def speed(seconds: list[float], moved: int) -> dict:
    """{"gb_per_s": median, "gb_per_s_quartiles": [lower, upper]} of `moved` bytes."""
    low, median, high = quartiles(seconds)
    return {"gb_per_s": moved / median / 1e9,
            "gb_per_s_quartiles": [moved / high / 1e9, moved / low / 1e9]}


@torch.no_grad()
def measure_limit(models: dict[str, Transformer], ks: list[int], *, length: int, repeats: int,
                  compile: bool, copied: dict | None) -> tuple[dict, list[dict]]:
    """Bandwidth by model, and an entry a step: draft step (if there is one), target step, verify of
    K+1 rows, in turns.

    copied: a GPU's bandwidth; without it reads of a buffer of each model's size take turns too.
    """
    allocated = -(-(length + max(*ks, 16) + 1) // 128) * 128
    steps = Steps(length, allocated, compile=compile)
    reads = {} if copied else {name: bandwidth_timer(model.device, weight_bytes(model))
                               for name, model in models.items()}
    timers = {f"read {name}": measure for name, (measure, _) in reads.items()}
    rows = {"draft step": ("draft", 1)} if "draft" in models else {}
    rows |= {"target step": ("target", 1)}
    rows |= {f"verify {k + 1} rows": ("target", k + 1) for k in ks}
    for name, (which, count) in tqdm(rows.items(), desc="compile", unit=" steps"):
        if which == "draft":
            timers[name] = steps.draft(models[which])
            continue
        verify = "rows" in name
        timers[name] = steps.verify(models[which], count) if verify else steps.decode(models[which])
        timers[f"linears {name}"] = steps.linears(models[which], count)
        timers[f"attention {name}"] = steps.attention(models[which], count)
    times = take_turns(timers, repeats)
    speeds = dict.fromkeys(models, copied) if copied else {
        name: speed(times[f"read {name}"], moved) for name, (_, moved) in reads.items()}
    entries = []
    for name, (which, count) in rows.items():
        moved = weight_bytes(models[which]), cache_bytes(models[which], length + count)
        entry = {"step": name, "rows": count, "weight_bytes": moved[0], "cache_bytes": moved[1],
                 "ceiling_ms": sum(moved) / speeds[which]["gb_per_s"] / 1e6,
                 **spread(times[name], "ms")}
        entry["share"] = entry["ceiling_ms"] / entry["ms"]
        if which != "draft":
            ratios = [a / b for a, b in zip(times[name], times["target step"])]
            entry["to_target_step"] = statistics.median(ratios)
            for part in ("linears", "attention"):
                entry |= spread(times[f"{part} {name}"], "ms", prefix=f"{part}_")
        entries.append(entry)
    return speeds, entries


def limit_names(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Names of target and draft with random weights, None for checkpoints; ValueError where they
    are wrong."""
    draft = args.draft
    if args.draft and args.model:
        draft = draft_name(args.model, args.draft)
        if draft is None:
            raise ValueError(f"got --draft {args.draft}, the size of the target {args.model}; "
                             "expected a smaller one")
    for name in filter(None, (args.model, draft)):
        model_config(name)
    return args.model, draft


def run_limit(args: argparse.Namespace) -> None:
    """Measured bandwidth, bytes of a step (weights read once, and the cache rows in use), the time that takes at least (the
    ceiling), the time the compiled step takes, and the share reached; verify of K+1 rows beside one step of the target. All
    take turns in one run, and with them the linear layers and the attention of the target's steps alone. Bandwidth is a device
    copy of 2 GB, read plus written, measured first; on a CPU all threads read a buffer of the size of the model's weights, so
    that both lie in the same cache or beyond it, and once more a buffer that no cache holds.
    """
    device = start(args)
    if min(args.speculate_k) < 1 or args.length < 1:
        raise ValueError(f"got K {min(args.speculate_k)} and length {args.length}, expected 1 or more")
    target, draft = limit_names(args)
    gpu = device.type == "cuda"
    copied = copy_bandwidth(device, args.repeats) if gpu else None
    beyond = None if gpu else bandwidth(device, BEYOND_CACHES) / 1e9
    if reason := fits([name for name in (target, draft) if name], device):
        raise ValueError(f"got models that do not fit: this {reason}; expected smaller ones")
    models, names = {}, {}
    models["target"], names["target"] = load(args.checkpoint_path, target, DEMO / "target", device,
                                             args.dtype)
    if args.draft_checkpoint_path or draft or not (args.checkpoint_path or target):
        models["draft"], names["draft"] = load(args.draft_checkpoint_path, draft, DEMO / "draft",
                                               device, args.dtype)
    speeds, entries = measure_limit(models, args.speculate_k, length=args.length, copied=copied,
                                    repeats=args.repeats, compile=args.compile)
    about = machine(device)
    moved = "copied" if gpu else "read, in a buffer of the size of its weights"
    dtype = str(models["target"].dtype).removeprefix("torch.")
    print(f"{about['device']}, {about['threads']} threads, {dtype}, {args.length} positions in use")
    for name, label in names.items():
        print(f"{name}: {label}, {speeds[name]['gb_per_s']:.1f} GB/s {moved}")
    if beyond:
        print(f"{beyond:.1f} GB/s read beyond the caches, in a buffer of {BEYOND_CACHES >> 20} MiB")
    print_limit(entries)
    report = {"machine": about, "dtype": dtype, "compiled": args.compile, **names,
              "length": args.length, "bandwidth": speeds, "steps": entries}
    finish(report if gpu else report | {"beyond_caches_gb_per_s": beyond}, args.json)


def print_limit(entries: list[dict]) -> None:
    print(f"\n{'step':<18}{'MB':>9}{'ceiling ms':>12}{'ms':>9}{'quartiles':>18}{'share':>7}"
          f"{'to target step':>16}{'linears ms':>12}{'attention ms':>14}")
    for e in entries:
        low, high = e["ms_quartiles"]
        parts = ""
        if "linears_ms" in e:
            parts = f"{e['to_target_step']:16.2f}{e['linears_ms']:12.3f}{e['attention_ms']:14.3f}"
        print(f"{e['step']:<18}{(e['weight_bytes'] + e['cache_bytes']) / 1e6:9.1f}"
              f"{e['ceiling_ms']:12.3f}{e['ms']:9.3f}{f'{low:.3f} to {high:.3f}':>18}"
              f"{e['share']:7.0%}{parts}")


def acceptance_inputs(shape: tuple[int, int, int], mode: str, device: torch.device,
                      dtype: torch.dtype) -> tuple[tuple, dict, int]:
    """(tensors, options, bytes the rule must read) of one acceptance; half of the draft tokens are the target's own."""
    K, V, D = shape
    hidden, logits = torch.randn(K + 1, D, device=device, dtype=dtype), 2 * torch.randn(K + 1, V, device=device, dtype=dtype)
    drafted = logits[:K].argmax(-1)
    drafted[K // 2:] = torch.randint(V, (K - K // 2,), device=device)
    head = JudgeHead(torch.randn(1, D) / D**0.5, torch.zeros(1), {"threshold": "0.5"}).to(device)
    options = {"rule": Judge(head), "threshold": torch.tensor(0.5, device=device),
               "stop_tokens": torch.tensor([V - 1], device=device)}
    nbytes = logits.nbytes + K * D * dtype.itemsize + head.weight.nbytes
    if mode != "greedy":
        temperature, top_k = torch.tensor(0.8, device=device), TOP_K if mode == "top_k" else None
        q = probs(2 * torch.randn(K, V, device=device), temperature, top_k)
        options |= {"temperature": temperature, "top_k": top_k, "draft_probs": q,
                    "uniforms": torch.rand(K, device=device), "exponentials": torch.empty(V, device=device).exponential_()}
        nbytes += 2 * 4 * V  # the residual: one row of q, and e
    return (hidden, logits, drafted), options, nbytes


@torch.no_grad()
def measure_kernel(shape: tuple[int, int, int], mode: str, device: torch.device, dtype: torch.dtype, *, inputs: str,
                   repeats: int, compile: bool) -> dict:
    """One entry: microseconds and GB/s of each way to run the rule, on the same inputs in turns."""
    nbytes = acceptance_inputs(shape, mode, device, dtype)[2]
    copies = 1 if inputs == "warm" else max(2, min(MAX_COPIES, -(-ROTATION_BYTES[device.type] // nbytes)))
    rounds = [acceptance_inputs(shape, mode, device, dtype) for _ in range(copies)]
    ways = {"triton": accept_triton} if device.type == "cuda" else {}
    ways["eager"] = accept_torch
    if compile:
        ways["compiled"] = compiled(accept_torch)

    def runner(way: Callable) -> Callable[[int], object]:
        return lambda i: way(*rounds[i % copies][0], **rounds[i % copies][1])

    times = take_turns({name: timer(device, runner(way), max(copies, 16)) for name, way in ways.items()}, repeats)
    entry = {"K": shape[0], "V": shape[1], "D": shape[2], "mode": mode, "inputs": inputs, "bytes": nbytes}
    for name, seconds in times.items():
        entry[name] = spread(seconds, "us") | {"gb_per_s": nbytes / statistics.median(seconds) / 1e9}
    return entry if "triton" in entry else entry | {"triton": NOT_MEASURED}


def run_kernel(args: argparse.Namespace) -> None:
    """The judge's acceptance: its Triton kernel (judge.accept_triton, on a GPU), and its torch
    reference (judge.accept_torch) eager and compiled, in turns on the same inputs. GB/s, of the
    fastest, counts the bytes that the rule must read: logits, hidden states and the head once;
    sampled also one row of the draft's distribution and one of random numbers.
    """
    device = start(args)
    gpu = device.type == "cuda"
    dtype = DTYPES[args.dtype or "bfloat16"]
    shapes = [tuple(shape) for shape in args.shape or KERNEL_SHAPES[device.type]]
    if any(min(shape) < 1 or shape[1] < TOP_K for shape in shapes):
        raise ValueError(f"got --shape {' '.join(map(str, min(shapes)))}, expected K and D from 1 on and V from {TOP_K} on")
    inputs = args.inputs or (("warm", "cold") if gpu else ("warm",))
    jobs = [(shape, mode, kind) for shape in shapes for mode in args.modes for kind in inputs]
    entries = [measure_kernel(shape, mode, device, dtype, inputs=kind, repeats=args.repeats, compile=args.compile)
               for shape, mode, kind in tqdm(jobs, desc="acceptance", unit=" sizes")]
    about = machine(device)
    print(f"{about['device']}, {about['threads']} threads, {dtype}".replace("torch.", ""))
    print(f"\n{'K':>3}{'V':>8}{'D':>7} {'mode':<9}{'inputs':<8}{'MB':>7}{'triton us':>11}{'eager us':>10}{'compiled us':>13}"
          f"{'GB/s':>7}")
    for e in entries:
        us = [e[way]["us"] if isinstance(e.get(way), dict) else None for way in ("triton", "eager", "compiled")]
        best = max(e[way]["gb_per_s"] for way in ("triton", "eager", "compiled") if isinstance(e.get(way), dict))
        print(f"{e['K']:>3}{e['V']:>8}{e['D']:>7} {e['mode']:<9}{e['inputs']:<8}{e['bytes'] / 1e6:7.2f}"
              + "".join(f"{'-' if t is None else f'{t:.1f}':>{width}}" for t, width in zip(us, (11, 10, 13))) + f"{best:7.1f}")
    report = {"machine": about, "dtype": str(dtype).removeprefix("torch."), "sizes": entries}
    if not gpu:
        report["gpu"] = NOT_MEASURED
        print(f"\nThe kernel (triton): {NOT_MEASURED}")
    finish(report, args.json)


def decode_timer(engine: Engine, length: int, new_tokens: int) -> Callable[[], float]:
    """Seconds a token of the engine's own decoding, from `length` positions in use on."""
    prompt = (torch.arange(length) % engine.target.config.vocab_size).tolist()

    def measure() -> float:
        # What rows hold does not change how long they take to read: call them right instead of filling them for each turn.
        engine.target.cached = prompt
        for _ in engine.generate(prompt, max_new_tokens=new_tokens, keep_cache=True):
            pass
        stats = engine.stats
        return (stats["seconds"] - stats["seconds_to_first_token"]) / (stats["new_tokens"] - 1)
    return measure


def run_long(args: argparse.Namespace) -> None:
    """Milliseconds a token as the engine decodes: at growing lengths in use with one allocation, then at the shortest of them
    with growing allocations. On a GPU the shapes of 8B in bfloat16 with random weights, on a CPU the bundled target.
    """
    device = start(args)
    if args.new_tokens < 2 or min(*args.lengths, *args.allocated) < 1:
        raise ValueError("got a length below 1 or --new_tokens below 2, expected more")
    name = args.model or (None if args.checkpoint_path or device.type == "cpu" else "8B-bf16")
    model, label = load(args.checkpoint_path, name, DEMO / "target", device, args.dtype)
    # Time alone counts here, so that positions past the model's context will do.
    model.config = dataclasses.replace(model.config, max_position_embeddings=1 << 20)
    fixed = min(args.lengths)
    needed = max(args.lengths) + args.new_tokens
    lengths = {"in use": [(length, needed) for length in sorted(args.lengths)],
               "allocated": [(fixed, max(rows, fixed + args.new_tokens)) for rows in sorted(args.allocated)]}
    engines, timers = {}, {}
    for rows in tqdm(sorted({rows for pairs in lengths.values() for _, rows in pairs}), desc="compile", unit=" lengths"):
        engines[rows] = Engine(twin_of(model), stop_tokens=(), max_seq_length=rows, compile=args.compile)
        engines[rows].warmup()
    for pairs in lengths.values():
        for pair in pairs:
            timers[pair] = decode_timer(engines[pair[1]], pair[0], args.new_tokens)
    times = {}
    for _ in tqdm(range(args.repeats), desc="measure", unit=" turns"):
        for pair, seconds in take_turns(timers, 1).items():
            times.setdefault(pair, []).extend(seconds)
    tables = {kind: [{"in_use": pair[0], "allocated": pair[1], **spread(times[pair], "ms"),
                      "to_shortest": statistics.median(times[pair]) / statistics.median(times[pairs[0]])} for pair in pairs]
              for kind, pairs in lengths.items()}
    about = machine(device)
    print(f"{about['device']}, {about['threads']} threads, {model.dtype}: {label}".replace("torch.", ""))
    for rows in tables.values():
        print(f"\n{'positions in use':>17}{'allocated':>11}{'ms/token':>10}{'quartiles':>20}{'to shortest':>13}")
        for row in rows:
            low, high = row["ms_quartiles"]
            print(f"{row['in_use']:17}{row['allocated']:11}{row['ms']:10.3f}{f'{low:.3f} to {high:.3f}':>20}"
                  f"{row['to_shortest']:13.2f}")
    finish({"machine": about, "dtype": str(model.dtype).removeprefix("torch."), "compiled": args.compile, "target": label,
            "new_tokens": args.new_tokens, "in_use": tables["in use"], "allocated": tables["allocated"]}, args.json)


def run_ranks(args: argparse.Namespace) -> None:
    """Computed from shapes, not measured: GB of weights on a rank, and MB that a rank hands to
    collectives in one greedy round as target or as draft, by the formula in tp.py (activations in
    the model's dtype, K drafted tokens; the candidates of both, 8 · (2K + 1) bytes, come on top).
    """
    entries = []
    for size in args.models:
        name = f"{size}-{args.kind}"
        config, kind = model_config(name)
        for world in args.world:
            check_world(config, world, name)
        held = {str(world): rank_bytes(config, kind, world) for world in args.world}
        entries.append({"model": name, "rank_bytes": held,
                        "collective_bytes": collective_bytes(config, args.speculate_k)})
    print(f"Computed from shapes: GB of weights on a rank ({args.kind}), and MB handed to "
          f"collectives in a greedy round of K = {args.speculate_k}\n")
    heads = [f"{world} rank{'s' * (world > 1)}" for world in args.world]
    print(f"| | {' | '.join(heads)} | MB a round |")
    print("|---" * (len(args.world) + 2) + "|")
    for entry in entries:
        cells = [f"{held / 1e9:.2f}" for held in entry["rank_bytes"].values()]
        cells.append(f"{entry['collective_bytes'] / 1e6:.1f}")
        print(f"| {entry['model'].removesuffix(f'-{args.kind}')} | {' | '.join(cells)} |")
    finish({"machine": machine(torch.device("cpu")), "computed": "from shapes, not measured",
            "speculate_k": args.speculate_k, "models": entries}, args.json)


class Commands:
    """The subcommands; options that several share are declared once."""

    def __init__(self):
        self.raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
        self.parser = argparse.ArgumentParser(description=__doc__, **self.raw)
        self.commands = self.parser.add_subparsers(dest="command", required=True)

    def bare(self, name: str, run: Callable, help: str, description: str | None = None) -> Callable:
        """A command that measures nothing, with --json; its add_argument."""
        sub = self.commands.add_parser(name, help=help, **self.raw,
                                       description=description or inspect.getdoc(run))
        sub.add_argument("--json", metavar="FILE", help="write the report there too")
        sub.set_defaults(run=run, compile=False)
        return sub.add_argument

    def add(self, name: str, run: Callable, help: str, description: str | None = None, *,
            dtype: bool = True, compile: bool = True, repeats: int | None = None) -> Callable:
        """A command with the options of a measurement; its add_argument."""
        add = self.bare(name, run, help, description)
        add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
        if dtype:
            add("--dtype", choices=DTYPES,
                help="of activations and of weights that are not int8 (default: the checkpoint's "
                "on CUDA; on a CPU bfloat16 if it has units for it, else float32)")
        add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
        if repeats:
            add("--repeats", type=int, default=repeats, metavar="N",
                help="turns (default: %(default)s)")
        if compile:
            add("--compile", action=argparse.BooleanOptionalAction, default=True,
                help="off: uncompiled, to try a command out quickly (default: on)")
        return add


def pair_arguments(commands: Commands) -> None:
    add = commands.add("pair", bench_pair.run_pair,
                       "every rule and transformers on a pair of checkpoints", bench_pair.__doc__)
    add("--checkpoint_path", metavar="DIR", help="target (default: the bundled pair)")
    add("--draft_checkpoint_path", metavar="DIR", help="draft")
    add("--judge", metavar="HEAD",
        help="judge head (default: judge.safetensors beside the target or above it)")
    add("--threshold", type=float, metavar="δ", help="the judge's (default: the head's own)")
    add("--prompts", metavar="FILE",
        help='JSONL, {"prompt": text, "answer": what a right answer contains (optional)} a line; '
        "the first --tune_prompts choose K, the next --num_prompts are measured (default: bundled "
        "problems)")
    add("--num_prompts", type=int, default=20, metavar="N",
        help="prompts to measure (default: %(default)s)")
    add("--tune_prompts", type=int, default=12, metavar="N",
        help="others to choose K on (default: %(default)s)")
    add("--max_new_tokens", type=int, default=bench_pair.MAX_NEW_TOKENS, metavar="N",
        help="default: %(default)s")
    add("--raw", action="store_true",
        help="no chat format: plain text after the begin-of-text token")
    add("--seed", type=int, default=1,
        help="stream of bundled problems to measure (default: %(default)s)")
    add("--ways", nargs="+", choices=bench_pair.WAYS, default=bench_pair.WAYS,
        help="rows to measure (default: all)")
    add("--rule", choices=RULES, help="one more row: this rule, at its own best K")
    add("--rule_args", metavar="K=V,…", help="arguments of that rule")
    add("--no_hf", dest="hf", action="store_false", help="leave transformers out")
    defaults = "; ".join(f"{way}: {' '.join(map(str, ks))}" for way, ks in bench_pair.TUNE_K.items())
    add("--tune_k", type=int, nargs="+", metavar="K",
        help=f"the K to choose among (default: {defaults}; --rule: the exact rule's)")
    add("--speculate_k", type=int, metavar="K", help="fix the judge's K")
    add("--exact_k", type=int, metavar="K", help="fix the exact rule's K")
    add("--assisted_k", type=int, metavar="K", help="fix transformers' K (num_assistant_tokens)")


def limit_arguments(commands: Commands) -> None:
    add = commands.add("limit", run_limit, "steps against the time to read their weights once",
                       repeats=50)
    add_models(add)
    add("--draft_checkpoint_path", metavar="DIR",
        help="draft (default: the bundled one beside the bundled target, else none)")
    add("--draft", metavar="NAME",
        help="draft with random weights: SIZE, in the target's kind and share, or SIZE-KIND")
    add("--speculate_k", type=int, nargs="+", default=(1, 3, 7, 15, 16, 25, 31), metavar="K",
        help="default: %(default)s")
    add("--length", type=int, default=256, metavar="N",
        help="positions in use (default: %(default)s)")


def kernel_arguments(commands: Commands) -> None:
    add = commands.add("kernel", run_kernel,
                       "the fused acceptance kernel beside its torch reference", repeats=20)
    shapes = ", ".join("x".join(map(str, shape)) for shape in KERNEL_SHAPES["cuda"])
    add("--shape", type=int, nargs=3, action="append", metavar=("K", "V", "D"),
        help=f"may be repeated (default: {shapes}; smaller on a CPU)")
    add("--modes", nargs="+", choices=KERNEL_MODES, default=KERNEL_MODES,
        help=f"top_k keeps {TOP_K} (default: all)")
    add("--inputs", nargs="+", choices=("warm", "cold"),
        help="warm: the same inputs again, in cache as the LM head leaves them; cold: rotating "
        "through more than caches hold (default: both; on a CPU warm)")


def long_arguments(commands: Commands) -> None:
    add = commands.add("long", run_long, "decoding against length in use and allocated", repeats=5)
    add_models(add)
    add("--lengths", type=int, nargs="+", default=(128, 512, 1024, 2048, 4096, 8192), metavar="N",
        help="in use: %(default)s")
    add("--allocated", type=int, nargs="+", default=(512, 2048, 8192), metavar="N",
        help="default: %(default)s")
    add("--new_tokens", type=int, default=32, metavar="N",
        help="tokens a measurement (default: %(default)s)")


def scale_arguments(commands: Commands) -> None:
    add = commands.add("scale", bench_scale.run_scale,
                       "whole rounds of large models with random weights", bench_scale.__doc__,
                       dtype=False, repeats=5)
    add("--models", nargs="+", metavar="NAME",
        help=f"SIZE-KIND or SIZE/RANKS-KIND, as {', '.join(bench_scale.GPU_MODELS)} (the default "
        f"on a GPU) or {', '.join(bench_scale.CPU_MODELS)} (on a CPU)")
    add("--draft", metavar="NAME",
        help="draft for all larger models, in the same share: SIZE, in the same kind, or SIZE-KIND "
        "(default: 8B, or demo-draft)")
    add("--speculate_k", type=int, nargs="+", default=(4, 8, 16, 25, 32), metavar="K",
        help="default: %(default)s")
    add("--force_accepted", type=int, default=19, metavar="A",
        help="draft tokens that every round keeps, whatever they are (at most K; default: "
        "%(default)s, the paper's)")
    add("--prompt_tokens", type=int, default=128, metavar="N",
        help="positions in use at first (default: %(default)s)")
    add("--rounds", type=int, default=8, metavar="N",
        help="rounds a measurement (default: %(default)s)")
    add("--starts", action=argparse.BooleanOptionalAction, default=True,
        help="time a cold and a warm start of each (default: on)")

    add = commands.add("start", bench_scale.run_start, "seconds until an engine is compiled",
                       dtype=False)
    add("--model", required=True, metavar="NAME", help="SIZE-KIND or SIZE/RANKS-KIND, like 70B-int8")
    add("--draft", metavar="NAME", help="the same for a draft (default: none)")
    add("--speculate_k", type=int, default=25, metavar="K", help="default: %(default)s")
    add("--prompt_tokens", type=int, default=128, metavar="N", help=argparse.SUPPRESS)


def int8_arguments(commands: Commands) -> None:
    add = commands.add("int8", run_int8, "int8 layers and passes beside their rivals",
                       compile=False, repeats=20)
    add("--models", nargs="+", choices=SHAPES,
        help="shapes to measure (default: all; on a CPU small ones)")
    add("--ways", nargs="*", choices=WAYS[1:],
        help="rivals; inductor is max-autotune, several seconds a size on a GPU (default: all; on "
        f"a GPU {' '.join(RIVALS['cuda'])})")
    add("--rows", type=int, nargs="+", default=ROWS, help="M (default: %(default)s)")


def ranks_arguments(commands: Commands) -> None:
    add = commands.bare("ranks", run_ranks, "weights on a rank and bytes handed to collectives")
    add("--models", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    add("--kind", choices=("int8", "bf16", "fp32"), default="int8", help="default: %(default)s")
    add("--world", type=int, nargs="+", default=(1, 2, 4, 8), metavar="N",
        help="ranks (default: %(default)s)")
    add("--speculate_k", type=int, default=16, metavar="K", help="default: %(default)s")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    commands = Commands()
    for arguments in (pair_arguments, limit_arguments, kernel_arguments, long_arguments,
                      scale_arguments, int8_arguments, ranks_arguments):
        arguments(commands)
    args = commands.parser.parse_args(argv)
    if getattr(args, "repeats", 1) < 1:
        commands.parser.error(f"got --repeats {args.repeats}, expected 1 or more")
    return args


def add_models(add: Callable) -> None:
    add("--checkpoint_path", metavar="DIR", help="target (default: the bundled one)")
    add("--model", metavar="NAME",
        help="target with random weights in these shapes, like 8B-bf16, 70B-int8 or 405B/8-int8")


if __name__ == "__main__":
    try:
        arguments = parse_args()
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
