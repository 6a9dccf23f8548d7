"""Judge head and acceptance: which draft tokens stay, and which token the target adds.

The target has read K draft tokens in one pass, which left K+1 rows of pre-norm hidden state and of
logits; row r is the state after d_r (row 0: the last committed token). d_i stays if standard
speculative sampling keeps it (Leviathan et al., arXiv 2211.17192), or if a lossy *rule* does. The
judge keeps what the target, having read it, finds *correct* (Bachmann et al., arXiv 2501.19309):

    exact_i = argmax(logits[i-1]) == d_i; sampled: u_i * q_i(d_i) < p_{i-1}(d_i)
    lossy_i = score_i > threshold, d_i no stop token; judge: score_i = sigmoid(w . hidden[i] + b)
    a       = number of tokens before the first i with neither
    next    = argmax(logits[a]); sampled: argmax(max(0, p_a - q_{a+1}) / e), e ~ Exp(1), q_{K+1} = 0

p is softmax over (top-k kept logits / temperature). A residual of zeros (p = q up to rounding)
falls back to p_a. A sigmoid never exceeds 1, so the judge with threshold 1 is the exact rule. A new
rule is a class with a `score` and a row in RULES (docs/hacking.md).

`accept_torch` is the reference: it runs every rule, in float64 too, and is what a CPU compiles.
`accept_triton` runs `exact` and `judge` without the host, in two launches (`row_stats`, `decide`),
or three when sampling (`residual_sample`). The two agree except where rounding decides: a score
within 2^-22 + 2^-20 * (|b| + sum|w_j h_j|) of the threshold, u q within 2^-18 * p * (1 + (max -
logit) / temperature) of p, or a draw's runner-up as close. Exact greedy decisions always agree.

Shapes: K draft length, D model dim, V vocabulary, S vocabulary shards. No caches, no batches here.

    accept(hidden, logits, drafted, rule=Judge(head), threshold=threshold, stop_tokens=stop)
"""

from __future__ import annotations

import inspect
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoint import atomic_write

try:
    import triton
    import triton.language as tl
except ImportError:  # no triton for this platform: the reference still runs
    triton = None

FORMAT = "gavel-judge-1"
FEATURE = "last_hidden_pre_norm"
RETRAIN = "train one with train_head.py"
MAX_K = 64

# On 16 warps: each logit is read once and stays in registers (8 a thread), and 26 rows x 32 splits
# are six programs a multiprocessor (132). ptxas spilled on 8 warps (fp32, sm_90); so did 2048.
BLOCK_V = 4096
BLOCK_D = 512  # 16384 / 32 splits: one step of the judge's dot product a program
BLOCK_TOPK = 4096  # lanes of the top-k scan: beyond this k, candidates are the row. 8192 spilled.
# Leading bits in which values of a dtype differ as float32: steps of the search for the k-th.
KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}


class Decision(NamedTuple):
    """One round's outcome, on the device, in fixed shapes."""

    accept_len: Tensor  # int64 []: a, draft tokens kept, 0..K
    next_token: Tensor  # int64 []: the target's own token after them (some valid id if status)
    source: Tensor  # int8 [K], whatever the cut: 0 rejected, 1 exact, 2 the lossy rule only
    score: Tensor  # float32 [K]: the rule's, zeros without one
    status: Tensor  # int32 []: 1 if a logits row that it used (0..a) has NaN, +inf, or only -inf


class Verified(NamedTuple):
    """What the target left after [last, d_1..d_K], and what the draft knew. Row r: after d_r."""

    hidden: Tensor  # [K+1, D] before the final norm
    logits: Tensor  # float32 [K+1, V] before temperature (this rank's columns, unless needs_probs)
    drafted: Tensor  # int64 [K]
    probs: Tensor | None  # float32 [K+1, V]: p after temperature and top_k; greedy: softmax
    draft_probs: Tensor | None  # float32 [K, V]: q likewise; None when nobody needs it
    uniforms: Tensor | None  # float32 [K], when sampling


