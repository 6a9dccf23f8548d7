"""`bench.py scale`: whole judged rounds at the sizes that matter, with random weights; no checkpoint, no network.

Models take the shapes of Llama-3.1-8B, 70B and one rank's share of 405B at eight ranks (whose collectives are left out, and
every row says so), in bfloat16 or int8. Random drafts are never right, so the number of accepted draft tokens is forced: the
judge's scores are computed as ever, then replaced (bench_tools.Forced; by torch, not by the fused kernel). Rows are named
"forced A of K"; their tokens/s, (A+1) / round, hold for a judge that accepts so many. A round's ceiling is the time to read the
draft's weights K times and the target's once, at the bandwidth measured first. Cold and warm start: seconds until the engine is
compiled, by `bench.py start` in processes of their own that share an empty cache directory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from generate import Engine
from judge import JudgeHead
from model import Transformer
from scripts.bench_tools import (
    COLLECTIVES,
    NOT_MEASURED,
    ROOT,
    Forced,
    Steps,
    bandwidth,
    cache_bytes,
    draft_name,
    finish,
    fits,
    free_memory,
    machine,
    model_config,
    random_model,
    spread,
    start,
    take_turns,
    weight_bytes,
)

GPU_MODELS = ("8B-bf16", "8B-int8", "70B-int8", "405B/8-int8")
CPU_MODELS = ("demo-bf16",)


def random_head(hidden_size: int) -> JudgeHead:
    return JudgeHead(torch.randn(1, hidden_size) / hidden_size**0.5, torch.zeros(1), {"threshold": "0.5"})


def engine_timer(engine: Engine, rule: str, prompt: list[int], rounds: int, expected: int) -> Callable[[], float]:
    """Seconds a round of the engine's own generation under a rule, of rounds that bring `expected` tokens each."""
    def measure() -> float:
        for _ in engine.generate(prompt, max_new_tokens=1 + rounds * expected, rule=rule):
            pass
        stats = engine.stats
        assert (stats["rounds"], stats["tokens_per_round"]) == (rounds, expected), stats
        return (stats["seconds"] - stats["seconds_to_first_token"]) / rounds
    return measure


