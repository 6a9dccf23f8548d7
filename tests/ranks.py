"""What one rank of tests/test_tp.py runs: many cases in one process group, on the CPU, one thread.

Not a test file.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch._dynamo

import tp
from drafter import LookupDrafter
from generate import Engine
from judge import JudgeHead, Rule
from model import Transformer

PROMPT = [300, 17, 98, 256, 44, 211, 8, 77, 130, 98, 256, 44]
BATCHES = (1, 3)
GREEDY, SAMPLED = {}, {"temperature": 0.8, "seed": 5}
TOP_K = {"temperature": 1.3, "top_k": 20, "seed": 6}


class Often(Rule):
    """Keeps what target and draft both find likely: whole rows of p and q on every rank."""

    name, needs_probs, needs_draft_probs = "often", True, True

    def score(self, seen):
        column = seen.drafted[:, None]
        p, q = (x[:len(column)].gather(1, column)[:, 0] for x in (seen.probs, seen.draft_probs))
        return ((p > 0.02) & (q > 0.02)).float()


# (drafter, rule, options)
WAYS = [("model", rule, options) for rule in ("none", "exact", "judge", "often")
        for options in (GREEDY, SAMPLED, TOP_K)]
WAYS += [("lookup", "exact", GREEDY), ("lookup", "exact", SAMPLED), ("lookup", "judge", GREEDY),
         ("lookup", "often", SAMPLED)]
# Many ranks on few cores take long.
FEW_WAYS = [("model", "none", GREEDY), ("model", "exact", GREEDY), ("model", "judge", GREEDY),
            ("model", "judge", SAMPLED), ("model", "often", GREEDY), ("lookup", "judge", GREEDY)]


def load(case: dict, shard: tp.Shard) -> tuple[Transformer, Transformer | None, JudgeHead | None]:
    target, draft = (
        case[name] and Transformer.from_checkpoint(case[name], dtype=torch.float32, shard=shard)
        for name in ("target", "draft"))
    return target, draft, JudgeHead.load(case["head"]) if case["head"] else None


def answers(case: dict, shard: tp.Shard | None = None, ways: list[tuple] = WAYS,
            new_tokens: int = 24) -> dict:
    """Tokens of every way to run a case, logits in batches and from the cache, what was read."""
    shard = shard or tp.Shard()
    target, draft, head = load(case, shard)
    out: dict = {"tokens": {}, "logits": [], "bytes_read": target.bytes_read,
                 "bytes_held": sum(p.nbytes for p in target.parameters())}
    settings = {"speculate_k": case["speculate_k"], "stop_tokens": (), "max_seq_length": 128}
    engines = {"model": Engine(target, draft, head, **settings)}
    if draft is not None:
        engines["lookup"] = Engine(target, LookupDrafter(), head, **settings)
    for drafter, rule, options in ways:
        if draft is None and rule != "none":
            continue
        blocks = engines[drafter].generate(PROMPT, max_new_tokens=new_tokens, **options,
                                           rule=Often() if rule == "often" else rule)
        found = [pair for block in blocks for pair in zip(*block)]
        out["tokens"][(drafter, rule, *options.values())] = found
    for batch in BATCHES:
        tokens = torch.randint(0, 700, (batch, 12), generator=torch.Generator().manual_seed(batch))
        target.setup_caches(batch, 32)
        out["logits"].append(shard.gather(target.logits(target(tokens))))
        out["logits"].append(shard.gather(target.logits(target(tokens, torch.arange(12)))))
    return out


def stop_early(case: dict, shard: tp.Shard) -> list[int]:
    """Rank 0 stops reading after three blocks; what a rank has seen by then, and a next answer."""
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
    """One rank; rank 0 writes what all have found to results.pt."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shard = tp.start(torch.device("cpu"), check=True)
    few = {} if world == 2 else {"ways": FEW_WAYS, "new_tokens": 12}
    results = [answers(case, shard, **few) for case in cases]
    early = shard.everyone(stop_early(cases[0], shard))
    read = shard.everyone([(result["bytes_read"], result["bytes_held"]) for result in results])
    if rank == 0:
        torch.save({"results": results, "early": early, "read": read},
                   Path(directory) / "results.pt")
    tp.stop()
