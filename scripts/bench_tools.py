"""What the subcommands of bench.py share: timers that take turns, the memory limit, random models,
forced acceptance, and the report.

A timer is a function that runs something and returns the seconds it took. Ways that are compared take turns, one measurement
a turn, so that a slow moment of the machine meets all of them; medians and quartiles are taken over the turns. On a GPU what
is timed is one CUDA graph: launches cost nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import attention  # noqa: E402
import cpu  # noqa: E402
from attention import grouped_attention  # noqa: E402
from checkpoint import ModelConfig, RopeScaling, atomic_write, check_writable  # noqa: E402
from drafter import CHUNK_LAYERS, device_step, draft_steps, next_token  # noqa: E402
from generate import setup_compiler, verify  # noqa: E402
from judge import JudgeHead, Rule, Verified  # noqa: E402
from model import Transformer  # noqa: E402
from quantize import Int8Linear  # noqa: E402
from terminal import DEMO  # noqa: E402
from tp import Shard, pick_device  # noqa: E402

ROTATION_BYTES = {"cuda": 400 << 20, "cpu": 128 << 20}  # several times the last cache of an H200, of an EPYC
BEYOND_CACHES = 512 << 20  # read on a CPU to measure its memory alone
COPY_BYTES = 2 << 30
SPARE_BYTES = 3 << 30  # caches, activations, the CUDA context
NOT_MEASURED = "not measured: no GPU was at hand"
COLLECTIVES = "left out: one rank's share of the weights, without the time ranks take to exchange results"
# hidden, feed-forward, layers, query heads, key-value heads of Llama-3.1
SIZES = {"8B": (4096, 14336, 32, 32, 8), "70B": (8192, 28672, 80, 64, 8), "405B": (16384, 53248, 126, 128, 8)}
VOCAB_SIZE, HEAD_DIM = 128256, 128
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16}  # of activations, by how weights are kept
NAME = re.compile(rf"({'|'.join((*SIZES, 'demo-draft', 'demo'))})(?:/(\d+))?-({'|'.join(DTYPES)})")
WEIGHT_STD = 0.02  # as models are initialised: small enough that hidden states stay finite through 126 random layers


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


def take_turns(timers: dict, repeats: int) -> dict:
    """Seconds of each way, one measurement a turn, the first turn dropped."""
    times: dict = {name: [] for name in timers}
    for _ in range(repeats + 1):
        for name, measure in timers.items():
            times[name].append(measure())
    return {name: values[1:] for name, values in times.items()}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value thrice that."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return low, median, high


def spread(seconds: list[float], unit: str, *, prefix: str = "") -> dict:
    """{"ms": median, "ms_quartiles": [lower, upper]}, or "us"; keys begin with `prefix`."""
    low, median, high = (value * {"ms": 1e3, "us": 1e6}[unit] for value in quartiles(seconds))
    return {f"{prefix}{unit}": median, f"{prefix}{unit}_quartiles": [low, high]}


def bandwidth_timer(device: torch.device, nbytes: int) -> tuple[Callable[[], float], int]:
    """(timer, bytes it moves): on a GPU a device copy of 2 GB, read plus written; on a CPU a read of nbytes by all threads."""
    if device.type == "cuda":
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return timer(device, lambda _: target.copy_(source), 4), 2 * source.nbytes
    buffer = torch.ones(max(1, nbytes // 8), dtype=torch.int64)
    return timer(device, lambda _: buffer.sum(), max(4, (64 << 20) // buffer.nbytes)), buffer.nbytes


def bandwidth(device: torch.device, nbytes: int = ROTATION_BYTES["cpu"], *, repeats: int = 20) -> float:
    """Bytes a second; on a CPU nbytes decide which caches take part (the default lies beyond them)."""
    measure, moved = bandwidth_timer(device, nbytes)
    return moved / statistics.median(take_turns({"copy": measure}, repeats)["copy"])


def free_memory(device: torch.device) -> None:
    """Give back what models and buffers took; the caller holds no reference to them any more."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def fits(names: list[str], device: torch.device) -> str | None:
    """Why models of these names do not fit into the GPU's free memory, or None."""
    if device.type == "cpu":
        return None
    needed = SPARE_BYTES + sum(p.nbytes for name in names for p in empty_model(name).parameters())
    free, _ = torch.cuda.mem_get_info(device)
    if needed <= free:
        return None
    return f"needs {needed / 1e9:.0f} GB, this GPU has {free / 1e9:.0f} free"


def weight_bytes(model: Transformer) -> int:
    """What one pass must read of the weights: all but the embedding's rows, unless these are the LM head's too."""
    return sum(p.nbytes for name, p in model.named_parameters()
               if model.config.tie_word_embeddings or name != "embed_tokens.weight")


def cache_bytes(model: Transformer, length: int) -> int:
    """Keys and values of `length` positions."""
    config = model.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * length * model.dtype.itemsize