class JudgeHead(nn.Module):
    """Linear D -> 1 on the target's last hidden state, before its final norm.

    weight float32 [1, D], bias float32 [1]; metadata: strings, of which `threshold` in [0, 1] is
    required; `target` and `data` say what it was trained for and on. ValueError for any misfit.
    """

    def __init__(self, weight: Tensor, bias: Tensor, metadata: dict[str, str]):
        super().__init__()
        self.hidden_size = D = weight.shape[-1] if weight.dim() else 0
        own = {"format": FORMAT, "feature": FEATURE, "hidden_size": str(D), "threshold": ""}
        self.metadata = own | metadata
        for what, got, expected in (
                ("weight", _describe(weight), f"torch.float32 [1, {max(D, 1)}], finite"),
                ("bias", _describe(bias), "torch.float32 [1], finite"),
                *((f"metadata {key}", self.metadata[key], own[key]) for key in list(own)[:3])):
            if got != expected:
                raise _error(f"judge head's {what}", repr(got), repr(expected), RETRAIN)
        try:
            self.threshold = float(self.metadata["threshold"])
        except ValueError:
            self.threshold = math.nan
        if not 0 <= self.threshold <= 1:
            raise _error("judge head's metadata threshold", repr(self.metadata["threshold"]),
                         "a number from 0 to 1", RETRAIN)
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", bias.detach().contiguous())

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: str | torch.device = "cpu") -> JudgeHead:
        """Read a safetensors file; FileNotFoundError or ValueError name path, fault and cure."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"judge head {path}: got no file, expected one; {RETRAIN} or "
                                    "pass its path")
        required = {"format": "", "feature": "", "hidden_size": ""}  # else it would fill them in
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, sorted(file.keys())
                if names != ["bias", "weight"]:
                    raise _error("judge head", f"tensors {names}", "bias and weight", RETRAIN)
                tensors = {name: file.get_tensor(name) for name in names}
            return cls(**tensors, metadata=required | metadata).to(device)
        except SafetensorError as error:
            raise _error(f"judge head {path}", f"a broken or foreign file ({error})",
                         "one whole safetensors file",
                         f"copy it again or {RETRAIN} (pickles are never opened)") from None
        except ValueError as error:
            raise ValueError(f"{error} (in {path})") from None

    def save(self, path: str | os.PathLike) -> None:
        with atomic_write(path) as aside:
            save_file({"weight": self.weight, "bias": self.bias}, aside, self.metadata)

    def check(self, hidden_size: int) -> None:
        """ValueError unless the head was trained on hidden states of this size."""
        if hidden_size != self.hidden_size:
            target = self.metadata.get("target", "unknown")
            got = f"hidden size {self.hidden_size} (trained for target {target})"
            raise _error("judge head", got, f"this target's {hidden_size}",
                         f"pass this target's head or {RETRAIN}")

    def score(self, hidden: Tensor) -> Tensor:
        """sigmoid(w . h + b) <= 1: hidden [..., D] -> [...], float32 (float64 if hidden is)."""
        hidden = hidden.to(_compute_dtype(hidden))
        return torch.sigmoid((hidden * self.weight[0]).sum(-1) + self.bias[0])


class Rule:
    """Which tokens stay beyond the exact rule: d_i with score_i > threshold, if no stop token.

    A subclass sets `name` and `score`; its constructor checks (ValueError) what --rule_args names.
    """

    name: str
    needs_probs = False  # then ranks gather whole rows, and `Verified.probs` is there
    needs_draft_probs = False  # then a greedy drafter keeps them too
    threshold = 0.5
    head: JudgeHead | None = None
    overrules = False  # for benchmarks: the score alone decides, the exact rule keeps nothing
    on_host = False  # for benchmarks: the score reads tensors back, so nothing compiles or records

    def check(self, hidden_size: int) -> None:
        """ValueError where the rule does not fit a target of this hidden size."""
        if self.head is not None:
            self.head.check(hidden_size)

    def to(self, device: torch.device) -> Rule:
        """Move what it holds to the target's device."""
        if self.head is not None:
            self.head.to(device)
        return self

    def score(self, seen: Verified) -> Tensor | None:
        """float32 [K] in [0, 1], entry i-1 for d_i; None: the exact rule alone. No host sync."""
        return None


class Exact(Rule):
    """Standard speculative sampling: the target's own distribution, token for token."""

    name = "exact"


class Judge(Rule):
    """sigmoid(w . h_i + b) > threshold, h_i the target's state after d_i (arXiv 2501.19309)."""

    name = "judge"

    def __init__(self, head: JudgeHead):
        self.head, self.threshold = head, head.threshold

    def score(self, seen: Verified) -> Tensor:
        return self.head.score(seen.hidden[1:])


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Exact, Judge)}


def make_rule(name: str, *, head: JudgeHead | None = None, threshold: float | None = None,
              rule_args: dict | None = None) -> Rule:
    """The rule of a name, with its arguments and threshold; ValueError for what does not fit."""
    if name not in RULES:
        raise _error("rule", repr(name), f"one of {', '.join(RULES)}", "docs/hacking.md adds one")
    given, signature = dict(rule_args or {}), inspect.signature(RULES[name])
    if "head" in signature.parameters:
        if head is None:
            raise _error(f"rule {name}", "no judge head", "one", "give --judge [HEAD]")
        given["head"] = head
    try:
        rule = RULES[name](**given)
    except TypeError as error:  # a name that it does not know, or no number where it wants one
        raise _error(f"rule {name}", f"arguments with {error}", signature, "mend them") from None
    if threshold is not None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"got threshold {threshold}, expected a number in [0, 1]; 1: lossless")
        rule.threshold = threshold
    return rule


