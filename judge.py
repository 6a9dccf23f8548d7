"""Judge head and acceptance: which draft tokens stay, and which token the target adds, in one fused kernel.

The target has read K draft tokens in one pass and left K+1 rows of pre-norm hidden state and of logits. d_i stays if standard
speculative sampling keeps it, or if the linear judge says that the target, having read it, finds it *correct* (Bachmann et al.,
arXiv 2501.19309; sampling after Leviathan et al., arXiv 2211.17192):

    exact_i = argmax(logits[i-1]) == d_i; sampled: u_i * q_i(d_i) < p_{i-1}(d_i)
    judge_i = sigmoid(w . hidden[i] + b) > threshold, and d_i is no stop token
    a       = number of tokens before the first i with neither
    next    = argmax(logits[a]); sampled: argmax(max(0, p_a - q_{a+1}) / e), e ~ Exp(1), with q = 0 if a = K

p is softmax over (top-k kept logits / temperature); ties with the k-th largest logit are kept. threshold = 1 is exactly the
standard rule: a sigmoid may round to 1 but is never above. A residual of zeros (p = q up to rounding) falls back to p_a.
`impl="torch"` is the reference: it defines correctness, runs in float64 too and is what the CPU path compiles. `impl="triton"`
is the same in two launches, three when sampling, without the host:

    row_stats        per row and vocabulary shard: max, argmax, judge score; sampled: sum exp, logit of d, k-th
    decide           merges the shards: a, source, score, status, and the greedy next token
    residual_sample  the sampled next token, from logits row a alone

Tensor parallelism: each rank calls `row_stats` on its shard (`vocab_offset`; the head on one rank, None on the others, so that
scores are summed once), the statistics are gathered along their last dimension, every rank runs `decide`, and `residual_sample`
gives each rank's best (score, index) to exchange. Top-k needs whole rows.

The two agree but where rounding decides: a score within 2^-22 + 2^-20 * (|b| + sum|w_j h_j|) of the threshold, u q within 2^-18
* p * (1 + (max - logit) / temperature) of p, or a draw's runner-up as close. Exact greedy decisions always agree.

Shapes: K draft length, D model dim, V vocabulary, S vocabulary shards. Row r of hidden and logits is the state after the target
has read d_r (row 0: the last committed token). Not done here: caches, batches.

    accept(hidden, logits, draft_tokens, head=head, threshold=threshold, stop_tokens=stop, impl="triton")
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # no triton for this platform: the reference still runs
    triton = None

FORMAT = "gavel-judge-1"
FEATURE = "last_hidden_pre_norm"
RETRAIN = "train one with train_head.py"
MAX_K = 64

# 4096 logits a program on 16 warps: 26 rows x 32 splits are six for each of 132 SMs, and without a loop a logit is read once
# and stays in registers (8 a thread) for max, argmax and sum. On 4 or 8 warps ptxas spilled (float32, sm_90); with 2048 the
# merge of 63 splits did.
BLOCK_V = 4096
BLOCK_D = 512  # 16384 / 32 splits: one step of the judge's dot product a program
# Lanes of the top-k scan: up to this k the candidate list is hardly longer than k; beyond, it is the whole row. 8192 spilled.
BLOCK_TOPK = 4096
# Leading bits in which values of a dtype differ once widened to float32: steps of the search for the k-th.
KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}


class Decision(NamedTuple):
    """One round's outcome, on the device, in fixed shapes."""

    accept_len: Tensor  # int64 []: a, draft tokens kept, 0..K
    next_token: Tensor  # int64 []: the target's own token after them (some valid id when status is not 0)
    source: Tensor  # int8 [K], whatever the cut: 0 rejected, 1 exact, 2 judge only
    score: Tensor  # float32 [K]: sigmoid(w . hidden[1:] + b), zeros without a head
    status: Tensor  # int32 []: 1 if a row of logits 0..a, on which a and next rest, has NaN, +inf or only -inf


@contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[Path]:
    """A place beside `path` to write a file to, renamed afterwards: a killed run leaves the old file or the new one."""
    aside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class JudgeHead(nn.Module):
    """Linear D -> 1 on the target's last hidden state, before its final norm.

    weight float32 [1, D], bias float32 [1]; metadata: strings, of which `threshold` in [0, 1] is required; `target` and `data`
    say what the head was trained for and on. ValueError says what is wrong with any of them.
    """

    def __init__(self, weight: Tensor, bias: Tensor, metadata: dict[str, str]):
        super().__init__()
        self.hidden_size = D = weight.shape[-1] if weight.dim() else 0
        self.metadata = {"format": FORMAT, "feature": FEATURE, "hidden_size": str(D), "threshold": ""} | metadata
        got = {"weight": _describe(weight), "bias": _describe(bias)} | {f"metadata {k}": v for k, v in self.metadata.items()}
        for what, expected in (("weight", f"torch.float32 [1, {max(D, 1)}], finite"), ("bias", "torch.float32 [1], finite"),
                               ("metadata format", FORMAT), ("metadata feature", FEATURE), ("metadata hidden_size", str(D))):
            if got[what] != expected:
                raise _error(f"judge head's {what}", repr(got[what]), repr(expected), RETRAIN)
        try:
            self.threshold = float(self.metadata["threshold"])
        except ValueError:
            self.threshold = math.nan
        if not 0 <= self.threshold <= 1:
            raise _error("judge head's metadata threshold", repr(self.metadata["threshold"]), "a number from 0 to 1", RETRAIN)
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", bias.detach().contiguous())

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: str | torch.device = "cpu") -> JudgeHead:
        """Read a safetensors file; FileNotFoundError or ValueError name the path, the fault and the cure."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"judge head {path}: got no file, expected one; {RETRAIN} or pass its path")
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, sorted(file.keys())
                if names != ["bias", "weight"]:
                    raise _error("judge head", f"tensors {names}", "bias and weight", RETRAIN)
                tensors = {name: file.get_tensor(name) for name in names}
            required = {"format": "", "feature": "", "hidden_size": ""}  # the constructor would fill them in
            return cls(**tensors, metadata=required | metadata).to(device)
        except SafetensorError as error:
            raise _error(f"judge head {path}", f"a broken or foreign file ({error})", "one whole safetensors file",
                         f"copy it again or {RETRAIN} (pickles are never opened)") from None
        except ValueError as error:
            raise ValueError(f"{error} (in {path})") from None

    def save(self, path: str | os.PathLike) -> None:
        with written_aside(path) as aside:
            aside.write_bytes(safetensors_bytes({"weight": self.weight, "bias": self.bias}, metadata=self.metadata))

    def check(self, hidden_size: int) -> None:
        """ValueError unless the head was trained on hidden states of this size."""
        if hidden_size != self.hidden_size:
            target = self.metadata.get("target", "unknown")
            raise _error("judge head", f"hidden size {self.hidden_size} (trained for target {target})",
                         f"this target's {hidden_size}", f"pass this target's head or {RETRAIN}")

    def score(self, hidden: Tensor) -> Tensor:
        """sigmoid(w . h + b): hidden [..., D] -> [...], float32 (float64 if hidden is). Never above 1."""
        hidden = hidden.to(_compute_dtype(hidden))
        return torch.sigmoid((hidden * self.weight[0]).sum(-1) + self.bias[0])


def probs(logits: Tensor, temperature: Tensor | float, top_k: int | None = None) -> Tensor:
    """softmax(kept logits / temperature): [..., V] -> float32 [..., V] (float64 if logits are).

    Top-k keeps every logit >= the k-th largest of its row, so ties may keep more than k; k >= V keeps all.
    """
    logits = logits.to(_compute_dtype(logits))
    if top_k is not None and top_k < logits.shape[-1]:
        kth = torch.topk(logits, top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)


def sample(probs: Tensor, exponentials: Tensor) -> Tensor:
    """One draw from unnormalised weights: argmax(probs / e), e ~ Exp(1); lowest index on ties. [..., V] -> [...]"""
    return torch.argmax(probs / exponentials, -1)


def greedy(logits: Tensor, shard=None, first_token: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """argmax (lowest index on ties) and maximum of each row, [..., V] -> [...], [...]; a NaN is the maximum.

    Over ranks (tp.Shard) logits are this rank's columns, from `first_token` of the vocabulary on: two floats a row travel.
    """
    best, top = logits.argmax(-1), logits.amax(-1)
    if shard is None or shard.world == 1:
        return best, top
    candidates = torch.stack((top.float(), (best + first_token).float()), -1)  # [..., 2]; an index is exact, V < 2^24
    tops, tokens = shard.gather(candidates[..., None]).unbind(-2)  # [..., world]
    top = tops.amax(-1)
    return torch.where(tops == top[..., None], tokens, float(1 << 24)).amin(-1).to(torch.int64), top


def accept(hidden: Tensor, logits: Tensor, draft_tokens: Tensor, *, head: JudgeHead | None, threshold: Tensor,
           stop_tokens: Tensor, temperature: Tensor | None = None, top_k: int | None = None, draft_probs: Tensor | None = None,
           uniforms: Tensor | None = None, exponentials: Tensor | None = None, shard=None, first_token: Tensor | int = 0,
           impl: str) -> Decision:
    """Decide one round of speculation; the rule is in the module's docstring.

    hidden [K+1, D], logits [K+1, V]: what the target left after [last, d_1..d_K]. draft_tokens int64 [K]. threshold float32 [].
    stop_tokens int64 [n], n >= 0: never rescued by the judge. temperature float32 [], > 0, or None for greedy; sampling needs
    draft_probs float32 [K, V] (what the draft sampled from), uniforms float32 [K] in [0, 1) and exponentials float32 [V],
    Exp(1). Over ranks (shard: tp.Shard), greedy logits are this rank's columns from `first_token` on; sampling takes whole
    rows. impl "torch" or "triton". ValueError for a misfit.
    """
    (rows, V), K = logits.shape, draft_tokens.shape[0]
    if not rows == hidden.shape[0] == K + 1 > 1:
        raise _error("rows of hidden and logits", (hidden.shape[0], rows), f"K + 1 = {K + 1} > 1", "pass both whole")
    if head is not None:
        head.check(hidden.shape[1])
    sampling = (draft_probs, uniforms, exponentials)
    if temperature is not None:
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in sampling]
        if shapes != [(K, V), (K,), (V,)]:
            raise _error("shapes of draft_probs, uniforms, exponentials", shapes, [(K, V), (K,), (V,)],
                         "pass all three to sample, or temperature=None for greedy")
        if top_k is not None and top_k < 1:
            raise _error("top_k", top_k, "1 or more", "pass None to keep the whole vocabulary")
    if impl == "torch":
        return _accept_torch(hidden, logits, draft_tokens, head, threshold, stop_tokens, temperature, top_k, *sampling,
                             shard, first_token)
    if impl != "triton":
        raise _error("impl", repr(impl), "'torch' or 'triton'", "pass one of them")
    _check_triton(hidden, logits, draft_probs, draft_tokens, uniforms, exponentials)
    spread = shard is not None and shard.world > 1 and temperature is None
    stats = row_stats(hidden, logits, draft_tokens, head=None if spread and shard.rank else head, temperature=temperature,
                      top_k=top_k, vocab_offset=V * shard.rank if spread else 0)
    if spread:
        stats = shard.gather(stats)
    decision, cut_row = decide(stats, draft_tokens, head=head, threshold=threshold, stop_tokens=stop_tokens,
                               temperature=temperature, draft_probs=draft_probs, uniforms=uniforms)
    if temperature is not None:
        residual_sample(decision, cut_row, logits, draft_probs, exponentials, temperature)
    return decision


def _accept_torch(hidden, logits, draft_tokens, head, threshold, stop_tokens, temperature, top_k,
                  draft_probs, uniforms, exponentials, shard, first_token) -> Decision:
    """The rule in plain torch: no host sync, no shape that depends on data, so torch.compile takes it whole."""
    K = draft_tokens.shape[0]
    logits = logits.to(_compute_dtype(logits))
    best, top = greedy(logits, shard if temperature is None else None, first_token)  # [K+1]
    bad = ~top.isfinite()
    if temperature is None:
        exact = best[:K] == draft_tokens
    else:
        p = probs(logits, temperature, top_k)  # [K+1, V]
        column = draft_tokens[:, None]
        exact = uniforms * draft_probs.gather(1, column)[:, 0] < p[:K].gather(1, column)[:, 0]
    exact = exact & ~bad[:K]

    if head is None:
        score, judge = torch.zeros(K, device=logits.device), torch.zeros_like(exact)
    else:
        score = head.score(hidden[1:])  # row i: after the target has read d_i
        judge = (score > threshold) & ~(draft_tokens[:, None] == stop_tokens[None, :]).any(-1)
    a = (exact | judge).to(torch.int64).cumprod(0).sum()

    if temperature is None:
        next_token = best.gather(0, a[None])[0]
    else:
        p_a = p.index_select(0, a[None])[0]
        q_next = draft_probs.index_select(0, a.clamp(max=K - 1)[None])[0]  # q_{a+1}
        residual = torch.where(a < K, p_a - q_next, p_a).clamp(min=0)
        next_token = sample(torch.where((residual > 0).any(), residual, p_a), exponentials)
    status = (bad & (torch.arange(K + 1, device=bad.device) <= a)).any().to(torch.int32)
    source = torch.where(exact, 1, torch.where(judge, 2, 0)).to(torch.int8)
    return Decision(a, next_token, source, score, status)


def _check_triton(hidden: Tensor, logits: Tensor, draft_probs: Tensor | None, draft_tokens: Tensor, uniforms: Tensor | None,
                  exponentials: Tensor | None) -> None:
    """ValueError for what the kernel cannot take; it looks at no values."""
    if triton is None or not (logits.is_cuda or INTERPRETED):
        got = "no triton package" if triton is None else f"tensors on {logits.device}"
        raise _error("impl='triton'", got, "triton and a GPU", "use impl='torch' (to test: TRITON_INTERPRET=1 before the import)")
    if (K := len(draft_tokens)) > MAX_K or logits.shape[1] >= 1 << 24:
        raise _error("impl='triton'", (K, logits.shape[1]), f"K <= {MAX_K} and V < 2^24", "use impl='torch'")
    for name, tensor in (("hidden", hidden), ("logits", logits), ("draft_probs", draft_probs)):
        if tensor is not None and (tensor.stride(-1) != 1 or tensor.dtype not in KEY_BITS):
            raise _error(name, f"{tensor.dtype} with strides {tensor.stride()}", "bf16, fp16 or fp32 in contiguous rows",
                         f"pass {name}.contiguous(), or use impl='torch' for other dtypes")
    for name, tensor, dtype in (("draft_tokens", draft_tokens, torch.int64), ("uniforms", uniforms, torch.float32),
                                ("exponentials", exponentials, torch.float32)):
        if tensor is not None and (tensor.dtype != dtype or not tensor.is_contiguous()):
            raise _error(name, f"{tensor.dtype} with strides {tensor.stride()}", f"{dtype}, contiguous", "convert it")


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}, {'finite' if tensor.isfinite().all() else 'with NaN or inf'}"


def _error(what: str, got, expected, mend: str) -> ValueError:
    return ValueError(f"{what}: got {got}, expected {expected}; {mend}")


def jit(kernel):
    """triton.jit where there is a triton."""
    return triton.jit(kernel) if triton is not None else kernel


@jit
def judge_part(hidden, weight, row, stride_h, split, splits, D, BLOCK_D: tl.constexpr):
    """This split's part of w . hidden[row]: blocks split, split + splits, ... of D. Row 0, which nobody judges, is not read."""
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(split * BLOCK_D, D, splits * BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + row.to(tl.int64) * stride_h + col, (col < D) & (row > 0), other=0).to(tl.float32)
        acc += h * tl.load(weight + col, (col < D) & (row > 0), other=0)
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
def row_stats_kernel(stats, hidden, stride_h, weight, logits, stride_l, draft_tokens, temperature, vocab_offset,
                     K, D, V, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """max, argmax, w.h part; sampled also sum exp((x - max) / T) and the logit of d_{row+1} (k-th logit: -inf, all kept).

    Grid (K+1, splits of V). A program holds BLOCK_V logits of one row in registers and reads each once; lanes past V are -inf.
    NaN counts as +inf, which `decide` takes as "bad". Reads: logits and hidden rows 1..K once, w once a row (from L2), K logits
    again when sampling; writes 6 floats a program.
    """
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    logits += row.to(tl.int64) * stride_l
    col = split * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits + col, mask=col < V, other=-float("inf")).to(tl.float32)
    x = tl.where(x <= float("inf"), x, float("inf"))  # NaN: as bad as +inf
    top = tl.max(x)
    # The lowest lane that holds the max is a real one even in a block of -inf, since lanes past V come last.
    index = tl.min(tl.where(x == top, col, 2147483647)) + vocab_offset
    dot, total, token_logit = 0.0, 0.0, -float("inf")
    if weight is not None:
        dot = judge_part(hidden, weight, row, stride_h, split, splits, D, BLOCK_D)
    if temperature is not None:
        total = tl.sum(tl.where(x > -float("inf"), tl.exp((x - top) / tl.load(temperature)), 0.0))
        token = tl.load(draft_tokens + row, mask=row < K, other=-1) - vocab_offset
        mine = (token >= 0) & (token < V) & (split == 0)
        token_logit = tl.load(logits + token, mask=mine, other=-float("inf")).to(tl.float32)
    store_stats(stats, row, split, splits, K + 1, top, index, dot, total, token_logit, -float("inf"))


