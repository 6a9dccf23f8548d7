"""Tensor parallelism: each rank holds a slice of every large matrix, and all run the same rounds.

Two all-reduces a layer suffice: queries, keys and values are cut by heads, gate and up by columns,
the matrices that follow them by rows; embedding and LM head by vocabulary. `TABLE` says it for each
parameter, and loading applies it: a rank reads only its own slices. Where ranks outnumber key-value
heads, rank r holds head floor(r * Hkv / world). A single process is rank 0 of 1.

Ranks cannot drift: an all-reduce leaves hidden states equal to the bit and random numbers come from
one seed, so every rank decides alike; rank 0 alone says when a consumer has stopped. Greedy rounds
send candidates (value, index), never rows of logits; a sampled round, or one whose rule needs
probabilities, gathers its rows. docs/method.md counts the bytes.

    torchrun --standalone --nproc_per_node=8 generate.py --judge --checkpoint_path DIR ...
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 ...

Source: Megatron-LM (arXiv 1909.08053). It does not overlap communication with computation.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint import DTYPES, STACKED, ModelConfig

# How a parameter is cut, by the end of its name. heads: rows, by whole heads. column: rows (columns
# of the transpose). row: columns. vocabulary: rows. replicated: held whole.
TABLE = {"embed_tokens.weight": "vocabulary", "lm_head.weight": "vocabulary",
         "lm_head.scale": "vocabulary", "qkv_proj.weight": "heads", "qkv_proj.scale": "heads",
         "o_proj.weight": "row", "o_proj.scale": "replicated", "gate_up_proj.weight": "column",
         "gate_up_proj.scale": "column", "down_proj.weight": "row", "down_proj.scale": "replicated",
         "norm.weight": "replicated", "input_layernorm.weight": "replicated",
         "post_attention_layernorm.weight": "replicated"}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FUNCTIONAL = torch.ops._c10d_functional
TIMEOUT = timedelta(minutes=30)  # of a collective: ranks wait while others compile


def kind(parameter: str) -> str:
    """How TABLE cuts a parameter of Transformer; KeyError for one that it does not know."""
    for name, cut in TABLE.items():
        if parameter == name or parameter.endswith("." + name):
            return cut
    raise KeyError(f"{parameter} has no row in tp.TABLE")


def share(size: int, rank: int, world: int) -> tuple[int, int]:
    """This rank's even part of 0..size."""
    return size // world * rank, size // world * (rank + 1)