@torch.no_grad()
def measure_model(target: Transformer, draft: Transformer | None, *, ks: list[int], accepted: int, prompt_tokens: int,
                  rounds: int, repeats: int, compile: bool, peak: float) -> tuple[dict, list[dict]]:
    """({decode figures}, [an entry a K]) of one target, alone and with its draft; everything takes turns in one run."""
    prompt = (torch.arange(prompt_tokens) % target.config.vocab_size).tolist()
    steps = rounds * 4
    length = prompt_tokens + max(1 + steps, *(1 + rounds * (min(accepted, k) + 1) for k in ks))
    options = {"max_seq_length": -(-length // 128) * 128, "stop_tokens": (), "compile": compile}
    engines: dict[int, Engine] = {}
    if draft is None:
        engines[0] = Engine(target, **options)
    else:
        head = random_head(target.config.hidden_size)
        for k in sorted(ks, reverse=True):  # the largest first: caches are made once
            rule = Forced(min(accepted, k), head)
            engines[k] = Engine(target, draft, rule=rule, speculate_k=k, **options)
    first = next(iter(engines.values()))
    timers = {"decode": engine_timer(first, "none", prompt, steps, 1)}
    first.warmup(rules=("none",))
    calls = Steps(prompt_tokens, target.max_seq_length, compile=compile)
    for k in tqdm(sorted(ks) if draft else [], desc="compile", unit=" K"):
        engines[k].warmup()
        timers[f"round {k}"] = engine_timer(engines[k], Forced.name, prompt, rounds,
                                            min(accepted, k) + 1)
        timers[f"verify {k}"] = calls.verify(target, k + 1)
    times = take_turns(timers, repeats)

    ceiling = (weight_bytes(target) + cache_bytes(target, prompt_tokens + 1)) / peak
    decode = spread(times["decode"], "ms", prefix="decode_") | {
        "decode_ceiling_ms": 1e3 * ceiling, "decode_share": ceiling / statistics.median(times["decode"]),
        "decode_tokens_per_second": 1 / statistics.median(times["decode"])}
    entries = []
    for k in sorted(ks) if draft else []:
        a, median = min(accepted, k), statistics.median(times[f"round {k}"])
        least = (k * (weight_bytes(draft) + cache_bytes(draft, prompt_tokens + 1))
                 + weight_bytes(target) + cache_bytes(target, prompt_tokens + k + 1)) / peak
        verify = statistics.median(times[f"verify {k}"])
        entries.append({
            "name": f"forced {a} of {k}", "speculate_k": k, "forced_accepted": a, "tokens_per_round": a + 1,
            "tokens_per_second": (a + 1) / median, **spread(times[f"round {k}"], "ms", prefix="round_"),
            "ceiling_ms": 1e3 * least, "share": least / median, "verify_ms": 1e3 * verify,
            "verify_to_decode": verify / statistics.median(times["decode"])})
    return decode, entries


def measure_starts(target: str, draft: str | None, args: argparse.Namespace) -> dict:
    """Seconds of `bench.py start` with empty caches and then with those that the first one filled."""
    seconds = {}
    with tempfile.TemporaryDirectory() as scratch:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", "TRITON_CACHE_DIR": f"{scratch}/triton"}
        command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "start", "--model", target,
                   "--speculate_k", str(max(args.speculate_k)), "--prompt_tokens", str(args.prompt_tokens),
                   "--compile" if args.compile else "--no-compile"]
        command += ["--draft", draft] if draft else []
        command += ["--device", args.device] if args.device else []
        command += ["--threads", str(args.threads)] if args.threads else []
        for kind in ("cold", "warm"):
            begin = time.perf_counter()
            result = subprocess.run(command, env=env, capture_output=True, text=True)
            if result.returncode:
                raise ValueError(f"bench.py start --model {target} failed:\n{result.stderr[-2000:]}")
            report = json.loads(result.stdout.splitlines()[-1])
            seconds[f"{kind}_start_seconds"] = report["warmup_seconds"]
            seconds[f"{kind}_process_seconds"] = time.perf_counter() - begin - report["weights_seconds"]
    return seconds


def print_models(models: list[dict]) -> None:
    print(f"\n{'model':<14}{'weights GB':>11}{'memory GB':>11}{'GB/s':>7}{'decode ms':>11}{'tokens/s':>10}"
          f"{'ceiling ms':>12}{'share':>7}{'cold s':>8}{'warm s':>8}")
    for m in models:
        if "skipped" in m:
            print(f"{m['model']:<14}  skipped: {m['skipped']}")
            continue
        memory = f"{m['memory_bytes'] / 1e9:.2f}" if m["memory_bytes"] else "-"
        starts = "".join(f"{m[key]:8.1f}" if key in m else f"{'-':>8}" for key in ("cold_start_seconds", "warm_start_seconds"))
        print(f"{m['model']:<14}{m['weight_bytes'] / 1e9:11.3f}{memory:>11}{m['bandwidth_gb_per_s']:7.0f}{m['decode_ms']:11.3f}"
              f"{m['decode_tokens_per_second']:10.1f}{m['decode_ceiling_ms']:12.3f}{m['decode_share']:7.0%}{starts}"
              f"{'  no collectives' if m['collectives'] else ''}")
    print(f"\n{'draft -> target':<33}{'round':<19}{'verify ms':>10}{'/ decode':>10}{'round ms':>10}{'ceiling ms':>12}"
          f"{'share':>7}{'tokens/s':>10}")
    for m in models:
        for e in m.get("rounds", []):
            print(f"{m['draft'] + ' -> ' + m['model']:<33}{e['name']:<19}{e['verify_ms']:10.3f}{e['verify_to_decode']:10.2f}"
                  f"{e['round_ms']:10.3f}{e['ceiling_ms']:12.3f}{e['share']:7.0%}{e['tokens_per_second']:10.1f}"
                  f"{'  no collectives' if m['collectives'] else ''}")
    if any(m.get("collectives") for m in models):
        print(f"\nModels named /RANKS: collectives {COLLECTIVES}")


def run_scale(args: argparse.Namespace) -> None:
    device = start(args)
    names = args.models or (GPU_MODELS if device.type == "cuda" else CPU_MODELS)
    pairs = [(name, draft_name(name, args.draft)) for name in names]
    for name in (name for pair in pairs for name in pair if name):
        model_config(name)
    ks = sorted(set(args.speculate_k))
    if ks[0] < 1 or args.force_accepted < 0 or args.rounds < 1 or args.prompt_tokens < 1:
        raise ValueError(f"got K {ks[0]}, --force_accepted {args.force_accepted}, --rounds {args.rounds}, --prompt_tokens "
                         f"{args.prompt_tokens}; expected 1 or more (0 or more accepted)")
    peak = bandwidth(device) if device.type == "cuda" else None
    about = machine(device)
    print(f"{about['device']}, {about['threads']} threads; random weights, {args.prompt_tokens} positions in use")
    models = []
    for name, draft in pairs:
        entry = {"model": name, "draft": draft, "collectives": COLLECTIVES if "/" in name else None}
        models.append(entry)
        free_memory(device)
        if reason := fits([n for n in (name, draft) if n], device):
            entry["skipped"] = reason
            continue
        if args.starts:
            print(f"{name}: cold and warm start ...", file=sys.stderr)
            entry.update(measure_starts(name, draft, args))
        target, helper = random_model(name, device), random_model(draft, device) if draft else None
        speed = peak or bandwidth(device, weight_bytes(target))
        decode, rounds = measure_model(
            target, helper, ks=ks, accepted=args.force_accepted, prompt_tokens=args.prompt_tokens, rounds=args.rounds,
            repeats=args.repeats, compile=args.compile, peak=speed)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        entry.update({"weight_bytes": weight_bytes(target), "draft_weight_bytes": weight_bytes(helper) if helper else None,
                      "memory_bytes": memory, "bandwidth_gb_per_s": speed / 1e9, **decode, "rounds": rounds})
        del target, helper
    print_models(models)
    report = {"machine": about, "compiled": args.compile, "weights": "random",
              "prompt_tokens": args.prompt_tokens, "force_accepted": args.force_accepted, "models": models}
    if device.type == "cpu":
        report["gpu"] = NOT_MEASURED
        print(f"\nGPU rows: {NOT_MEASURED}")
    finish(report, args.json)


def run_start(args: argparse.Namespace) -> None:
    """Build one engine and run its first tokens; weights are filled first and not counted."""
    begin = time.perf_counter()
    device = start(args)
    target = random_model(args.model, device)
    draft = random_model(args.draft, device) if args.draft else None
    if device.type == "cuda":
        torch.cuda.synchronize()
    filled = time.perf_counter()
    engine = Engine(target, draft, random_head(target.config.hidden_size) if draft else None, speculate_k=args.speculate_k,
                    stop_tokens=(), max_seq_length=-(-(args.prompt_tokens + 256) // 128) * 128, compile=args.compile)
    engine.warmup()
    seconds = time.perf_counter() - filled
    about = machine(device)
    print(f"{about['device']}: {args.model}{f' with draft {args.draft}' if draft else ''} ready after {seconds:.1f} s")
    finish({"machine": about, "model": args.model, "draft": args.draft, "speculate_k": args.speculate_k,
            "compiled": args.compile, "weights_seconds": filled - begin, "warmup_seconds": seconds}, args.json)
