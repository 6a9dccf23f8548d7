"""Draft, verify, judge: generation at batch 1, from a checkpoint directory to text on the terminal.

A small draft model writes K tokens, the target reads them all in one pass, and a rule decides how many stay: none (the
target alone), exact (speculative sampling: the target's own distribution, token for token), or judge (exact, or correct in
the eyes of a linear head on the target's hidden states; arXiv 2501.19309). One pass over the target's weights then yields
several tokens, which is what counts at batch 1, where a pass costs the time to read the weights. The judge keeps more
tokens than the exact rule and gives up losslessness for it: text may differ from the target's own.

A round runs on fixed shapes and device-side state (the last two tokens, their position); nothing is rolled back. Rows of
the caches past the committed position are dead until they are overwritten. On CUDA a round is one graph replay, and the next
one is launched before the host reads the last one's outcome: stop tokens and lengths are handled one round behind, what lies
beyond the end is cut, and how many rounds are launched depends on committed tokens alone. On a CPU the steps are compiled
whole, and attention reads the part of the cache that is in use, a dynamic size in one compilation.

Shapes: K draft length, S new tokens, D model dim, V vocabulary; p the target's distribution, q the draft's; n the position
of the last committed token.

    python generate.py --judge                                    # the bundled pair: three rules beside each other
    python generate.py --checkpoint_path Llama-3.1-8B-Instruct --prompt "Why is the sky blue?"
    python generate.py --checkpoint_path Llama-3.1-70B-Instruct --draft_checkpoint_path Llama-3.1-8B-Instruct --judge

On a terminal a legend explains the colours. It does not batch requests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import sysconfig
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import tp
from judge import MAX_K, JudgeHead, accept, greedy, probs, sample, written_aside
from model import DTYPES, WHOLE, ModelConfig, Transformer, Whole, compiled
from tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parent / "checkpoints" / "demo"
DEMO_PROMPT = ("Mia has nine shells. First, Mia finds six shells. Second, Mia loses seven shells. Third, Mia doubles the shells. "
               "Fourth, Mia wins three shells. How many shells does Mia have?")
DEFAULT_PROMPT = "Explain in a few sentences why the sky is blue."
SPECULATE_K = 16
PREFILL_CHUNK = 512  # tokens a prefill pass reads at most: bounds its activations
PREFILL_COMPILED = 16  # shorter chunks run uncompiled: layers choose other routes for few rows, which would be compiled too
ROW_STEP = 64  # attention on a CPU reads the cache in use, rounded up to this
# Draft steps are compiled together up to this many layers a call: a step of a tiny draft costs less than calling it, and
# of a large one the compiler would take minutes over the copies.
DRAFT_CHUNK_LAYERS = 8
AUTO_K = (3, 6, 12, 18)  # what --speculate_k auto chooses from: each is compiled
TIMED_AT = 128  # position at which rounds are timed
DECAY = 0.98  # of what a round of --speculate_k auto remembers, per round
RULES = ("none", "exact", "judge")
SOURCES = ("target", "exact", "judge")  # by Decision.source; 0 never stays, so its place names who wrote the rest


class Block(NamedTuple):
    """What one round added: token ids, and for each who let it stand ('exact', 'judge' or 'target')."""

    tokens: list[int]
    sources: list[str]


def next_token(model: Transformer, tokens: Tensor, input_pos: Tensor, temperature: Tensor | None = None,
               top_k: int | None = None, exponentials: Tensor | None = None,
               rows: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """One decoding step: tokens [1, S] at input_pos [S] -> (next token [] int64, its distribution, status [] int32).

    Greedy without a temperature (distribution None); else a draw of softmax(logits / temperature) over the top_k, made
    with exponentials [V], and that distribution in float32 [V]. Status 1 says that the logits were not finite.
    """
    hidden = model(tokens, input_pos, rows)[:, -1]  # [1, D]
    logits = model.logits(hidden)[0].float()  # [V], of this rank
    if temperature is None:
        token, top = greedy(logits, model.shard, model.first_token)
        return token, None, (~top.isfinite()).to(torch.int32)
    logits = model.shard.gather(logits)
    q = probs(logits, temperature, top_k)
    return sample(q, exponentials), q, (~logits.amax().isfinite()).to(torch.int32)


def draft_steps(model: Transformer, tokens: Tensor, input_pos: Tensor, steps: int, temperature: Tensor | None = None,
                top_k: int | None = None, exponentials: Tensor | None = None,
                rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Consecutive decoding steps, each reading the token before: -> tokens [steps], distributions [steps, V] or None."""
    drafted, distributions = [], []
    for i in range(steps):
        token, q, _ = next_token(model, tokens, input_pos, temperature, top_k,
                                 None if exponentials is None else exponentials[i], rows)
        drafted.append(token)
        distributions.append(q)
        tokens, input_pos = token[None, None], input_pos[-1:] + 1
    return torch.stack(drafted), None if temperature is None else torch.stack(distributions)


