"""Tensor parallelism: one rank holds a slice of every large matrix, and all ranks run the same rounds.

Each layer is cut so that two all-reduces are all it needs: queries, keys and values by heads, gate and up by columns, and the
matrices that follow them by rows. Embedding and LM head are cut by vocabulary, as at batch 1 they are weights like any
others. `TABLE` says it for every parameter; it is applied where weights are read, so a rank reads its own slices and nothing
else. Where ranks outnumber key-value heads, ranks share a head: rank r holds head floor(r · Hkv / world).

Ranks cannot drift. Hidden states are equal to the bit after an all-reduce, random numbers come from one seed, and so every
rank takes the same decisions from the same inputs; rank 0 alone says when a consumer has stopped early. Greedy rounds send
candidates (value, index), never rows of logits; a sampled round gathers its rows.

Bytes that a rank hands to collectives in one greedy round of K drafted tokens (b bytes an activation, D and L of each model):

    target  b · (K + 1) · D · (2L + 1)        two all-reduces a layer, one after the embedding
    draft   b · (K + 1) · D · (2L + 1)        K steps, the first of two rows
    both    8 · (2K + 1)                      value and index (float32) for K drafted tokens and K + 1 verified rows

sampled, instead of the last row: 4 V / world for each drafted token, b V / world for each verified one. Per-rank traffic of
the ring that NCCL uses for large messages is 2 (world - 1) / world times that.

Shapes: B batch, S tokens, D model dim, V vocabulary, H and Hkv query and key-value heads.

    torchrun --standalone --nproc_per_node=8 generate.py --judge --checkpoint_path … --draft_checkpoint_path …
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 generate.py …   # on both nodes

Source: Megatron-LM (arXiv 1909.08053). It does not overlap communication with computation.
"""

from __future__ import annotations

import itertools
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import STACKED, ModelConfig, Transformer, Whole

# How a parameter is cut, by the end of its name. heads: rows, whole heads at a time. column: rows of the weight (columns of
# its transpose). row: columns of the weight. vocabulary: rows. replicated: every rank holds all of it.
TABLE = {
    "embed_tokens.weight": "vocabulary", "lm_head.weight": "vocabulary", "lm_head.scale": "vocabulary",
    "qkv_proj.weight": "heads", "qkv_proj.scale": "heads", "o_proj.weight": "row", "o_proj.scale": "replicated",
    "gate_up_proj.weight": "column", "gate_up_proj.scale": "column", "down_proj.weight": "row", "down_proj.scale": "replicated",
    "input_layernorm.weight": "replicated", "post_attention_layernorm.weight": "replicated", "norm.weight": "replicated",
}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=30)  # of one collective: ranks wait while another compiles; torchrun ends a job whose rank died


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
    """ValueError unless a model of this config can be spread over `world` ranks; says which sizes could."""
    def fails(world: int) -> list[str]:
        sizes = {"query heads": config.num_heads, "intermediate_size": config.intermediate_size, "vocabulary": config.vocab_size}
        found = [f"{name} {size}" for name, size in sizes.items() if size % world]
        if config.num_kv_heads % world and world % config.num_kv_heads:
            found.append(f"key-value heads {config.num_kv_heads} (they must divide it, or be divided by it)")
        if config.int8 and not found:
            local = {"o_proj": config.num_heads * config.head_dim // world, "down_proj": config.intermediate_size // world}
            found += [f"(by 4, in int8) {name}'s {size} inputs a rank" for name, size in local.items() if world > 1 and size % 4]
        return found

    if problems := fails(world):
        possible = [str(n) for n in range(1, config.num_heads + 1) if not fails(n)]
        raise ValueError(f"{what}: got {world} ranks, which do not divide {', '.join(problems)}; expected "
                         f"{' or '.join(possible)}: run torchrun with such an --nproc_per_node")


class Shard(Whole):
    """This process's part of every model: `rank` of `world`. Collectives run in the default process group.

    check=True compares the committed tokens of all ranks in every round (for tests: one more exchange a round).
    """

    def __init__(self, rank: int, world: int, *, check: bool = False):
        self.rank, self.world, self.check = rank, world, check
        self.group = dist.group.WORLD.group_name

    def check_config(self, config: ModelConfig, what: str) -> None:
        check_world(config, self.world, what)

    def cut(self, source: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """(rows, columns) of a checkpoint's tensor that this rank holds; columns of packed int8 count int32 words."""
        layer, _, leaf = source.removeprefix("model.").rpartition(".")
        name = layer.rpartition(".")[2]
        ours = next((ours for ours, theirs in STACKED.items() if name in theirs), name)
        how = kind(f"{ours}.{'scale' if leaf == 'weight_scale' else 'weight'}")
        if how == "heads":
            head_rows = share(config.num_heads, self.rank, self.world)
            if name != "q_proj":
                head_rows = kv_share(config.num_kv_heads, self.rank, self.world)
            return (head_rows[0] * config.head_dim, head_rows[1] * config.head_dim), None
        if how in ("column", "vocabulary"):
            return share(shape[0], self.rank, self.world), None
        return (0, shape[0]), share(shape[1], self.rank, self.world) if how == "row" else None

    def apply(self, model: Transformer, cuts: dict) -> None:
        """Give a model on the meta device this rank's sizes, and its modules this shard."""
        for name, parameter in list(model.named_parameters()):
            module = model.get_submodule(name.rpartition(".")[0])
            rows = sum(last - first for (first, last), _ in cuts[name])
            columns = cuts[name][0][1]
            shape = list(parameter.shape)
            shape[0] = rows
            if columns is not None:
                shape[1] = (columns[1] - columns[0]) * (4 if parameter.dtype is torch.int8 else 1)
            local = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"), requires_grad=False)
            setattr(module, name.rpartition(".")[2], local)
        for module in model.modules():
            if hasattr(module, "shard"):
                module.shard = self
            if hasattr(module, "in_features"):
                module.out_features, module.in_features = module.weight.shape

    def all_reduce(self, x: Tensor) -> Tensor:
        return _wait(torch.ops._c10d_functional.all_reduce(x, "sum", self.group))

    def gather(self, x: Tensor) -> Tensor:
        parts = _wait(torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous()[None], self.world, self.group))
        return parts.movedim(0, -2).flatten(-2)  # [world, ..., n] -> [..., world · n]

    def agree(self, stop: bool) -> bool:
        """Rank 0's word, on the host. RuntimeError on a rank whose consumer stopped alone: the others would wait for it."""
        flag = torch.tensor([stop], dtype=torch.uint8)
        dist.broadcast(flag, 0)
        if stop and not flag.item():
            raise RuntimeError(f"rank {self.rank} stopped reading tokens while rank 0 goes on; only rank 0 may stop early")
        return bool(flag.item())

    def same(self, tokens: list[int]) -> None:
        """With check: RuntimeError on a rank that did not commit what rank 0 did, which ends the job."""
        if self.check and (first := self.from_first(tokens)) != tokens:
            raise RuntimeError(f"ranks have drifted: rank {self.rank} has {tokens}, rank 0 {first}")

    def everyone(self, value: object) -> list:
        """The values of all ranks, on every rank."""
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: object) -> object:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