@jit
def kth_largest(first, rest, n, k, KEY_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The k-th largest of `first` (a block) and rest[BLOCK:n]; -inf if it is that or there are fewer than k.

    A float's bits, with the lower 31 flipped when it is negative, order like the floats. The largest key that k values reach is
    built from the top bit down; only KEY_BITS leading bits can differ.
    """
    bits = first.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low = tl.full([], -2147483648, tl.int64)
    step = tl.full([], 2147483648, tl.int64)
    for _ in range(KEY_BITS):
        middle = (low + step).to(tl.int32)
        count = tl.sum((keys >= middle).to(tl.int32))
        for start in range(BLOCK, n, BLOCK):
            col = start + tl.arange(0, BLOCK)
            more = tl.load(rest + col, col < n, other=-float("inf")).to(tl.float32).to(tl.int32, bitcast=True)
            count += tl.sum(((more ^ ((more >> 31) & 0x7FFFFFFF)) >= middle).to(tl.int32))
        low = tl.where(count >= k, low + step, low)
        step = step >> 1
    key = low.to(tl.int32)
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(value <= float("inf"), value, -float("inf"))  # a key below -inf's is a NaN's


@jit
def topk_stats_kernel(stats, candidates, hidden, stride_h, weight, logits, stride_l, draft_tokens, temperature, top_k,
                      K, D, V, KEY_BITS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """row_stats of the kept logits: max, w.h, sum exp over the kept, logit of d (-inf if not kept) and k-th logit.

    Grid (K+1,): one program a row, since the k-th value needs all of it. Scan 1 keeps each lane's max over windows of BLOCK_V;
    k values reach the k-th largest lane max, so it bounds the k-th value from below. Scan 2 packs the few logits that reach the
    bound into `candidates` (the whole row if k > BLOCK_V), where the k-th is searched bit by bit. Lanes past V are -inf. Reads:
    logits twice, the second time from L2, hidden once, w once a row, about k candidates twice; writes the candidates and 6
    floats a row.
    """
    row, lane = tl.program_id(0), tl.arange(0, BLOCK_V)
    logits += row.to(tl.int64) * stride_l
    candidates += row.to(tl.int64) * V
    lane_max = tl.full([BLOCK_V], -float("inf"), tl.float32)
    for start in tl.range(0, V, BLOCK_V, num_stages=4):  # loads run ahead
        x = tl.load(logits + start + lane, mask=start + lane < V, other=-float("inf")).to(tl.float32)
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
    first = tl.load(candidates + lane, mask=lane < n, other=-float("inf")).to(tl.float32)
    kth = kth_largest(first, candidates, n, top_k, KEY_BITS, BLOCK_V)

    top, T = tl.max(lane_max), tl.load(temperature)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, n, BLOCK_V):
        x = tl.load(candidates + start + lane, mask=start + lane < n, other=-float("inf")).to(tl.float32)
        total += tl.where((x >= kth) & (x > -float("inf")), tl.exp((x - top) / T), 0.0)
    token = tl.load(draft_tokens + row, mask=row < K, other=-1)
    token_logit = tl.load(logits + token, mask=(token >= 0) & (token < V), other=-float("inf")).to(tl.float32)
    token_logit = tl.where(token_logit >= kth, token_logit, -float("inf"))
    dot = 0.0
    if weight is not None:
        dot = judge_part(hidden, weight, row, stride_h, 0, 1, D, BLOCK_D)
    store_stats(stats, row, 0, 1, K + 1, top, row, dot, tl.sum(total), token_logit, kth)  # index: unused when sampling


@jit
def decide_kernel(stats, draft_tokens, bias, threshold, stop_tokens, n_stop, temperature, draft_probs, stride_q, uniforms,
                  accept_len, next_token, source, score, status, cut_row, K, splits,
                  ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Merge the shards and apply the rule. Grid (1,): one program holds [ROWS, SPLITS] of one statistic at a time.

    Lane i is draft token d_{i+1}: exact on logits row i, judge on hidden row i+1. Rows past K and splits past the last are
    masked, and so is row K as a draft token. Sampled: cut_row = max, sum of exp, k-th logit of row a, and 0 arrivals. Reads the
    statistics, d, u and q(d) once; writes the decision.
    """
    i, s = tl.arange(0, ROWS), tl.arange(0, SPLITS)
    at, plane = stats + i[:, None] * splits + s[None, :], (K + 1) * splits
    live = (i[:, None] <= K) & (s[None, :] < splits)
    shard_max = tl.load(at, live, other=-float("inf"))
    top = tl.max(shard_max, 1)
    bad = tl.abs(top) == float("inf")
    token = tl.load(draft_tokens + i, i < K, other=-1)
    if temperature is not None:
        T = tl.load(temperature)
        scale = tl.where(shard_max > -float("inf"), tl.exp((shard_max - top[:, None]) / T), 0.0)
        total = tl.sum(tl.load(at + 3 * plane, live, other=0.0) * scale, 1)
        token_logit = tl.max(tl.load(at + 4 * plane, live, other=-float("inf")), 1)
        q = tl.load(draft_probs + i.to(tl.int64) * stride_q + token, i < K, other=0.0)
        exact = tl.load(uniforms + i, i < K, other=1.0) * q < tl.exp((token_logit - top) / T) / total
    else:
        index = tl.load(at + plane, live, other=float("inf"))
        best = tl.min(tl.where(shard_max == top[:, None], index, float("inf")), 1).to(tl.int64)
        exact = best == token
    exact = exact & (bad == 0) & (i < K)

    passed, result = exact, tl.zeros([ROWS], tl.float32)
    if bias is not None:
        dot = tl.sum(tl.load(at + 2 * plane + splits, (i[:, None] < K) & (s[None, :] < splits), other=0.0), 1)
        # Rounded to nearest, so that 1 / (1 + exp) stays at or below 1 and threshold 1 is never passed.
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
        tl.store(cut_row + i * 0 + 2, tl.max(tl.load(at + 5 * plane, live, other=-float("inf")), 1), i == a)
        tl.store(cut_row + 3, 0.0)
    else:
        tl.store(next_token + i * 0, best, i == a)


@jit
def residual_sample_kernel(best, next_token, accept_len, cut_row, logits, stride_l, draft_probs, stride_q, exponentials,
                           temperature, vocab_offset, K, V, splits, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr):
    """next_token = argmax(max(0, p_a - q_{a+1}) / e), and best[:, splits] = its (score, index).

    Grid (splits of V,). A program scores BLOCK_V lanes: w / e where the residual w is positive, else -e / p, which is below
    every w / e and orders like p / e, so that an all-zero residual falls back to p by itself. Lanes past V score -inf. The
    program that arrives last (cut_row[3] counts from 0; nobody waits) picks the best split. Reads row a of logits, q and e
    once; writes 2 floats a program.
    """
    split, a = tl.program_id(0), tl.load(accept_len)
    col = split * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits + a * stride_l + col, col < V, other=-float("inf")).to(tl.float32)
    p = tl.exp((x - tl.load(cut_row)) / tl.load(temperature)) / tl.load(cut_row + 1)
    p = tl.where((x >= tl.load(cut_row + 2)) & (x > -float("inf")), p, 0.0)
    q = tl.load(draft_probs + a * stride_q + col, (col < V) & (a < K), other=0.0)
    e = tl.load(exponentials + col, col < V, other=1.0)
    score = tl.where(p > q, (p - q) / e, -e / p)
    score = tl.where(score <= float("inf"), score, -float("inf"))  # NaN only in a row that status reports
    top = tl.max(score)
    index = tl.min(tl.where(score == top, col, 2147483647)) + vocab_offset
    tl.store(best + split, top)
    tl.store(best + splits + 1 + split, index.to(tl.float32))
    tl.debug_barrier()  # both are stored before this program counts as arrived
    if tl.atomic_add(cut_row + 3, 1.0) == splits - 1:
        s = tl.arange(0, SPLITS)
        score_s = tl.load(best + s, s < splits, other=-float("inf"), cache_modifier=".cg")
        index_s = tl.load(best + splits + 1 + s, s < splits, other=float("inf"), cache_modifier=".cg")
        winner = tl.min(tl.where(score_s == tl.max(score_s), index_s, float("inf")))
        tl.store(best + splits, tl.max(score_s))
        tl.store(best + 2 * splits + 1, winner)
        tl.store(next_token, winner.to(tl.int64))