def verify(model: Transformer, tokens: Tensor, input_pos: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The target reads [last, d_1..d_K]: tokens [1, K+1] -> hidden [K+1, D] before the final norm, logits [K+1, V]."""
    hidden = model(tokens, input_pos, rows)
    return hidden[0], model.logits(hidden)[0]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; draws come from one generator on the device, seeded per answer."""

    temperature: Tensor | None
    top_k: int | None
    generator: torch.Generator

    def draw(self, kind: str, *shape: int) -> Tensor | None:
        """float32 of `shape`, 'exponential' (Exp(1)) or 'uniform' (on [0, 1)), or None when greedy."""
        if self.temperature is None:
            return None
        return getattr(torch.empty(shape, device=self.generator.device), f"{kind}_")(generator=self.generator)


class PhaseClock:
    """Seconds spent in named phases. On CUDA it records events, so that asking for the time is the only wait."""

    def __init__(self, device: torch.device, *, on: bool = True):
        self.cuda, self.on = device.type == "cuda", on
        self.marks: list[tuple[str | None, object]] = []

    def mark(self, ended: str | None = None) -> None:
        """A phase named `ended` ends here, and the next begins (None: idle time ends)."""
        if not self.on:
            return
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((ended, now))

    def seconds(self) -> dict[str, float]:
        """Total of each phase; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for (_, begin), (phase, end) in zip(self.marks, self.marks[1:], strict=False):
            if phase is not None:
                spent = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
                totals[phase] = totals.get(phase, 0.0) + spent
        return totals


class GraphRound:
    """One round as one CUDA graph: state and outcome live in static tensors that each replay reads and overwrites.

    Seconds of a round and of its drafting are measured on replays, as nothing inside a graph can be timed one by one. What the
    caches held is lost: positions from TIMED_AT on are written, as good a length as any to time.
    """

    def __init__(self, engine: Engine, K: int, sampling: Sampling):
        n = min(TIMED_AT, engine.max_seq_length)
        state = torch.zeros(2, dtype=torch.int64, device=engine.device), torch.tensor(n, device=engine.device)
        self.state, clock = state, PhaseClock(engine.device, on=False)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, and allocates what is kept between calls
                engine.run_round(K, state, sampling, clock)
        torch.cuda.current_stream().wait_stream(side)
        self.graph, drafting = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        for graph in (self.graph, drafting):
            if sampling.temperature is not None:
                graph.register_generator_state(sampling.generator)
        with torch.cuda.graph(self.graph):
            new, self.outcome = engine.run_round(K, state, sampling, clock)
            for old, value in zip(state, new):
                old.copy_(value)
        if K:
            with torch.cuda.graph(drafting, pool=self.graph.pool()):
                engine.draft_round(K, state, sampling)
        self.seconds, self.draft_seconds = self._time(self.graph, n), self._time(drafting, n) if K else 0.0

    def _time(self, graph: torch.cuda.CUDAGraph, n: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        seconds = []
        for _ in range(4):
            self.state[1].fill_(n)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000)
        return min(seconds)

    def set(self, state: tuple[Tensor, Tensor]) -> None:
        for static, value in zip(self.state, state):
            static.copy_(value)

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.outcome


class ChooseK:
    """Draft length for the next round: the K of most tokens a second, from measured times and the acceptance seen so far.

    E tokens(K) = 1 + sum over i <= K of P(d_1..d_i kept); positions count as independent, those never drafted take the mean
    rate. Depends on committed tokens and on `seconds` alone, which ranks share.
    """

    def __init__(self, seconds: dict[int, float]):
        self.seconds = seconds  # of a round, by K
        self.kept, self.tried = [0.0] * max(seconds), [0.0] * max(seconds)

    def saw(self, K: int, accepted: int) -> None:
        """A round that kept `accepted` of K draft tokens; older rounds count less and less."""
        for i in range(len(self.kept)):
            self.kept[i] = DECAY * self.kept[i] + (i < accepted)
            self.tried[i] = DECAY * self.tried[i] + (i < min(accepted + 1, K))

    def __call__(self) -> int:
        mean = (sum(self.kept) + 8) / (sum(self.tried) + 10)  # begins at 0.8
        tokens, alive, best = 1.0, 1.0, (0.0, 0)
        for i in range(max(self.seconds)):
            alive *= (self.kept[i] + 4 * mean) / (self.tried[i] + 4)
            tokens += alive
            if i + 1 in self.seconds:
                best = max(best, (tokens / self.seconds[i + 1], i + 1))
        return best[1]


class Engine:
    """A target, optionally a draft and a judge, and the rounds between them. Batch 1.

    engine = Engine(target, draft, JudgeHead.load(path), speculate_k=16)
    for block in engine.generate(prompt_ids, max_new_tokens=200):
        print(block.tokens, block.sources)
    engine.stats    # the object that --json writes

    speculate_k "auto" chooses among AUTO_K in every round (see ChooseK). threshold defaults to the head's own. max_seq_length
    bounds prompt and answer together. stop_tokens defaults to the target config's. tokenizer is only used to put text into
    `stats`. impl is the acceptance rule's: 'torch' or 'triton', by default triton on CUDA and torch elsewhere. compile=True
    compiles the steps when they first run (see warmup; call setup_compiler before), and on CUDA records rounds as graphs,
    unless graphs=False. A CUDA device must be the current one.
    ValueError where draft, target and judge do not fit together.
    """

    def __init__(self, target: Transformer, draft: Transformer | None = None, judge: JudgeHead | None = None, *,
                 speculate_k: int | str = SPECULATE_K, threshold: float | None = None, max_seq_length: int = 2048,
                 stop_tokens: tuple[int, ...] | None = None, tokenizer: Tokenizer | None = None, compile: bool = False,
                 impl: str | None = None, graphs: bool = True):
        check_fit(target.config, draft and draft.config, judge, speculate_k=speculate_k, threshold=threshold)
        self.target, self.draft, self.tokenizer = target, draft, tokenizer
        self.device, self.compiled, self.shard = target.device, compile, target.shard
        self.auto = speculate_k == "auto"
        self.speculate_k = max(AUTO_K) if self.auto else speculate_k
        self.judge = judge.to(self.device) if judge else None
        self.rule = RULES[0 if draft is None else 1 if judge is None else 2]
        self.threshold = (judge.threshold if threshold is None else threshold) if judge else None
        self.max_seq_length = min(max_seq_length, target.config.max_position_embeddings)
        rows = self.max_seq_length + 2 * (self.speculate_k + 1) + 1  # a last block, and one in flight, must not write outside
        for model in filter(None, (target, draft)):
            model.pack()
            if model.max_seq_length < rows:
                model.setup_caches(max_batch_size=1, max_seq_length=rows)
        self.stop_tokens = target.config.eos_token_ids if stop_tokens is None else stop_tokens
        self._stop_tokens = torch.tensor(self.stop_tokens, dtype=torch.int64, device=self.device)
        self._delta = torch.tensor(1.0, device=self.device)  # refilled for each answer; 1 makes the judge silent
        self._temperature = torch.tensor(1.0, device=self.device)  # refilled too
        self._generator = torch.Generator(self.device)
        self._offsets = torch.arange(-1, self.speculate_k + 1, device=self.device)
        self.stats: dict = {}
        gpu = self.device.type == "cuda"
        self.ahead = int(gpu)  # rounds launched beyond the one that is read
        self._impl = impl or ("triton" if gpu else "torch")
        self._graphs: dict[tuple, GraphRound] | None = {} if compile and gpu and graphs else None
        self._choosers: dict[str, ChooseK] = {}
        if gpu and self.device.index not in (None, torch.cuda.current_device()):
            raise ValueError(f"got models on {self.device} while cuda:{torch.cuda.current_device()} is current, expected them on "
                             f"it: call torch.cuda.set_device({self.device.index}) first")
        if compile and gpu:  # one block, reused by every layer: a large model's whole pass would take minutes to compile
            for model in filter(None, (target, draft)):
                model.compile_parts()
        wrap = compiled if compile and not gpu else (lambda f: f)
        self._next_token, self._draft_steps, self._verify = wrap(next_token), wrap(draft_steps), wrap(verify)
        self._read_chunk = {model: wrap(next_token) for model in filter(None, (target, draft))}
        self._draft_chunk = max(1, DRAFT_CHUNK_LAYERS // draft.config.num_layers) if draft else 0
        self._accept = accept if self._impl == "triton" else wrap(accept)  # the kernel is compiled already

    def _rows(self, model: Transformer, end: int) -> Tensor | None:
        """The part of the cache that attention reads, to row `end` at least; None where its kernel knows by itself."""
        if self.device.type == "cuda":
            return None
        rows = model.rows[:min(-(-end // ROW_STEP) * ROW_STEP, model.max_seq_length - 1)]  # -1: never the whole
        if self.compiled:
            torch._dynamo.mark_dynamic(rows, 0, min=2, max=model.max_seq_length - 1)
        return rows

    def run_round(self, K: int, state: tuple[Tensor, Tensor], sampling: Sampling, clock: PhaseClock, end: int = 0):
        """A round of K draft tokens (0: one step of the target): state in, state out, nothing read back to the host.

        state: the last two tokens int64 [2], the last one's position int64 []. -> state, outcome int64: the tokens
        d_1..d_K and next [K+1], a, status, the sources of d [K]. Rows in use end at `end`.
        """
        pair, n = state
        if not K:
            token, _, status = self._next_token(
                self.target, pair[None, 1:], n[None], sampling.temperature, sampling.top_k,
                sampling.draw("exponential", self.target.config.vocab_size), self._rows(self.target, end))
            clock.mark("verify")
            return (torch.stack((pair[1], token)), n + 1), torch.stack((token, torch.zeros_like(token), status.to(torch.int64)))
        drafted, q = self.draft_round(K, state, sampling, end)
        clock.mark("draft")
        hidden, logits = self._verify(self.target, torch.cat((pair[1:], drafted))[None], n + self._offsets[1:K + 2],
                                      self._rows(self.target, end))
        if sampling.temperature is not None:
            logits = self.shard.gather(logits)
        clock.mark("verify")
        decision = self._decide(hidden, logits, drafted, draft_probs=q, sampling=sampling)
        block = torch.cat((pair[1:], drafted))  # [K+1]; row a is the last token kept
        a, token = decision.accept_len, decision.next_token
        state = torch.stack((block.gather(0, a[None])[0], token)), n + a + 1
        outcome = torch.cat((drafted, torch.stack((token, a, decision.status.to(torch.int64))), decision.source.to(torch.int64)))
        clock.mark("accept")
        return state, outcome

    def draft_round(self, K: int, state: tuple[Tensor, Tensor], sampling: Sampling, end: int = 0) -> tuple[Tensor, Tensor | None]:
        """K tokens of the draft [K], and the distributions they were drawn from [K, V] (None when greedy).

        The first step reads the last two committed tokens: when the whole previous block was accepted, the draft has
        never read its last token. A fixed shape, no special case.
        """
        pair, n = state
        tokens, input_pos, rows = pair[None], n + self._offsets[:2], self._rows(self.draft, end)
        drafted, distributions = [], []
        for start in range(0, K, self._draft_chunk):
            steps = min(self._draft_chunk, K - start)
            new, q = self._draft_steps(self.draft, tokens, input_pos, steps, sampling.temperature, sampling.top_k,
                                       sampling.draw("exponential", steps, self.draft.config.vocab_size), rows)
            drafted.append(new)
            distributions.append(q)
            tokens, input_pos = new[None, -1:], n + self._offsets[start + steps + 1:start + steps + 2]
        return torch.cat(drafted), None if sampling.temperature is None else torch.cat(distributions)

    def _decide(self, hidden: Tensor, logits: Tensor, drafted: Tensor, *, draft_probs: Tensor | None, sampling: Sampling):
        """The acceptance rule (override it to try another one); see judge.accept for shapes."""
        return self._accept(
            hidden, logits, drafted, head=self.judge, threshold=self._delta, stop_tokens=self._stop_tokens,
            temperature=sampling.temperature, top_k=sampling.top_k, draft_probs=draft_probs,
            uniforms=sampling.draw("uniform", len(drafted)), exponentials=sampling.draw("exponential", logits.shape[-1]),
            shard=self.shard, first_token=self.target.first_token, impl=self._impl)

    def _graph(self, K: int, sampling: Sampling) -> GraphRound:
        """The recorded round for these options; recorded anew where a model's caches moved."""
        models = [model for model in (self.target, self.draft) if model is not None]
        places = tuple(model.caches_made for model in models)
        key = (K, sampling.temperature is None, sampling.top_k, places)
        if key not in self._graphs:
            self._graphs = {old: graph for old, graph in self._graphs.items() if old[-1] == places}
            for model in models:
                model.cached = []
            self._graphs[key] = GraphRound(self, K, sampling)
        return self._graphs[key]

    def _send(self, outcome: Tensor) -> Callable[[], list[int]]:
        """Start bringing an outcome to the host; what is returned waits for it, the only wait of a round."""
        if self.device.type != "cuda":
            return outcome.tolist
        host, arrived = torch.empty(outcome.shape, dtype=outcome.dtype, pin_memory=True), torch.cuda.Event()
        host.copy_(outcome, non_blocking=True)
        arrived.record()

        def receive() -> list[int]:
            arrived.synchronize()
            return host.tolist()
        return receive

    def _block(self, outcome: list[int], budget: int) -> Block:
        """What a round committed, cut after a stop token and to `budget` tokens."""
        K = (len(outcome) - 3) // 2
        tokens, a, status, sources = outcome[:K + 1], outcome[K + 1], outcome[K + 2], outcome[K + 3:]
        if status:
            raise FloatingPointError("the target's logits are not finite (NaN or infinity): the weights are damaged, or "
                                     "overflow in this dtype; try --dtype bfloat16 or float32")
        tokens, names = [*tokens[:a], tokens[K]], [*(SOURCES[source] for source in sources[:a]), "target"]
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.stop_tokens), len(tokens))
        end = min(end, budget)
        return Block(tokens[:end], names[:end])

    def _prefill(self, prompt: list[int], begin: int, sampling: Sampling, *, with_draft: bool):
        """Read prompt[begin:] into the caches, which hold what is before it, and draw the first new token.

        A prompt's length is a dynamic size on a CPU, and on CUDA chunks run uncompiled: torch.compile meets no new size, and
        Triton only block sizes that it builds once.
        """
        ids = torch.tensor(prompt, device=self.device)
        input_pos = torch.arange(len(prompt), device=self.device)
        for model in (self.draft, self.target) if with_draft else (self.target,):
            options = () if model is self.draft else (
                sampling.temperature, sampling.top_k, sampling.draw("exponential", self.target.config.vocab_size))
            for start in range(begin, len(prompt), PREFILL_CHUNK):
                end = min(start + PREFILL_CHUNK, len(prompt))
                tokens, places = ids[start:end][None], input_pos[start:end]  # strides of its own length
                read, rows = next_token, self._rows(model, end)
                if self.compiled and self.device.type == "cpu" and end - start >= PREFILL_COMPILED:
                    read = self._read_chunk[model]
                    torch._dynamo.mark_dynamic(tokens, 1, min=PREFILL_COMPILED, max=PREFILL_CHUNK)
                    torch._dynamo.mark_dynamic(places, 0, min=PREFILL_COMPILED, max=PREFILL_CHUNK)
                with model.uncompiled_parts():
                    token, _, status = read(model, tokens, places, *(options or (None, None, None)), rows)
        zero = torch.zeros_like(token)
        return (torch.stack((ids[-1], token)), input_pos[-1] + 1), torch.stack((token, zero, status.to(torch.int64)))

    @torch.no_grad()
    def generate(self, prompt_ids: list[int], *, max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
                 seed: int = 0, rule: str | None = None, keep_cache: bool = False) -> Iterator[Block]:
        """Yield the answer block by block: first the token from prefill, then one block a round.

        Ends after a stop token or max_new_tokens (shortened, with a warning, where prompt and answer outgrow
        max_seq_length). `rule` overrides the engine's for this answer; keep_cache does not read anew what this prompt has in
        common with the last answer and its prompt (a chat's next turn). Afterwards `stats` describes the answer.
        ValueError: empty prompt, prompt that fills max_seq_length, options out of range. FloatingPointError: logits that
        are not finite, raised before any token of that round is yielded.
        """
        self.stats = {}
        rule = rule or self.rule
        if rule not in RULES[:RULES.index(self.rule) + 1]:
            raise ValueError(f"got rule {rule!r}, expected one of {', '.join(RULES[:RULES.index(self.rule) + 1])} with the "
                             "models this engine was given")
        check_sampling(temperature, top_k, max_new_tokens)
        max_new_tokens = check_length(len(prompt_ids), max_new_tokens, self.max_seq_length)
        threshold = self.threshold if rule == "judge" else None
        self._delta.fill_(1.0 if threshold is None else threshold)
        self._temperature.fill_(temperature or 1.0)
        sampling = Sampling(self._temperature if temperature else None, top_k, self._generator)
        choose = self._chooser(rule, sampling) if self.auto and rule != "none" else None
        K = self.speculate_k if rule != "none" else 0
        for k in (AUTO_K if choose else (K,)) if self._graphs is not None else ():
            self._graph(k, sampling)  # recorded before the prompt is read, and before the seed is set
        self._generator.manual_seed(seed)
        models = (self.target, self.draft) if K else (self.target,)
        tokens: list[int] = []
        kept = {"exact": 0, "judge": 0, "target": 0}
        by_position, rounds, finish_reason, first_token = [0] * K, 0, "length", None
        drafted, in_graphs = 0, {"draft": 0.0, "verify": 0.0}
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the last answer's round in flight is not this one's
        clock, start = PhaseClock(self.device), time.perf_counter()
        clock.mark()
        try:
            kept_rows = [len(os.path.commonprefix((prompt_ids[:-1], model.cached))) for model in models]
            begin = min(kept_rows) if keep_cache else 0
            for model in models:
                model.cached = []
            state, outcome = self._prefill(prompt_ids, begin, sampling, with_draft=K > 0)
            clock.mark("prefill")
            flights, graph = deque([(0, None, self._send(outcome))]), None
            while True:
                # Each flight brings a token or more: none is launched that the length rules out.
                while not flights or len(flights) <= self.ahead and len(tokens) + len(flights) < max_new_tokens:
                    clock.mark()
                    if choose:
                        K = choose()
                    if self._graphs is None:
                        end = len(prompt_ids) + len(tokens) + (1 + len(flights)) * (self.speculate_k + 1)
                        state, outcome = self.run_round(K, state, sampling, clock, end)
                    else:
                        state, outcome, graph = self._replay(K, state, sampling, graph)
                    flights.append((K, graph, self._send(outcome)))
                used, by, receive = flights.popleft()
                received = receive()
                block = self._block(received, max_new_tokens - len(tokens))
                self.shard.same(block.tokens)
                tokens += block.tokens
                if first_token is None:
                    first_token = time.perf_counter() - start
                else:
                    rounds += 1
                    drafted += used
                    if by:
                        in_graphs["draft"] += by.draft_seconds
                        in_graphs["verify"] += by.seconds - by.draft_seconds  # the acceptance rule's too
                    for i, source in enumerate(block.sources):
                        kept[source] += 1
                        if source != "target":
                            by_position[i] += 1
                    if choose and len(block.tokens) == received[used + 1] + 1:  # not cut
                        choose.saw(used, received[used + 1])
                if block.tokens[-1] in self.stop_tokens:
                    finish_reason = "stop"
                paused = time.perf_counter()
                try:
                    yield block
                except GeneratorExit:
                    self.shard.agree(True)
                    raise
                stopped = self.shard.agree(False)  # by rank 0's consumer
                if not self.ahead:  # else a round goes on meanwhile
                    start += time.perf_counter() - paused  # the consumer's time is not ours
                if stopped or finish_reason == "stop" or len(tokens) >= max_new_tokens:
                    break
        except FloatingPointError:
            for model in models:
                model.clear_caches()  # NaN in a dead row would still reach every answer
            raise
        finally:
            # Rows of all but the last token are right in the target's cache, and of all but the last two in the draft's.
            for model in models:
                model.cached = [*prompt_ids, *tokens][:-2] if tokens else []
            seconds = time.perf_counter() - start
            phases = in_graphs if self._graphs is not None else clock.seconds()
            accepted = kept["exact"] + kept["judge"]
            self.stats = {
                "prompt": self.tokenizer and self.tokenizer.decode(prompt_ids),
                "text": self.tokenizer and self.tokenizer.decode(tokens, skip_special=True),
                "tokens": tokens, "prompt_tokens": len(prompt_ids), "new_tokens": len(tokens), "finish_reason": finish_reason,
                "seconds": seconds, "seconds_to_first_token": first_token, "tokens_per_second": len(tokens) / seconds,
                "rounds": rounds, "tokens_per_round": (len(tokens) - 1) / rounds if rounds else 0.0,
                "accepted_per_round": accepted / rounds if rounds else 0.0,
                "drafted_per_round": drafted / rounds if rounds else 0.0,
                "accepted_exact": kept["exact"], "accepted_judge": kept["judge"],
                "acceptance_by_position": [count / rounds if rounds else 0.0 for count in by_position],
                "draft_share": phases.get("draft", 0.0) / seconds, "verify_share": phases.get("verify", 0.0) / seconds,
                "rule": rule, "speculate_k": len(by_position), "speculate_k_auto": choose is not None, "threshold": threshold,
                "temperature": temperature, "top_k": top_k, "seed": seed, "device": device_name(self.device),
                "dtype": str(self.target.dtype).removeprefix("torch."), "compiled": self.compiled, "world_size": self.shard.world,
            }

    def _replay(self, K: int, state: tuple[Tensor, Tensor], sampling: Sampling, last: GraphRound | None):
        """The next round from the graph for K; the state moves when it is another one's."""
        graph = self._graph(K, sampling)
        if graph is not last:
            graph.set(state)
        return graph.state, graph(), graph

    def _chooser(self, rule: str, sampling: Sampling) -> ChooseK:
        """The chooser of a rule; before its first answer, rounds of every K are timed, on rank 0 for all ranks."""
        if rule not in self._choosers:
            seconds, n = {}, torch.tensor(min(TIMED_AT, self.max_seq_length), device=self.device)
            for model in (self.target, self.draft):
                model.cached = []  # overwritten here
            for K in AUTO_K:
                state = torch.zeros(2, dtype=torch.int64, device=self.device), n
                if self._graphs is not None:
                    seconds[K] = self._graph(K, sampling).seconds
                    continue
                times = []
                for _ in range(12):  # the first ones compile
                    begin = time.perf_counter()
                    self.run_round(K, state, sampling, PhaseClock(self.device, on=False), 2 * TIMED_AT)[1].tolist()
                    times.append(time.perf_counter() - begin)
                seconds[K] = sorted(times)[3]
            self._choosers[rule] = ChooseK(self.shard.from_first(seconds))
        return self._choosers[rule]

    def warmup(self, *, temperature: float = 0.0, top_k: int | None = None, rules: tuple[str, ...] | None = None) -> float:
        """Run a few tokens under each rule, so that everything is compiled; returns the seconds it took."""
        start = time.perf_counter()
        stop_tokens, self.stop_tokens = self.stop_tokens, ()
        try:
            for rule in rules or (self.rule,):
                prompt = [0] * max(2, min(PREFILL_COMPILED, self.max_seq_length // 2))
                new_tokens = min(2 + 2 * (self.speculate_k + 1), self.max_seq_length - len(prompt))
                for _ in self.generate(prompt, max_new_tokens=new_tokens, temperature=temperature, top_k=top_k, rule=rule):
                    pass
        finally:
            self.stop_tokens, self.stats = stop_tokens, {}
            self._choosers = {rule: ChooseK(chooser.seconds) for rule, chooser in self._choosers.items()}  # forget this text
        return time.perf_counter() - start


def check_fit(target: ModelConfig, draft: ModelConfig | None, judge: JudgeHead | None, *, speculate_k: int | str,
              threshold: float | None) -> None:
    """ValueError where draft, target, judge and the round's settings do not fit together."""
    if speculate_k == "auto":
        speculate_k = max(AUTO_K)
    if not isinstance(speculate_k, int):
        raise ValueError(f"got speculate_k {speculate_k!r}, expected a number from 1 to {MAX_K}, or auto")
    if speculate_k < 1:
        raise ValueError(f"got speculate_k {speculate_k}, expected 1 or more ({MAX_K} at most); {SPECULATE_K} is a good start")
    if speculate_k > MAX_K:
        raise ValueError(f"got speculate_k {speculate_k}, expected {MAX_K} or less, which is what the judge kernel holds")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"got threshold {threshold}, expected a number in [0, 1]; 1 is standard speculative decoding")
    if judge is not None and draft is None:
        raise ValueError("got a judge without a draft: there is nothing to judge; give --draft_checkpoint_path DIR")
    if draft is not None and draft.vocab_size != target.vocab_size:
        raise ValueError(f"got a draft with a vocabulary of {draft.vocab_size} and a target with {target.vocab_size}; "
                         "expected the same tokens in both; take two models of one family")
    if judge is not None:
        judge.check(target.hidden_size)


def check_tokenizers(target: Tokenizer, draft: Tokenizer) -> None:
    """ValueError where the two would read the same ids as different text."""
    if target.fingerprint == draft.fingerprint:
        return
    names = sorted(dict(target.special_tokens.items() ^ draft.special_tokens.items()))
    got = (f"special tokens of draft and target differ ({', '.join(names[:3])}, {len(names)} in all)" if names else
           f"vocabularies of draft ({draft.vocab_size} tokens) and target ({target.vocab_size}) differ")
    raise ValueError(f"{got}; expected the same text for every id; take two models of one family and generation")


def check_sampling(temperature: float, top_k: int | None, max_new_tokens: int) -> None:
    """ValueError for options out of range."""
    if temperature != 0 and not 1e-3 <= temperature < float("inf"):
        raise ValueError(f"got temperature {temperature}, expected 0 (greedy) or a number from 0.001 on")
    if top_k is not None and top_k < 1:
        raise ValueError(f"got top_k {top_k}, expected 1 or more; leave it out to keep the whole vocabulary")
    if max_new_tokens < 1:
        raise ValueError(f"got max_new_tokens {max_new_tokens}, expected 1 or more")


def check_length(prompt_tokens: int, max_new_tokens: int, limit: int) -> int:
    """max_new_tokens, shortened with a warning where it would outgrow `limit`; ValueError for a prompt that fills it."""
    if prompt_tokens < 1:
        raise ValueError("got an empty prompt, expected at least one token")
    if prompt_tokens >= limit:
        raise ValueError(f"the prompt has {prompt_tokens} tokens and the context holds {limit}; expected room for an answer: "
                         "shorten the prompt")
    if prompt_tokens + max_new_tokens > limit:
        warnings.warn(f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones outgrow the context of {limit}: "
                      f"generating {limit - prompt_tokens} at most", stacklevel=3)
    return min(max_new_tokens, limit - prompt_tokens)


def check_writable(path: str | None) -> None:
    """ValueError or FileNotFoundError where an output file could not be written."""
    if path is None:
        return
    if not (parent := Path(path).resolve().parent).is_dir():
        raise FileNotFoundError(f"{path}: its directory {parent} does not exist; make it first")
    if Path(path).is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{path}: got a place that cannot be written, expected a file in a writable directory")


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or CUDA where there is one, else the CPU. ValueError where it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"got device {name!r}, expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"got device {name!r}, expected cpu, cuda or cuda:N: gavel is tested on no other")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ValueError(f"got device {name!r}, but torch sees {count} CUDA devices; use --device cpu, or install a driver "
                         "and a CUDA build of torch")
    return device