def model_config(name: str) -> tuple[ModelConfig, str]:
    """The shapes behind a name, SIZE[/RANKS]-KIND ("70B-int8", "405B/8-int8"), and its kind: bf16,
    int8 or fp32.

    /RANKS is one rank's share: of heads, feed-forward and vocabulary a part, of the hidden size
    all, as tp.py cuts them. demo and demo-draft are the bundled pair's.
    """
    match = NAME.fullmatch(name)
    if not match:
        raise ValueError(f"got model {name!r}, expected SIZE-KIND or SIZE/RANKS-KIND with SIZE one "
                         f"of {', '.join(SIZES)}, demo, demo-draft and KIND one of "
                         f"{', '.join(DTYPES)}, like 70B-int8 or 405B/8-int8")
    size, ranks, kind = match[1], int(match[2] or 1), match[3]
    if size not in SIZES:
        if ranks > 1:
            raise ValueError(f"got model {name!r}: {size} is too small to share; leave out "
                             f"/{ranks}")
        config = ModelConfig.from_checkpoint(DEMO / ("draft" if size == "demo-draft" else "target"))
        return dataclasses.replace(config, dtype=DTYPES[kind], int8=kind == "int8"), kind
    hidden, feed_forward, layers, heads, kv_heads = SIZES[size]
    if ranks < 1 or kv_heads % ranks:
        raise ValueError(f"got model {name!r}, expected a number of ranks that divides its "
                         f"{kv_heads} key-value heads")
    return ModelConfig(
        vocab_size=VOCAB_SIZE // ranks, hidden_size=hidden, num_layers=layers, head_dim=HEAD_DIM,
        intermediate_size=feed_forward // ranks, num_heads=heads // ranks,
        num_kv_heads=kv_heads // ranks, rms_norm_eps=1e-5, max_position_embeddings=131072,
        rope_theta=500000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), dtype=DTYPES[kind],
        int8=kind == "int8"), kind


def draft_name(target: str, given: str | None) -> str | None:
    """The draft of a target, `given` as SIZE (in the target's kind) or SIZE-KIND; by default 8B or
    demo-draft.

    It is cut into as many ranks' shares as the target. None for a draft of the target's own size.
    """
    whole, _, kind = target.rpartition("-")
    base, _, ranks = whole.partition("/")
    size = given or ("8B" if base in SIZES else "demo-draft")
    if full := NAME.fullmatch(size):
        size, kind, ranks = full[1], full[3], full[2] or ranks
    return None if size == base else f"{size}{'/' if ranks else ''}{ranks}-{kind}"


def meta_model(config: ModelConfig, kind: str, shard: Shard | None = None) -> Transformer:
    """A model on the meta device, without memory: to be counted, or filled. shard: a rank's part
    of it."""
    with torch.device("meta"):
        model = Transformer(config, shard).to(DTYPES[kind])
        for path, layer in list(model.named_modules()) if kind == "int8" else []:
            if (isinstance(layer, nn.Linear)
                    and not (path == "lm_head" and config.tie_word_embeddings)):
                parent, _, child = path.rpartition(".")
                int8 = Int8Linear(layer.in_features, layer.out_features)
                setattr(model.get_submodule(parent), child, int8)
    return model.requires_grad_(False).eval()


def empty_model(name: str) -> Transformer:
    """The model of a name on the meta device."""
    return meta_model(*model_config(name))


def rank_bytes(config: ModelConfig, kind: str, world: int) -> int:
    """Bytes of weights on rank 0 of `world`, from shapes alone."""
    model = meta_model(config, kind, Shard(0, world))
    return sum(parameter.nbytes for parameter in model.parameters())


def collective_bytes(config: ModelConfig, K: int) -> int:
    """Bytes that a rank hands to collectives in a greedy round as target or as draft (tp.py), in
    its dtype."""
    return config.dtype.itemsize * (K + 1) * config.hidden_size * (2 * config.num_layers + 1)


@torch.no_grad()
def random_model(name: str, device: torch.device, *, seed: int = 0) -> Transformer:
    """Random weights in the shapes of a name: speed without a checkpoint. Text from it means nothing."""
    torch.manual_seed(seed)
    model = empty_model(name).to_empty(device=device)
    if model.config.tie_word_embeddings:  # to_empty unties
        model.lm_head.weight = model.embed_tokens.weight
    for buffer in model.buffers():
        buffer.zero_()
    for path, parameter in model.named_parameters():
        if parameter.dtype is torch.int8:
            parameter.random_(-127, 128)
        elif path.endswith(".scale"):
            parameter.fill_(WEIGHT_STD / 73)  # 73: the standard deviation of a random byte
        elif parameter.dim() == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(0, WEIGHT_STD)
    return model


