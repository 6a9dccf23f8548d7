"""What one rank of tests/test_tp.py runs: many cases in one process group, on the CPU, one thread. Not a test file."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import tp
from generate import Engine
from judge import JudgeHead
from model import WHOLE, Transformer

PROMPT = [300, 17, 98, 256, 44, 211, 8, 77, 130]
BATCHES = (1, 3)
GREEDY, SAMPLED, TOP_K = {}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.3, "top_k": 20, "seed": 6}
WAYS = [(rule, options) for rule in ("none", "exact", "judge") for options in (GREEDY, SAMPLED, TOP_K)]
FEW_WAYS = [("none", GREEDY), ("exact", GREEDY), ("judge", GREEDY), ("judge", SAMPLED)]  # many ranks on few cores take long


def load(case: dict, shard) -> tuple[Transformer, Transformer | None, JudgeHead | None]:
    target = Transformer.from_checkpoint(case["target"], dtype=torch.float32, shard=shard)
    draft = case["draft"] and Transformer.from_checkpoint(case["draft"], dtype=torch.float32, shard=shard)
    return target, draft, JudgeHead.load(case["head"]) if case["head"] else None


def answers(case: dict, shard=WHOLE, ways: list[tuple] = WAYS, new_tokens: int = 24) -> dict:
    """Tokens of every way to run a case, its logits in batches and from the cache, and what was read."""
    target, draft, head = load(case, shard)
    out: dict = {"tokens": {}, "logits": [], "bytes_read": target.bytes_read,
                 "bytes_held": sum(p.nbytes for p in target.parameters())}
    engine = Engine(target, draft, head, speculate_k=case["speculate_k"], stop_tokens=(), max_seq_length=128)
    for rule, options in ways:
        if rule in ("none", "exact", "judge")[:1 + bool(draft) + bool(head)]:
            blocks = list(engine.generate(PROMPT, max_new_tokens=new_tokens, rule=rule, **options))
            out["tokens"][(rule, *options.values())] = [(token, source) for block in blocks for token, source in zip(*block)]
    for batch in BATCHES:
        tokens = torch.randint(0, 700, (batch, 12), generator=torch.Generator().manual_seed(batch))
        target.setup_caches(batch, 32)
        out["logits"].append(shard.gather(target.logits(target(tokens))))
        out["logits"].append(shard.gather(target.logits(target(tokens, torch.arange(12)))))
    return out


def stop_early(case: dict, shard) -> list[int]:
    """Rank 0 stops reading after three blocks; what every rank has seen by then, and that the next answer still agrees."""
    target, draft, head = load(case, shard)
    engine = Engine(target, draft, head, speculate_k=4, stop_tokens=(), max_seq_length=128)
    seen = 0
    for _ in engine.generate(PROMPT, max_new_tokens=40):
        seen += 1
        if seen == 3 and shard.rank == 0:
            break
    again = [token for block in engine.generate(PROMPT, max_new_tokens=8) for token in block.tokens]
    return [seen, *again]


def main(rank: int, world: int, port: int, directory: str, cases: list[dict]) -> None:
    """One rank; rank 0 writes what all have found to results.pt, each rank its bytes."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    shard = tp.start(torch.device("cpu"), check=True)
    results = [answers(case, shard) if world == 2 else answers(case, shard, FEW_WAYS, 12) for case in cases]
    early = shard.everyone(stop_early(cases[0], shard))
    read = shard.everyone([(result["bytes_read"], result["bytes_held"]) for result in results])
    if rank == 0:
        torch.save({"results": results, "early": early, "read": read}, Path(directory) / "results.pt")
    tp.stop()