def pick_dtype(name: str | None, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; else the checkpoint's on CUDA, and on a CPU bfloat16 where it has units for it, or float32."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"got dtype {name!r}, expected one of {', '.join(DTYPES)}")
    if device.type == "cuda":
        dtype = DTYPES[name] if name else config.dtype
        if dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(f"{torch.cuda.get_device_name(device)} has no bfloat16; use --dtype float16 or float32")
        return dtype
    if name == "float16":
        raise ValueError("got dtype float16 on a CPU, which computes it slower and no better; use bfloat16 or float32")
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return DTYPES[name] if name else torch.bfloat16 if fast else torch.float32


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def setup_compiler(device: torch.device, world: int = 1) -> None:
    """Settings of torch.compile, made once, by a program and not at import."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    dynamo.recompile_limit = 64  # one engine may run several K and cache lengths
    inductor.fx_graph_cache = True  # a second start reads the compiled steps from disk
    if device.type == "cuda":
        inductor.coordinate_descent_tuning = True
    else:
        inductor.cpp_wrapper = world == 1  # a step calls dozens of small kernels: not from Python (collectives need it)


def can_compile(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None where it can."""
    if device.type != "cpu":
        return None
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler ({' or '.join(compilers)}) found"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python.h found (it is in python3-dev)"
    return None


STYLES = {"exact": "", "judge": "\033[4;38;5;214m", "target": "\033[38;5;75m"}  # orange and blue: safe for colour-blind eyes


class Printer:
    """Streams an answer; on a terminal in the colours of who let each token stand."""

    def __init__(self, tokenizer: Tokenizer, *, colour: bool):
        self.decoder, self.colour = tokenizer.stream(), colour

    def __call__(self, block: Block) -> None:
        for token, source in zip(block.tokens, block.sources, strict=True):
            text = self.decoder.push([token])
            styled = self.colour and STYLES[source] and text
            print(f"{STYLES[source]}{text}\033[0m" if styled else text, end="", flush=True)

    def close(self) -> None:
        print(self.decoder.flush(), flush=True)


def use_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def legend() -> str:
    names = ("accepted by the exact rule", "kept by the judge alone", "written by the target")  # in the order of STYLES
    return "   ".join(f"{style}{text}\033[0m" for style, text in zip(STYLES.values(), names, strict=True))


def table(samples: list[dict]) -> str:
    """One row per answer: speed, tokens a round, who accepted how many, and where the time went."""
    header = ("rule", "tokens", "tokens/s", "ms/token", "rounds", "tokens/round", "by exact rule", "by judge", "draft", "verify")
    rows = [header] + [(
        s["rule"] if s["rule"] != "none" else "target alone", str(s["new_tokens"]), f"{s['tokens_per_second']:.1f}",
        f"{1000 / s['tokens_per_second']:.2f}", str(s["rounds"]), f"{s['tokens_per_round']:.2f}", str(s["accepted_exact"]),
        str(s["accepted_judge"]), f"{s['draft_share']:.0%}", f"{s['verify_share']:.0%}") for s in samples]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


@dataclass(frozen=True)
class Setup:
    """Everything that is known before weights load."""

    target_path: Path
    draft_path: Path | None
    tokenizer: Tokenizer
    judge: JudgeHead | None
    device: torch.device
    dtype: torch.dtype
    context: int
    compile: bool
    ranks: bool  # this process is one rank of several


def find_head(given: str, target: Path) -> Path:
    """--judge's file: as given, or judge.safetensors in the target's directory or its parent."""
    if given:
        return Path(given)
    for directory in (target, target.resolve().parent):
        if (directory / "judge.safetensors").is_file():
            return directory / "judge.safetensors"
    raise FileNotFoundError(
        f"no judge.safetensors in {target} or above it; train one: python train_head.py --checkpoint_path {target} "
        "--data answers.jsonl, or name a head: --judge HEAD")


def prepare(args: argparse.Namespace) -> Setup:
    """Check everything that can be known without reading a weight."""
    check_sampling(args.temperature, args.top_k, args.max_new_tokens)
    if args.num_samples < 1:
        raise ValueError(f"got num_samples {args.num_samples}, expected 1 or more")
    if not 0 <= args.seed < 2**63 - args.num_samples:
        raise ValueError(f"got seed {args.seed}, expected 0 or a positive 63-bit number")
    for output in (args.json, args.profile):
        check_writable(output)
    ranks = tp.under_torchrun()
    device = tp.rank_device(args.device) if ranks else pick_device(args.device)
    if args.checkpoint_path is None and args.draft_checkpoint_path is not None:
        raise ValueError("got --draft_checkpoint_path without --checkpoint_path; give both, or neither for the bundled pair")
    target_path = Path(args.checkpoint_path or DEMO / "target")
    draft_path = args.draft_checkpoint_path and Path(args.draft_checkpoint_path)
    if args.checkpoint_path is None and args.judge is not None:
        draft_path = DEMO / "draft"
    config = ModelConfig.from_checkpoint(target_path)
    draft_config = ModelConfig.from_checkpoint(draft_path) if draft_path else None
    for model_config, path in ((config, target_path), (draft_config, draft_path)):
        if ranks and model_config:
            tp.check_world(model_config, int(os.environ["WORLD_SIZE"]), str(path))
    if args.judge is not None and not draft_path:
        raise ValueError("got --judge without a draft: there is nothing to judge; give --draft_checkpoint_path DIR")
    judge = JudgeHead.load(find_head(args.judge, target_path)) if args.judge is not None else None
    check_fit(config, draft_config, judge, speculate_k=args.speculate_k, threshold=args.threshold)
    tokenizer = Tokenizer.from_checkpoint(target_path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{target_path}: got a tokenizer of {tokenizer.vocab_size} tokens and a model of {config.vocab_size}; "
                         "expected them to match: download the directory again")
    if args.interactive and not tokenizer.has_chat:
        raise ValueError("--interactive needs a chat model; this tokenizer has no <|start_header_id|>")
    if args.interactive and (args.raw or args.prompt is not None or args.num_samples > 1):
        raise ValueError("got --interactive with --raw, --prompt or --num_samples; a chat takes its prompts from the terminal")
    if draft_path:
        check_tokenizers(tokenizer, Tokenizer.from_checkpoint(draft_path))
    dtype = pick_dtype(args.dtype, config, device)
    missing = can_compile(device) if args.compile else None
    if missing:
        say(f"{missing}: running uncompiled, several times slower")
    context = min(c.max_position_embeddings for c in (config, draft_config) if c)
    return Setup(target_path, draft_path, tokenizer, judge, device, dtype, context, args.compile and missing is None, ranks)


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, raw: bool, system: str | None) -> list[int]:
    """One user turn in the chat format where the tokenizer has it, else raw text after BOS."""
    if raw or not tokenizer.has_chat:
        if system:
            raise ValueError("got --system, but this prompt is raw text (no chat tokens, or --raw); leave one of them out")
        return tokenizer.encode(prompt, bos=True)
    turns = [{"role": "system", "content": system}] if system else []
    return tokenizer.encode_chat([*turns, {"role": "user", "content": prompt}])