INTERPRETED = triton is not None and not isinstance(row_stats_kernel, triton.JITFunction)


def row_stats(hidden: Tensor, logits: Tensor, draft_tokens: Tensor, *, head: JudgeHead | None,
              temperature: Tensor | None = None, top_k: int | None = None, vocab_offset: int = 0) -> Tensor:
    """First launch: statistics float32 [6, K+1, S] of logits [K+1, V] that start at `vocab_offset` of the vocabulary.

    Planes: max, argmax, judge's w.h, sum of exp, logit of d, k-th logit. Gather ranks along S. top_k needs whole rows.
    """
    (rows, V), D = logits.shape, hidden.shape[1]
    whole_rows = temperature is not None and top_k is not None and top_k < V
    splits = 1 if whole_rows else -(-V // BLOCK_V)
    stats = torch.empty(6, rows, splits, dtype=torch.float32, device=logits.device)
    weight = head.weight if head is not None else None
    inputs = (hidden, hidden.stride(0), weight, logits, logits.stride(0), draft_tokens, temperature)
    if whole_rows:
        topk_stats_kernel[(rows,)](stats, torch.empty_like(logits), *inputs, top_k, rows - 1, D, V, num_warps=8,
                                   KEY_BITS=KEY_BITS[logits.dtype], BLOCK_V=BLOCK_TOPK, BLOCK_D=BLOCK_D)
    else:
        row_stats_kernel[(rows, splits)](stats, *inputs, vocab_offset, rows - 1, D, V, num_warps=16, BLOCK_V=BLOCK_V,
                                         BLOCK_D=BLOCK_D)
    return stats


def decide(stats: Tensor, draft_tokens: Tensor, *, head: JudgeHead | None, threshold: Tensor, stop_tokens: Tensor,
           temperature: Tensor | None = None, draft_probs: Tensor | None = None,
           uniforms: Tensor | None = None) -> tuple[Decision, Tensor]:
    """Second launch: the decision from (gathered) statistics; sampled, its next_token is not yet written.

    Also returns float32 [4], for `residual_sample`: max, sum of exp and k-th logit of row a, and an arrival counter.
    """
    K, splits = draft_tokens.shape[0], stats.shape[2]
    fields = (((), torch.int64), ((), torch.int64), (K, torch.int8), (K, torch.float32), ((), torch.int32))
    decision = Decision(*(torch.empty(shape, dtype=dtype, device=stats.device) for shape, dtype in fields))
    cut_row = torch.empty(4, dtype=torch.float32, device=stats.device)
    decide_kernel[(1,)](stats, draft_tokens, head.bias if head is not None else None, threshold, stop_tokens,
                        stop_tokens.shape[0], temperature, draft_probs, 0 if draft_probs is None else draft_probs.stride(0),
                        uniforms, *decision, cut_row, K, splits, num_warps=8,
                        ROWS=1 << K.bit_length(), SPLITS=1 << (splits - 1).bit_length())
    return decision, cut_row


def residual_sample(decision: Decision, cut_row: Tensor, logits: Tensor, draft_probs: Tensor, exponentials: Tensor,
                    temperature: Tensor, *, vocab_offset: int = 0) -> Tensor:
    """Third launch, sampled only: writes decision.next_token and returns this shard's best (score, index), float32 [2].

    Under tensor parallelism logits, draft_probs and exponentials are the rank's columns; the rank with the highest score
    (lowest index on ties) has the token.
    """
    (rows, V), splits = logits.shape, -(-logits.shape[1] // BLOCK_V)
    best = torch.empty(2, splits + 1, dtype=torch.float32, device=logits.device)
    residual_sample_kernel[(splits,)](
        best, decision.next_token, decision.accept_len, cut_row, logits, logits.stride(0), draft_probs, draft_probs.stride(0),
        exponentials, temperature, vocab_offset, rows - 1, V, splits, num_warps=16,
        SPLITS=1 << (splits - 1).bit_length(), BLOCK_V=BLOCK_V)
    return best[:, splits]