def under_torchrun() -> bool:
    """Whether this process is one rank of several. ValueError where only some of torchrun's variables are set."""
    there = [name for name in VARIABLES if name in os.environ]
    if there and len(there) < len(VARIABLES) and {"RANK", "WORLD_SIZE"} & set(there):
        missing = [name for name in VARIABLES if name not in os.environ]
        raise ValueError(f"got {', '.join(there)} without {', '.join(missing)} in the environment, expected all of torchrun's "
                         "variables or none; start with: torchrun --standalone --nproc_per_node=N generate.py …")
    return len(there) == len(VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def rank_device(name: str | None) -> torch.device:
    """The device of this rank: its own GPU, or the CPU. ValueError where there are more ranks than GPUs, or one GPU is named."""
    if name is not None and ":" in name:
        raise ValueError(f"got --device {name} with several ranks, expected cuda or cpu: each rank takes its own GPU")
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    if ranks > count:  # on every rank of this machine alike
        raise ValueError(f"got {ranks} ranks on a machine with {count} GPUs, expected at most one a GPU: use "
                         f"--nproc_per_node={max(count, 1)}, or --device cpu")
    return torch.device("cuda", local)


def start(device: torch.device, *, check: bool = False) -> Shard:
    """Join the process group that torchrun's variables describe. Call `stop()` at the end."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
    return Shard(dist.get_rank(), dist.get_world_size(), check=check)


def compile_in_turn() -> None:
    """Let the first rank of each machine compile first; the others then find what it made in the compiler's cache.

    Every rank compiles the same graphs in the same order (what differs between ranks is data), so the n-th compilation of the
    others waits for the end of the first one's n-th.
    """
    from torch._dynamo.callback import CallbackTrigger, callback_handler  # here: a second to import

    store, node, count = dist.distributed_c10d._get_default_store(), os.environ.get("GROUP_RANK", "0"), itertools.count()

    def wait(args) -> None:
        if args.callback_trigger is CallbackTrigger.DYNAMO:  # not the recording of CUDA graphs, in which all ranks meet
            store.wait([f"compiled/{node}/{next(count)}"], TIMEOUT)

    def tell(args) -> None:
        if args.callback_trigger is CallbackTrigger.DYNAMO:
            store.set(f"compiled/{node}/{next(count)}", "")

    if os.environ["LOCAL_RANK"] == "0":
        callback_handler.register_end_callback(tell)
    else:
        callback_handler.register_start_callback(wait)


def stop() -> None:
    """Leave the process group, once all ranks are done."""
    if dist.is_initialized():
        dist.barrier()  # none leaves while another still needs it
        dist.destroy_process_group()


def rank_bytes(config: ModelConfig, world: int, *, bits: int = 16) -> int:
    """Bytes of weights on one rank (rank 0), from shapes alone; int8 layers carry a bfloat16 scale a channel."""
    head_dim, D, F, V = config.head_dim, config.hidden_size, config.intermediate_size, config.vocab_size
    first, last = kv_share(config.num_kv_heads, 0, world)
    qkv = (config.num_heads // world + 2 * (last - first)) * head_dim
    layers = [(qkv, D), (D, config.num_heads // world * head_dim), (2 * F // world, D), (D, F // world)] * config.num_layers
    head = [] if config.tie_word_embeddings else [(V // world, D)]
    scales = 2 if bits == 8 else 0
    weights = sum(out * inputs * bits // 8 + out * scales for out, inputs in layers + head)
    return weights + 2 * (V // world * D + D * (2 * config.num_layers + 1))