def load_model(path: Path, setup: Setup, shard: Whole) -> Transformer:
    """Read a checkpoint, with a progress bar on rank 0; every rank says what it read and what it took."""
    from tqdm import tqdm  # here: only the command line needs it

    start = time.perf_counter()
    with tqdm(desc=f"read {path.name}", unit="B", unit_scale=True, delay=1, disable=shard.rank > 0, leave=False) as bar:
        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        model = Transformer.from_checkpoint(path, device=setup.device, dtype=setup.dtype, shard=shard, progress=progress)
    if shard.world > 1:
        import resource  # here: Unix alone has it

        peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB of host memory at most"
        if setup.device.type == "cuda":
            peak += f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the GPU's"
        lines = shard.everyone(f"rank {shard.rank}: {model.bytes_read / 1e6:,.1f} MB of {path.name} read in "
                               f"{time.perf_counter() - start:.1f} s, {peak}")
        say("\n".join(lines))
    return model


def load_engine(setup: Setup, args: argparse.Namespace, max_seq_length: int, shard: Whole) -> Engine:
    """Load the weights, build the engine, and compile it; says on stderr what takes time."""
    start = time.perf_counter()
    target = load_model(setup.target_path, setup, shard)
    draft = load_model(setup.draft_path, setup, shard) if setup.draft_path else None
    engine = Engine(target, draft, setup.judge, speculate_k=args.speculate_k, threshold=args.threshold,
                    max_seq_length=max_seq_length, tokenizer=setup.tokenizer, compile=setup.compile)
    say(f"loaded {setup.target_path.name}{f' and {setup.draft_path.name}' if setup.draft_path else ''} in "
        f"{time.perf_counter() - start:.1f} s, {setup.dtype} on {device_name(setup.device)}"
        f"{f', {shard.world} ranks' if shard.world > 1 else ''}".replace("torch.", ""))
    if setup.compile:
        setup_compiler(setup.device, shard.world)
        if shard.world > 1:
            tp.compile_in_turn()
        rules = ("none", "judge") if compares(args) else (engine.rule,)
        parts = (["one target step"] if "none" in rules else []) + (
            [] if draft is None else ["draft step", f"verification of {engine.speculate_k + 1} tokens", "acceptance rule"])
        say(f"compiling: {', '.join(parts)} (a minute or two the first time, seconds once cached) ...", end=" ")
        say(f"done in {engine.warmup(temperature=args.temperature, top_k=args.top_k, rules=rules):.1f} s")
    return engine