def available_rules(rule: str | Rule | None, head: JudgeHead | None, *, drafts: bool,
                    threshold: float | None = None) -> dict[str, Rule | None]:
    """What can run, by name, `rule` last (default: judge with a head, else exact; no draft: none).

    ValueError for a rule without a draft, or a threshold for one that has none.
    """
    rules: dict[str, Rule | None] = {"none": None}
    name = rule.name if isinstance(rule, Rule) else rule or ("judge" if head else None)
    if not drafts and name not in (None, "none"):
        raise ValueError(f"got rule {name!r} without a draft: there is nothing to judge; give "
                         "--draft_checkpoint_path DIR or --draft lookup")
    if drafts:
        rules["exact"] = make_rule("exact")
    if drafts and head is not None:
        rules["judge"] = make_rule("judge", head=head, threshold=threshold)
    if isinstance(rule, str) and rule not in rules:
        rule = make_rule(rule, head=head, threshold=threshold)
    if rule is not None:
        made = rules.pop(name, None)
        rules[name] = rule if isinstance(rule, Rule) else made
    if threshold is not None and next(reversed(rules)) in ("none", "exact"):
        raise _error("threshold", threshold, f"none with rule {next(reversed(rules))}",
                     "leave it out, or add a judge")
    return rules


def check_fit(target, draft, rule: Rule | None, speculate_k: int) -> None:
    """ValueError where two ModelConfigs (the draft's perhaps None), a rule and K do not fit."""
    if not isinstance(speculate_k, int) or not 1 <= speculate_k <= MAX_K:
        raise ValueError(f"got speculate_k {speculate_k}, expected a number from 1 to {MAX_K}, "
                         "which is what the judge kernel holds; 16 is a good start")
    if draft is not None and draft.vocab_size != target.vocab_size:
        raise ValueError(f"got a draft with a vocabulary of {draft.vocab_size} and a target with "
                         f"{target.vocab_size}; expected the same: take two models of one family")
    if rule is not None:
        rule.check(target.hidden_size)


def probs(logits: Tensor, temperature: Tensor | float, top_k: int | None = None) -> Tensor:
    """softmax(kept logits / temperature): [..., V] -> float32 [..., V] (float64 if logits are).

    Top-k keeps every logit >= the k-th largest of its row: ties may keep more, k >= V keeps all.
    """
    logits = logits.to(_compute_dtype(logits))
    if top_k is not None and top_k < logits.shape[-1]:
        kth = torch.topk(logits, top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)


def sample(probs: Tensor, exponentials: Tensor) -> Tensor:
    """A draw from unnormalised weights [..., V] -> [...]: argmax(probs / e), e ~ Exp(1)."""
    return torch.argmax(probs / exponentials, -1)