def kv_share(kv_heads: int, rank: int, world: int) -> tuple[int, int]:
    """The key-value heads of a rank; where ranks outnumber heads, several hold the same one."""
    first = rank * kv_heads // world
    return first, first + max(1, kv_heads // world)


def check_world(config: ModelConfig, world: int, what: str) -> None:
    """ValueError unless `world` ranks can share a model of this config; says how many could."""
    def fails(world: int) -> list[str]:
        sizes = {"query heads": config.num_heads, "intermediate_size": config.intermediate_size,
                 "vocabulary": config.vocab_size}
        found = [f"{name} {size}" for name, size in sizes.items() if size % world]
        if config.num_kv_heads % world and world % config.num_kv_heads:
            found.append(f"key-value heads {config.num_kv_heads} (one must divide the other)")
        if found or world == 1 or not config.int8:
            return found
        inputs = {"o_proj": config.num_heads * config.head_dim,
                  "down_proj": config.intermediate_size}
        return [f"(by 4, in int8) {name}'s {size // world} inputs a rank"
                for name, size in inputs.items() if size // world % 4]

    if problems := fails(world):
        possible = [str(n) for n in range(1, config.num_heads + 1) if not fails(n)]
        raise ValueError(f"{what}: got {world} ranks, which do not divide {', '.join(problems)}; "
                         f"expected {' or '.join(possible)}: run torchrun with such an "
                         "--nproc_per_node")


class Shard:
    """This process, `rank` of `world`. check: compare all ranks' tokens in every round (tests)."""

    def __init__(self, rank: int = 0, world: int = 1, *, check: bool = False):
        self.rank, self.world, self.check = rank, world, check
        joined = world > 1 and dist.is_initialized()
        self.group = dist.group.WORLD.group_name if joined else None

    def heads(self, config: ModelConfig) -> tuple[int, int]:
        """Query and key-value heads of this rank."""
        first, last = kv_share(config.num_kv_heads, self.rank, self.world)
        return config.num_heads // self.world, last - first

    def cut(self, source: str, shape: tuple[int, ...],
            config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """(rows, columns or None: all) of a tensor that this rank holds; packed int8: in words."""
        layer, _, leaf = source.removeprefix("model.").rpartition(".")
        name = layer.rpartition(".")[2]
        ours = next((ours for ours, theirs in STACKED.items() if name in theirs), name)
        how = kind(f"{ours}.{'scale' if leaf == 'weight_scale' else 'weight'}")
        if how == "heads":
            first, last = share(config.num_heads, self.rank, self.world)
            if name != "q_proj":
                first, last = kv_share(config.num_kv_heads, self.rank, self.world)
            return (first * config.head_dim, last * config.head_dim), None
        if how in ("column", "vocabulary"):
            return share(shape[0], self.rank, self.world), None
        return (0, shape[0]), share(shape[1], self.rank, self.world) if how == "row" else None

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x."""
        if self.world == 1:
            return x
        return FUNCTIONAL.wait_tensor(FUNCTIONAL.all_reduce(x, "sum", self.group))

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' x [..., n], side by side: [..., world · n]."""
        if self.world == 1:
            return x
        parts = FUNCTIONAL.all_gather_into_tensor(x.contiguous()[None], self.world, self.group)
        parts = FUNCTIONAL.wait_tensor(parts)  # [world, ..., n]
        return parts.movedim(0, -2).flatten(-2)

    def agree(self, stop: bool) -> bool:
        """Rank 0's word, on the host. RuntimeError on another whose consumer stopped alone."""
        if self.world == 1:
            return stop
        flag = torch.tensor([stop], dtype=torch.uint8)
        dist.broadcast(flag, 0)
        if stop and not flag.item():
            raise RuntimeError(f"rank {self.rank} stopped reading tokens while rank 0 goes on; "
                               "only rank 0 may stop early")
        return bool(flag.item())

    def same(self, tokens: list[int]) -> None:
        """With check: RuntimeError on a rank that did not commit what rank 0 did."""
        if self.check and (first := self.from_first(tokens)) != tokens:
            raise RuntimeError(f"ranks have drifted: rank {self.rank} has {tokens}, rank 0 {first}")

    def everyone(self, value: object) -> list:
        """The values of all ranks, on every rank."""
        values: list = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def from_first(self, value: object) -> object:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]


def world_size() -> int:
    """How many ranks torchrun started, 1 without it. ValueError if only some variables are set."""
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing and {"RANK", "WORLD_SIZE"} - set(missing):
        there = ", ".join(name for name in VARIABLES if name in os.environ)
        raise ValueError(f"got {there} without {', '.join(missing)} in the environment, expected "
                         "all of torchrun's variables or none; start with: torchrun --standalone "
                         "--nproc_per_node=N generate.py ...")
    return 1 if missing else int(os.environ["WORLD_SIZE"])


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or CUDA where there is one, else the CPU; each rank its own GPU.

    ValueError where there is none such, or fewer GPUs than ranks, or where ranks name one GPU.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"got device {name!r}, expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"got device {name!r}, expected cpu, cuda or cuda:N (others are untested)")
    several, count = world_size() > 1, torch.cuda.device_count()
    if several and device.index is not None:
        raise ValueError(f"got --device {name} for several ranks, expected cuda (one each) or cpu")
    if device.type == "cpu":
        return device
    if several:
        rank = int(os.environ["LOCAL_RANK"])
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", rank + 1))
        if ranks > count:  # on every rank of this machine alike
            raise ValueError(f"got {ranks} ranks on a machine with {count} GPUs, expected at most "
                             f"one a GPU: use --nproc_per_node={max(count, 1)}, or --device cpu")
        return torch.device("cuda", rank)
    if (device.index or 0) >= count:
        raise ValueError(f"got device {name!r}, but torch sees {count} CUDA devices; use --device "
                         "cpu, or install a driver and a CUDA build of torch")
    return device


def pick_dtype(name: str | None, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; else the checkpoint's on CUDA, bfloat16 on a CPU with units for it."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"got dtype {name!r}, expected one of {', '.join(DTYPES)}")
    if device.type == "cuda":
        dtype = DTYPES[name] if name else config.dtype
        if dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(f"{torch.cuda.get_device_name(device)} has no bfloat16; use --dtype "
                             "float16 or float32")
        return dtype
    if name == "float16":
        raise ValueError("got dtype float16 on a CPU, where it is slow; use bfloat16 or float32")
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return DTYPES[name or ("bfloat16" if fast else "float32")]


def start(device: torch.device, *, check: bool = False) -> Shard:
    """Join the process group that torchrun's variables describe, if any; `stop()` leaves it."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)  # Triton launches and events go to the current device
    if world_size() == 1:
        return Shard()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT,
                            device_id=device if cuda else None)
    return Shard(dist.get_rank(), dist.get_world_size(), check=check)


def stop() -> None:
    """Leave the process group, once all ranks are done."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # none leaves while another still needs it
        dist.destroy_process_group()