def compares(args: argparse.Namespace) -> bool:
    """The bundled pair under the judge is shown beside its target alone and the exact rule."""
    return args.checkpoint_path is None and args.judge is not None and not args.interactive


def say(text: str, end: str = "\n") -> None:
    """To stderr: stdout is for the answer and its table. Of several ranks the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, end=end, file=sys.stderr, flush=True)


def answer(engine: Engine, ids: list[int], args: argparse.Namespace, *, seed: int, rule: str | None = None,
           show: bool = True, keep_cache: bool = False) -> dict:
    """Generate one answer, streamed to the terminal if `show`; returns its statistics."""
    printer = Printer(engine.tokenizer, colour=use_colour() and engine.draft is not None)
    for block in engine.generate(ids, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                                 seed=seed, rule=rule, keep_cache=keep_cache):
        if show:
            printer(block)
    if show:
        printer.close()
    return engine.stats


def read_line() -> str:
    """A line from the terminal, empty at its end."""
    try:
        return input("\n> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def chat(engine: Engine, args: argparse.Namespace) -> list[dict]:
    """Read turns from the terminal until end of input; the caches keep what was said."""
    opening = [{"role": "system", "content": args.system}] if args.system else []
    fresh = engine.tokenizer.encode_chat(opening, add_generation_prompt=False)
    history, samples, shard = fresh, [], engine.shard
    end_of_turn = engine.tokenizer.special_tokens["<|eot_id|>"]
    say("One line is one turn; an empty line or Ctrl-D ends the chat, Ctrl-C stops an answer.")
    while True:
        try:
            line = shard.from_first(shard.rank == 0 and read_line())
        except KeyboardInterrupt:
            return samples
        if not line.strip():
            return samples
        turn = [*engine.tokenizer.encode_turn("user", line), *engine.tokenizer.encode_turn("assistant")]
        if len(history) + len(turn) >= engine.max_seq_length:
            say(f"The context of {engine.max_seq_length} tokens is too short for this turn: starting anew.")
            history = fresh
            if len(fresh) + len(turn) >= engine.max_seq_length:
                continue  # this turn alone does not fit
        ids = [*history, *turn]
        with contextlib.suppress(*[KeyboardInterrupt] * (shard.world == 1)):  # of several ranks, it ends all
            answer(engine, ids, args, seed=args.seed + len(samples), keep_cache=True)
        said = engine.stats.get("tokens", [])
        history = [*ids, *said] if said and said[-1] in engine.stop_tokens else [*ids, *said, end_of_turn]
        samples += [engine.stats | {"prompt": line}] if said else []


def k_or_auto(text: str) -> int | str:
    """--speculate_k's value."""
    if text != "auto" and not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 1 to {MAX_K}, or auto")
    return text if text == "auto" else int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("models").add_argument
    add("--checkpoint_path", metavar="DIR", help="target: a Hugging Face directory (default: the bundled pair's)")
    add("--draft_checkpoint_path", metavar="DIR", help="draft: a smaller model with the same tokenizer")
    add("--judge", nargs="?", const="", metavar="HEAD",
        help="keep what the judge head finds correct (default HEAD: judge.safetensors beside the target or above it)")
    add("--threshold", type=float, metavar="δ", help="score a token must exceed, 0..1 (default: the head's own; 1: lossless)")
    add("--speculate_k", type=k_or_auto, default=SPECULATE_K, metavar="K",
        help=f"tokens drafted a round (default: %(default)s); auto: of {', '.join(map(str, AUTO_K))} the best by measured times "
             "and the acceptance so far (what the judge keeps, and samples, then depend on timing too)")
    add = parser.add_argument_group("prompt").add_argument
    add("--prompt", help="one user turn in the chat format, where the tokenizer has it")
    add("--system", metavar="TEXT", help="a system turn before it")
    add("--raw", action="store_true", help="no chat format: plain text after the begin-of-text token")
    add("--interactive", action="store_true", help="chat on the terminal; the cache is kept between turns")
    add = parser.add_argument_group("sampling").add_argument
    add("--max_new_tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    add("--top_k", type=int, metavar="N", help="sample among the N likeliest tokens (default: all)")
    add("--seed", type=int, default=0, help="of the first sample; the next ones count on (default: %(default)s)")
    add("--num_samples", type=int, default=1, metavar="N", help="answers to the same prompt (default: %(default)s)")
    add = parser.add_argument_group("running").add_argument
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", choices=DTYPES,
        help="default: the checkpoint's on CUDA; on a CPU bfloat16 if it has units for it, else float32")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the steps (default: on)")
    add("--check_ranks", action="store_true", help="under torchrun: compare all ranks' tokens in every round (for debugging)")
    add("--json", metavar="FILE", help="write a list with one object per sample: text, tokens, speed, acceptance")
    add("--profile", metavar="FILE", help="write a Chrome trace (open it in ui.perfetto.dev)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run the command line; ValueError and OSError are a user's mistakes."""
    setup = prepare(args)
    shard = tp.start(setup.device, check=args.check_ranks) if setup.ranks else WHOLE
    if shard.rank:
        sys.stdout = open(os.devnull, "w")  # the first rank prints and writes
        warnings.simplefilter("ignore")
    try:
        run(args, setup, shard)
    finally:
        if sys.exc_info()[0] is None:  # else other ranks may never come to meet this one
            tp.stop()


def run(args: argparse.Namespace, setup: Setup, shard: Whole) -> None:
    """What remains to be done once everything that can be checked early was."""
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    if setup.device.type == "cuda":
        torch.cuda.set_device(setup.device)  # Triton launches and events go to the current device
    prompt = args.prompt if args.prompt is not None else DEMO_PROMPT if args.checkpoint_path is None else DEFAULT_PROMPT
    ids = encode_prompt(setup.tokenizer, prompt, raw=args.raw, system=args.system)
    if args.interactive:
        max_seq_length = min(setup.context, 8192)
    else:
        args.max_new_tokens = check_length(len(ids), args.max_new_tokens, setup.context)
        max_seq_length = min(setup.context, -(-(len(ids) + args.max_new_tokens) // 128) * 128)  # few lengths: few compilations
    engine = load_engine(setup, args, max_seq_length, shard)
    profiler = torch.profiler.profile() if args.profile else contextlib.nullcontext()
    with profiler:
        if args.interactive:
            samples = chat(engine, args)
        else:
            if use_colour() and engine.draft is not None:
                say(legend())
            print(f"{prompt}\n", flush=True)
            samples = [answer(engine, ids, args, seed=args.seed + i) | {"prompt": prompt} for i in range(args.num_samples)]
    if args.profile and not shard.rank:
        with written_aside(args.profile) as file:
            profiler.export_chrome_trace(str(file))
    if args.json and not shard.rank:
        with written_aside(args.json) as file:
            file.write_text(json.dumps(samples, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shown = samples
    if compares(args):
        others = [answer(engine, ids, args, seed=args.seed, rule=rule, show=False) for rule in ("none", "exact")]
        shown = [*others, *samples]
    if shown:
        print("\n" + table(shown))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, FloatingPointError) as error:
        say(f"generate.py: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