def greedy(logits: Tensor, shard=None, first_token: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """argmax (lowest index on ties) and max of each row, [..., V] -> [...], [...]; NaN is the max.

    Over ranks (tp.Shard) logits are this rank's columns, which start at `first_token` of the
    vocabulary; two floats a row travel.
    """
    best, top = logits.argmax(-1), logits.amax(-1)
    if shard is None or shard.world == 1:
        return best, top
    candidates = torch.stack((top.float(), (best + first_token).float()), -1)  # exact: V < 2^24
    tops, tokens = shard.gather(candidates[..., None]).unbind(-2)  # [..., world]
    top = tops.amax(-1)
    return torch.where(tops == top[..., None], tokens, float(1 << 24)).amin(-1).to(torch.int64), top


def accept(hidden: Tensor, logits: Tensor, drafted: Tensor, *, rule: Rule, **inputs) -> Decision:
    """Decide one round: the kernel on CUDA for rules it knows, else `accept_torch`; same inputs."""
    if logits.is_cuda and type(rule) in (Exact, Judge):
        return accept_triton(hidden, logits, drafted, rule=rule, **inputs)
    return accept_torch(hidden, logits, drafted, rule=rule, **inputs)


def accept_torch(hidden: Tensor, logits: Tensor, drafted: Tensor, *, rule: Rule, threshold: Tensor,
                 stop_tokens: Tensor, temperature: Tensor | None = None, top_k: int | None = None,
                 draft_probs: Tensor | None = None, uniforms: Tensor | None = None,
                 exponentials: Tensor | None = None, shard=None,
                 first_token: Tensor | int = 0) -> Decision:
    """The rule in plain torch, without a host sync or a shape that depends on data: it compiles.

    hidden [K+1, D], logits [K+1, V], drafted int64 [K], as in `Verified`. threshold float32 [].
    stop_tokens int64 [n], n >= 0: never rescued. temperature float32 [], > 0, or None for greedy;
    sampling needs draft_probs float32 [K, V] (what the draft sampled from), uniforms float32 [K] in
    [0, 1) and exponentials float32 [V], Exp(1). Over ranks (shard: tp.Shard) logits are this rank's
    columns from `first_token` on; without shard, whole rows. ValueError for a misfit.
    """
    _check(hidden, logits, drafted, rule, temperature, top_k, draft_probs, uniforms, exponentials)
    K, sampled = drafted.shape[0], temperature is not None
    logits = logits.to(_compute_dtype(logits))
    best, top = greedy(logits, shard, first_token)  # [K+1]
    bad, p = ~top.isfinite(), None
    if sampled or rule.needs_probs:
        p = probs(logits, temperature if sampled else 1.0, top_k)  # [K+1, V]
    if sampled:
        column = drafted[:, None]
        exact = uniforms * draft_probs.gather(1, column)[:, 0] < p[:K].gather(1, column)[:, 0]
    else:
        exact = best[:K] == drafted
    exact = exact & ~bad[:K]
    if rule.overrules:
        exact = torch.zeros_like(exact)

    score, lossy = rule.score(Verified(hidden, logits, drafted, p, draft_probs, uniforms)), False
    if score is None:
        score = torch.zeros(K, device=logits.device)
    else:
        lossy = (score > threshold) & ~(drafted[:, None] == stop_tokens[None, :]).any(-1)
    a = (exact | lossy).to(torch.int64).cumprod(0).sum()

    if sampled:
        p_a = p.index_select(0, a[None])[0]
        q_next = draft_probs.index_select(0, a.clamp(max=K - 1)[None])[0]  # q_{a+1}
        residual = torch.where(a < K, p_a - q_next, p_a).clamp(min=0)
        next_token = sample(torch.where((residual > 0).any(), residual, p_a), exponentials)
    else:
        next_token = best.gather(0, a[None])[0]
    status = (bad & (torch.arange(K + 1, device=bad.device) <= a)).any().to(torch.int32)
    source = torch.where(exact, 1, torch.where(exact | lossy, 2, 0)).to(torch.int8)
    return Decision(a, next_token, source, score, status)


def accept_triton(hidden, logits, drafted, *, rule, threshold, stop_tokens, temperature=None,
                  top_k=None, draft_probs=None, uniforms=None, exponentials=None, shard=None,
                  first_token=0) -> Decision:
    """`accept_torch` (same inputs) by the kernels; ValueError for a rule or tensor beyond them."""
    draws = draft_probs, uniforms, exponentials
    _check(hidden, logits, drafted, rule, temperature, top_k, *draws)
    _check_triton(hidden, logits, drafted, rule, *draws)
    rank = shard.rank if shard is not None else 0
    stats = row_stats(hidden, logits, drafted, head=rule.head if rank == 0 else None,
                      temperature=temperature, top_k=top_k, vocab_offset=logits.shape[1] * rank)
    if shard is not None:
        stats = shard.gather(stats)
    decision, cut_row = decide(stats, drafted, head=rule.head, threshold=threshold,
                               stop_tokens=stop_tokens, temperature=temperature,
                               draft_probs=draft_probs, uniforms=uniforms)
    if temperature is not None:
        residual_sample(decision, cut_row, logits, draft_probs, exponentials, temperature)
    return decision


def _check(hidden, logits, drafted, rule, temperature, top_k, *draws) -> None:
    """ValueError for inputs of `accept` that do not fit together; it looks at no values."""
    (rows, V), K = logits.shape, drafted.shape[0]
    if not rows == hidden.shape[0] == K + 1 > 1:
        raise _error("rows of hidden and logits", (hidden.shape[0], rows), f"K + 1 = {K + 1} > 1",
                     "pass both whole")
    rule.check(hidden.shape[1])
    got, expected = [x if x is None else tuple(x.shape) for x in draws], [(K, V), (K,), (V,)]
    if temperature is not None and got != expected:
        raise _error("shapes of draft_probs, uniforms, exponentials", got, expected,
                     "pass all three to sample, or temperature=None for greedy")
    if temperature is not None and top_k is not None and top_k < 1:
        raise _error("top_k", top_k, "1 or more", "pass None to keep the whole vocabulary")


def _check_triton(hidden, logits, drafted, rule, draft_probs, uniforms, exponentials) -> None:
    """ValueError for what the kernels cannot take; it looks at no values."""
    if triton is None or not (logits.is_cuda or INTERPRETED):
        got = "no triton package" if triton is None else f"tensors on {logits.device}"
        raise _error("accept_triton", got, "triton and a GPU",
                     "use accept_torch (to test: TRITON_INTERPRET=1 before the import)")
    if type(rule) not in (Exact, Judge):
        raise _error("accept_triton", f"rule {rule.name}", "exact or judge", "use accept_torch")
    size, integers, floats = (len(drafted), logits.shape[1]), (torch.int64,), (torch.float32,)
    if size[0] > MAX_K or size[1] >= 1 << 24:
        raise _error("accept_triton", size, f"K <= {MAX_K} and V < 2^24", "use accept_torch")
    for name, x, dtypes in (("hidden", hidden, KEY_BITS), ("logits", logits, KEY_BITS),
                            ("draft_probs", draft_probs, KEY_BITS), ("drafted", drafted, integers),
                            ("uniforms", uniforms, floats), ("exponentials", exponentials, floats)):
        if x is not None and (x.dtype not in dtypes or x.shape[-1] > 1 and x.stride(-1) != 1):
            raise _error(name, f"{x.dtype} with strides {x.stride()}",
                         f"contiguous rows of {' or '.join(map(str, dtypes))}",
                         f"pass {name}.contiguous(), or use accept_torch for other dtypes")


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _describe(tensor: Tensor) -> str:
    finite = "finite" if tensor.isfinite().all() else "with NaN or inf"
    return f"{tensor.dtype} {list(tensor.shape)}, {finite}"


def _error(what: str, got, expected, mend: str) -> ValueError:
    return ValueError(f"{what}: got {got}, expected {expected}; {mend}")


jit = triton.jit if triton else lambda kernel: kernel


@jit
def read(pointer, mask):
    """Logits or statistics as float32, -inf where masked."""
    return tl.load(pointer, mask, other=-float("inf")).to(tl.float32)


@jit
def judge_part(hidden, weight, row, stride_h, split, splits, D, BLOCK_D: tl.constexpr):
    """w . hidden[row] over blocks split, split + splits, ... of D; 0 for row 0, never judged."""
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(split * BLOCK_D, D, splits * BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        live = (col < D) & (row > 0)
        h = tl.load(hidden + row.to(tl.int64) * stride_h + col, live, other=0).to(tl.float32)
        acc += h * tl.load(weight + col, live, other=0)
    return tl.sum(acc)


@jit
def store_stats(stats, row, split, splits, rows, top, index, dot, total, token_logit, kth):
    """stats[:, row, split] of float32 [6, rows, splits]; an index is exact, since V < 2^24."""
    at, plane = stats + row * splits + split, rows * splits
    tl.store(at, top)
    tl.store(at + plane, index.to(tl.float32))
    tl.store(at + 2 * plane, dot)
    tl.store(at + 3 * plane, total)
    tl.store(at + 4 * plane, token_logit)
    tl.store(at + 5 * plane, kth)


@jit
def row_stats_kernel(stats, hidden, stride_h, weight, logits, stride_l, drafted, temperature,
                     vocab_offset, K, D, V, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """max, argmax, w.h part; sampled: sum exp((x - max) / T), logit of d_{row+1}, k-th (-inf).

    Grid (K+1, splits of V). A program holds BLOCK_V logits of a row in registers; lanes past V are
    -inf, NaN counts as +inf, which `decide` calls bad. Reads logits and hidden rows 1..K once, w
    once a row (from L2), K logits again when sampling; writes 6 floats a program.
    """
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    logits += row.to(tl.int64) * stride_l
    col = split * BLOCK_V + tl.arange(0, BLOCK_V)
    x = read(logits + col, col < V)
    x = tl.where(x <= float("inf"), x, float("inf"))  # NaN: as bad as +inf
    top = tl.max(x)
    # The lowest lane that holds the max is real even in a block of -inf: lanes past V come last.
    index = tl.min(tl.where(x == top, col, 2147483647)) + vocab_offset
    dot, total, token_logit, kth = 0.0, 0.0, -float("inf"), -float("inf")
    if weight is not None:
        dot = judge_part(hidden, weight, row, stride_h, split, splits, D, BLOCK_D)
    if temperature is not None:
        total = tl.sum(tl.where(x > -float("inf"), tl.exp((x - top) / tl.load(temperature)), 0.0))
        token = tl.load(drafted + row, mask=row < K, other=-1) - vocab_offset
        token_logit = read(logits + token, (token >= 0) & (token < V) & (split == 0))
    store_stats(stats, row, split, splits, K + 1, top, index, dot, total, token_logit, kth)


@jit
def kth_largest(first, rest, n, k, KEY_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The k-th largest of `first` (a block) and rest[BLOCK:n]; -inf where there are fewer than k.

    A float's bits, the lower 31 flipped when it is negative, order like the floats. The largest key
    that k values reach is built from the top bit down; only KEY_BITS leading bits can differ.
    """
    bits = first.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low, step = tl.full([], -2147483648, tl.int64), tl.full([], 2147483648, tl.int64)
    for _ in range(KEY_BITS):
        middle = (low + step).to(tl.int32)
        count = tl.sum((keys >= middle).to(tl.int32))
        for start in range(BLOCK, n, BLOCK):
            col = start + tl.arange(0, BLOCK)
            more = read(rest + col, col < n).to(tl.int32, bitcast=True)
            count += tl.sum(((more ^ ((more >> 31) & 0x7FFFFFFF)) >= middle).to(tl.int32))
        low = tl.where(count >= k, low + step, low)
        step = step >> 1
    key = low.to(tl.int32)
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(value <= float("inf"), value, -float("inf"))  # a key below -inf's is a NaN's


@jit
def topk_stats_kernel(stats, candidates, hidden, stride_h, weight, logits, stride_l, drafted,
                      temperature, top_k, K, D, V, KEY_BITS: tl.constexpr, BLOCK_V: tl.constexpr,
                      BLOCK_D: tl.constexpr):
    """row_stats of the kept logits: max, w.h, sum exp, logit of d (-inf if not kept), k-th logit.

    Grid (K+1,): one program a row, since the k-th needs all of it; lanes past V are -inf. Scan 1
    keeps each lane's max over windows of BLOCK_V; k values reach the k-th largest lane max, so it
    bounds the k-th from below. Scan 2 packs the few logits that reach the bound into `candidates`
    (the whole row if k > BLOCK_V), where the k-th is searched bit by bit. Reads logits twice (the
    second time from L2), hidden once, w once a row, about k candidates twice; writes the candidates
    and 6 floats a row.
    """
    row, lane = tl.program_id(0), tl.arange(0, BLOCK_V)
    logits += row.to(tl.int64) * stride_l
    candidates += row.to(tl.int64) * V
    lane_max = tl.full([BLOCK_V], -float("inf"), tl.float32)
    for start in tl.range(0, V, BLOCK_V, num_stages=4):  # loads run ahead
        x = read(logits + start + lane, start + lane < V)
        x = tl.where(x <= float("inf"), x, float("inf"))  # NaN: as bad as +inf
        lane_max = tl.maximum(lane_max, x)
    bound = kth_largest(lane_max, candidates, 0, top_k, KEY_BITS, BLOCK_V)

    n = 0
    for start in tl.range(0, V, BLOCK_V, num_stages=4):
        x = tl.load(logits + start + lane, mask=start + lane < V, other=-float("inf"))
        keep = (x.to(tl.float32) >= bound) & (start + lane < V)
        found = tl.sum(keep.to(tl.int32))
        if found > 0:
            tl.store(candidates + (n + tl.cumsum(keep.to(tl.int32)) - 1), x, mask=keep)
        n += found
    tl.debug_barrier()  # the loads below read what other threads of this program stored
    first = read(candidates + lane, lane < n)
    kth = kth_largest(first, candidates, n, top_k, KEY_BITS, BLOCK_V)

    top, T = tl.max(lane_max), tl.load(temperature)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, n, BLOCK_V):
        x = read(candidates + start + lane, start + lane < n)
        total += tl.where((x >= kth) & (x > -float("inf")), tl.exp((x - top) / T), 0.0)
    token = tl.load(drafted + row, mask=row < K, other=-1)
    token_logit, dot = read(logits + token, (token >= 0) & (token < V)), 0.0
    token_logit = tl.where(token_logit >= kth, token_logit, -float("inf"))
    if weight is not None:
        dot = judge_part(hidden, weight, row, stride_h, 0, 1, D, BLOCK_D)
    # The index is unused when sampling: any number will do.
    store_stats(stats, row, 0, 1, K + 1, top, row, dot, tl.sum(total), token_logit, kth)


@jit
def decide_kernel(stats, drafted, bias, threshold, stop_tokens, n_stop, temperature, draft_probs,
                  stride_q, uniforms, accept_len, next_token, source, score, status, cut_row, K,
                  splits, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Merge the shards and apply the rule. Grid (1,): a program of [ROWS, SPLITS] of a statistic.

    Lane i is draft token d_{i+1}: exact on logits row i, judge on hidden row i+1. Rows past K and
    splits past the last are masked, and row K as a draft token. Sampled: cut_row = max, sum of exp,
    k-th logit of row a, and 0 arrivals. Reads statistics, d, u, q(d) once; writes the decision.
    """
    i, s = tl.arange(0, ROWS), tl.arange(0, SPLITS)
    at, plane = stats + i[:, None] * splits + s[None, :], (K + 1) * splits
    live = (i[:, None] <= K) & (s[None, :] < splits)
    shard_max = read(at, live)
    top = tl.max(shard_max, 1)
    bad = tl.abs(top) == float("inf")
    token = tl.load(drafted + i, i < K, other=-1)
    if temperature is not None:
        T = tl.load(temperature)
        scale = tl.where(shard_max > -float("inf"), tl.exp((shard_max - top[:, None]) / T), 0.0)
        total = tl.sum(tl.load(at + 3 * plane, live, other=0.0) * scale, 1)
        token_logit = tl.max(read(at + 4 * plane, live), 1)
        q = tl.load(draft_probs + i.to(tl.int64) * stride_q + token, i < K, other=0.0)
        p = tl.exp((token_logit - top) / T) / total
        exact = tl.load(uniforms + i, i < K, other=1.0) * q < p
    else:
        index = tl.load(at + plane, live, other=float("inf"))
        best = tl.min(tl.where(shard_max == top[:, None], index, float("inf")), 1).to(tl.int64)
        exact = best == token
    exact = exact & (bad == 0) & (i < K)

    passed, result = exact, tl.zeros([ROWS], tl.float32)
    if bias is not None:
        judged = (i[:, None] < K) & (s[None, :] < splits)
        dot = tl.sum(tl.load(at + 2 * plane + splits, judged, other=0.0), 1)
        # Rounded to nearest, so that 1 / (1 + exp) is at most 1 and never passes threshold 1.
        result = tl.div_rn(1.0, 1.0 + tl.exp(-(dot + tl.load(bias))))
        stops = tl.zeros([ROWS], tl.int32)
        for j in range(n_stop):
            stops += (token == tl.load(stop_tokens + j)).to(tl.int32)
        passed = exact | ((result > tl.load(threshold)) & (stops == 0))
    a = tl.min(tl.where(passed & (i < K), K, i))
    tl.store(accept_len, a.to(tl.int64))
    tl.store(source + i, tl.where(exact, 1, tl.where(passed, 2, 0)).to(tl.int8), i < K)
    tl.store(score + i, result, i < K)
    tl.store(status, tl.max(tl.where(bad & (i <= a), 1, 0)))
    if temperature is not None:
        tl.store(cut_row + i * 0, top, i == a)
        tl.store(cut_row + i * 0 + 1, total, i == a)
        tl.store(cut_row + i * 0 + 2, tl.max(read(at + 5 * plane, live), 1), i == a)
        tl.store(cut_row + 3, 0.0)
    else:
        tl.store(next_token + i * 0, best, i == a)


@jit
def residual_sample_kernel(best, next_token, accept_len, cut_row, logits, stride_l, draft_probs,
                           stride_q, exponentials, temperature, vocab_offset, K, V, splits,
                           SPLITS: tl.constexpr, BLOCK_V: tl.constexpr):
    """next_token = argmax(max(0, p_a - q_{a+1}) / e), and best[:, splits] = its (score, index).

    Grid (splits of V,). A program scores BLOCK_V lanes: w / e where the residual w is positive,
    else -e / p, below every w / e and ordered like p / e: a residual of zeros falls back to p by
    itself. Lanes past V score -inf. The last program to arrive (cut_row[3] counts from 0; nobody
    waits) picks the best split. Reads row a of logits, q and e once; writes 2 floats a program.
    """
    split, a = tl.program_id(0), tl.load(accept_len)
    col = split * BLOCK_V + tl.arange(0, BLOCK_V)
    x = read(logits + a * stride_l + col, col < V)
    p = tl.exp((x - tl.load(cut_row)) / tl.load(temperature)) / tl.load(cut_row + 1)
    p = tl.where((x >= tl.load(cut_row + 2)) & (x > -float("inf")), p, 0.0)
    q = tl.load(draft_probs + a * stride_q + col, (col < V) & (a < K), other=0.0)
    e = tl.load(exponentials + col, col < V, other=1.0)
    score = tl.where(p > q, (p - q) / e, -e / p)
    score = tl.where(score <= float("inf"), score, -float("inf"))  # NaN: in a row status reports
    top = tl.max(score)
    index = tl.min(tl.where(score == top, col, 2147483647)) + vocab_offset
    tl.store(best + split, top)
    tl.store(best + splits + 1 + split, index.to(tl.float32))
    tl.debug_barrier()  # both are stored before this program counts as arrived
    if tl.atomic_add(cut_row + 3, 1.0) == splits - 1:
        s = tl.arange(0, SPLITS)
        other = best + splits + 1 + s
        score_s = tl.load(best + s, s < splits, other=-float("inf"), cache_modifier=".cg")
        index_s = tl.load(other, s < splits, other=float("inf"), cache_modifier=".cg")
        winner = tl.min(tl.where(score_s == tl.max(score_s), index_s, float("inf")))
        tl.store(best + splits, tl.max(score_s))
        tl.store(best + 2 * splits + 1, winner)
        tl.store(next_token, winner.to(tl.int64))


INTERPRETED = triton is not None and not isinstance(row_stats_kernel, triton.JITFunction)


def row_stats(hidden: Tensor, logits: Tensor, drafted: Tensor, *, head: JudgeHead | None,
              temperature: Tensor | None = None, top_k: int | None = None,
              vocab_offset: int = 0) -> Tensor:
    """First launch: statistics float32 [6, K+1, S] of logits [K+1, V], columns from `vocab_offset`.

    Planes: max, argmax, judge's w.h, sum of exp, logit of d, k-th logit. Ranks gather along S, one
    of them with the head, as w.h is summed. top_k needs whole rows.
    """
    (rows, V), D = logits.shape, hidden.shape[1]
    whole_rows = temperature is not None and top_k is not None and top_k < V
    splits = 1 if whole_rows else -(-V // BLOCK_V)
    stats = torch.empty(6, rows, splits, dtype=torch.float32, device=logits.device)
    weight = head.weight if head is not None else None
    inputs = (hidden, hidden.stride(0), weight, logits, logits.stride(0), drafted, temperature)
    if whole_rows:
        topk_stats_kernel[(rows,)](
            stats, torch.empty_like(logits), *inputs, top_k, rows - 1, D, V, num_warps=8,
            KEY_BITS=KEY_BITS[logits.dtype], BLOCK_V=BLOCK_TOPK, BLOCK_D=BLOCK_D)
    else:
        row_stats_kernel[(rows, splits)](stats, *inputs, vocab_offset, rows - 1, D, V, num_warps=16,
                                         BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D)
    return stats


def decide(stats: Tensor, drafted: Tensor, *, head: JudgeHead | None, threshold: Tensor,
           stop_tokens: Tensor, temperature: Tensor | None = None, uniforms: Tensor | None = None,
           draft_probs: Tensor | None = None) -> tuple[Decision, Tensor]:
    """Second launch: the decision from (gathered) statistics, without next_token when sampling.

    Also returns float32 [4] for `residual_sample`: row a's max, sum of exp, k-th logit; arrivals.
    """
    K, splits = drafted.shape[0], stats.shape[2]
    dtypes = torch.int64, torch.int64, torch.int8, torch.float32, torch.int32
    decision = Decision(*(torch.empty(shape, dtype=dtype, device=stats.device)
                          for shape, dtype in zip(((), (), K, K, ()), dtypes)))
    cut_row = torch.empty(4, dtype=torch.float32, device=stats.device)
    stride_q = 0 if draft_probs is None else draft_probs.stride(0)
    bias = head.bias if head is not None else None
    decide_kernel[(1,)](
        stats, drafted, bias, threshold, stop_tokens, stop_tokens.shape[0], temperature,
        draft_probs, stride_q, uniforms, *decision, cut_row, K, splits, num_warps=8,
        ROWS=1 << K.bit_length(), SPLITS=1 << (splits - 1).bit_length())
    return decision, cut_row


def residual_sample(decision: Decision, cut_row: Tensor, logits: Tensor, draft_probs: Tensor,
                    exponentials: Tensor, temperature: Tensor, *, vocab_offset: int = 0) -> Tensor:
    """Third launch, sampled only: writes decision.next_token; this shard's best (score, index).

    Over ranks logits, draft_probs and exponentials are the rank's columns; of the results, float32
    [2], the highest score (lowest index on ties) has the token.
    """
    (rows, V), splits = logits.shape, -(-logits.shape[1] // BLOCK_V)
    best = torch.empty(2, splits + 1, dtype=torch.float32, device=logits.device)
    residual_sample_kernel[(splits,)](
        best, decision.next_token, decision.accept_len, cut_row, logits, logits.stride(0),
        draft_probs, draft_probs.stride(0), exponentials, temperature, vocab_offset, rows - 1, V,
        splits, num_warps=16, SPLITS=1 << (splits - 1).bit_length(), BLOCK_V=BLOCK_V)
    return best[:, splits]