def twin_of(model: Transformer) -> Transformer:
    """The same weights, caches of its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class Forced(Rule):
    """Keeps the first `accepted` draft tokens of every round, whatever they are: the speed that a
    given acceptance would bring.

    With a head the judge's scores are computed as ever, and then replaced. Device tensors only, so
    a round waits for nothing. The torch reference decides on a GPU too, not the fused kernel.
    """

    name = "forced"
    overrules = True

    def __init__(self, accepted: int, head: JudgeHead | None = None):
        self.accepted, self.head = accepted, head

    def check(self, hidden_size: int) -> None:
        if self.head is not None:
            self.head.check(hidden_size)

    def to(self, device: torch.device) -> Forced:
        if self.head is not None:
            self.head.to(device)
        return self

    def score(self, seen: Verified) -> Tensor:
        """1 for the first `accepted` tokens, 0 for the others."""
        K, device = len(seen.drafted), seen.drafted.device
        score = torch.zeros(K, device=device)
        if self.head is not None:
            score = self.head.score(seen.hidden[1:]).clamp(max=0)  # a sigmoid is never below 0
        return torch.where(torch.arange(K, device=device) < self.accepted, 1.0, score)


class Steps:
    """The calls that a round is made of, as the engine makes them, on a model with caches of
    `allocated` rows.

    decode(model), draft(model), verify(model, rows) return a timer of seconds a step with `length`
    positions in use.
    """

    def __init__(self, length: int, allocated: int, *, compile: bool, calls: int = 10):
        self.length, self.allocated, self.calls, self.compile = length, allocated, calls, compile

    def _timer(self, model: Transformer, function, rows: int, *extra,
               **options) -> Callable[[], float]:
        if model.max_seq_length != self.allocated:
            model.setup_caches(1, self.allocated)
        cpu.prepare(model)
        if self.compile and model.device.type == "cuda":
            model.compile_parts()
        step = device_step(function, model, self.compile)
        tokens = torch.ones(1, rows, dtype=torch.int64, device=model.device)
        input_pos = torch.arange(self.length, self.length + rows, device=model.device)
        return timer(model.device, lambda _: step(model, tokens, input_pos, *extra, **options),
                     self.calls)

    def decode(self, model: Transformer) -> Callable[[], float]:
        return self._timer(model, next_token, 1)

    def draft(self, model: Transformer) -> Callable[[], float]:
        """Draft steps are compiled several at a time where the engine does so."""
        steps = max(1, CHUNK_LAYERS // model.config.num_layers)
        measure = self._timer(model, draft_steps, 1, steps=steps)
        return lambda: measure() / steps

    def verify(self, model: Transformer, rows: int) -> Callable[[], float]:
        return self._timer(model, verify, rows)

    def linears(self, model: Transformer, rows: int) -> Callable[[], float]:
        """The linear layers of a step of `rows` rows alone, without what comes between them."""
        sizes = {layer.weight.shape[1] for layer in linear_layers(model)}
        inputs = {size: torch.randn(1, rows, size, dtype=model.dtype, device=model.device)
                  for size in sizes}
        return self._timer(model, only_linears, rows, inputs)

    def attention(self, model: Transformer, rows: int) -> Callable[[], float]:
        """Attention over the caches alone."""
        return self._timer(model, only_attention, rows)


def linear_layers(model: Transformer) -> list[torch.nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, (nn.Linear, Int8Linear))]


def only_linears(model: Transformer, tokens: Tensor, input_pos: Tensor, inputs: dict[int, Tensor],
                 rows: Tensor | None = None) -> list[Tensor]:
    return [layer(inputs[layer.weight.shape[1]]) for layer in linear_layers(model)]


def only_attention(model: Transformer, tokens: Tensor, input_pos: Tensor, rows: Tensor | None = None) -> list[Tensor]:
    layers, S, T = [block.self_attn for block in model.layers], tokens.shape[1], len(model.rows if rows is None else rows)
    q = model.cos.new_ones(1, layers[0].heads, S, layers[0].head_dim)
    if q.is_cuda:
        return [torch.ops.gavel.attend(q, a.cache.k, a.cache.v, input_pos, a.cache.arrivals) for a in layers]
    mask = rows <= input_pos[:, None]
    return [grouped_attention(q, a.cache.k[:, :, :T], a.cache.v[:, :, :T], mask) for a in layers]


def cpu_name() -> str:
    """The processor's model, and how many cores this machine has."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def machine(device: torch.device) -> dict:
    """What the figures were measured on, and by which command."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"],
                            capture_output=True, text=True).stdout.strip()
    return {"device": name, "torch": torch.__version__,
            "triton": attention.triton and attention.triton.__version__,
            "python": platform.python_version(), "commit": commit or "no git repository",
            "command": shlex.join(["python", *sys.argv]), "threads": torch.get_num_threads()}


def start(args) -> torch.device:
    """The device of a run, with threads and compiler set; args.compile becomes False where nothing can compile."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"got --threads {args.threads}, expected 1 or more")
        torch.set_num_threads(args.threads)
    check_writable(args.json)
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches and events go to the current device
    if args.compile and (missing := cpu.can_compile(device)):
        print(f"{missing}: running uncompiled, several times slower", file=sys.stderr)
        args.compile = False
    if args.compile:
        setup_compiler(device)
    return device


def finish(report: dict, path: str | None) -> None:
    """The report as one line, last; indented to a file where one was asked for."""
    if path:
        with atomic_write(path) as file:
            file.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
