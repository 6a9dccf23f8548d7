"""Draft, verify, accept: generation at batch 1, from a checkpoint directory to text on the
terminal.

A drafter proposes K tokens, the target reads them all in one pass, and a rule decides how many
stay: none (the target alone), exact (speculative sampling: the target's own distribution, token for
token), or a lossy one, above all the judge (exact, or correct in the eyes of a linear head on the
target's hidden states; arXiv 2501.19309). One pass over the target's weights then yields several
tokens, which is what counts at batch 1, where a pass costs the time to read the weights. A lossy
rule keeps more and gives up losslessness for it: text may differ from the target's own.

A round is a callable, state -> (state, outcome), on fixed shapes and on the device. Nothing is
rolled back, as cache rows past the committed position are dead until they are overwritten. On CUDA
a round is one graph replay, and the next one is launched before the host reads the last one's
outcome: stop tokens and lengths are handled one round behind, and what lies beyond the end is cut.

Shapes: K draft length, D model dim, V vocabulary; n the position of the last committed token.

    python generate.py --judge                          # the bundled pair, three rules compared
    python generate.py --checkpoint_path Llama-3.1-8B-Instruct --prompt "Why is the sky blue?"
    python generate.py --checkpoint_path Llama-3.1-8B-Instruct --draft lookup
    python generate.py --checkpoint_path Llama-3.1-70B-Instruct \\
        --draft_checkpoint_path Llama-3.1-8B-Instruct --judge --interactive

On a terminal a legend explains the colours. It does not batch requests.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import cpu
import drafter
import terminal
import tp
from drafter import Drafter, ModelDrafter, Reader, Sampling, State, device_step, next_token
from judge import JudgeHead, Rule, accept, available_rules, check_fit
from model import Transformer, compiled
from terminal import Setup, say
from tokenizer import Tokenizer

SPECULATE_K = 16
COMPARE_RUNS = 5  # of each rule, in turns


class Block(NamedTuple):
    """What one round added: token ids, and who let each stand: exact, the lossy rule, or target."""

    tokens: list[int]
    sources: list[str]


@dataclass(frozen=True)
class Request:
    """How one answer is to be drawn; ValueError for options out of range."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name, right, expected in (
                ("temperature", self.temperature == 0 or 1e-3 <= self.temperature < float("inf"),
                 "0 (greedy) or a number from 0.001 on"),
                ("top_k", self.top_k is None or self.top_k >= 1,
                 "1 or more; leave it out to keep the whole vocabulary"),
                ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
                ("seed", 0 <= self.seed < 2**63, "0 or a positive 63-bit number")):
            if not right:
                raise ValueError(f"got {name} {getattr(self, name)}, expected {expected}")

    def room(self, prompt_tokens: int, limit: int) -> int:
        """max_new_tokens, shortened with a warning to what `limit` leaves (ValueError: nothing)."""
        if prompt_tokens < 1:
            raise ValueError("got an empty prompt, expected at least one token")
        if prompt_tokens >= limit:
            raise ValueError(f"the prompt has {prompt_tokens} tokens and the context holds "
                             f"{limit}; expected room for an answer: shorten the prompt")
        if prompt_tokens + self.max_new_tokens > limit:
            warnings.warn(f"{prompt_tokens} prompt tokens and {self.max_new_tokens} new ones "
                          f"outgrow the context of {limit}: generating {limit - prompt_tokens} "
                          "at most", stacklevel=3)
        return min(self.max_new_tokens, limit - prompt_tokens)


def verify(model: Transformer, tokens: Tensor, input_pos: Tensor, *,
           rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The target reads [last, d_1..d_K]: tokens [1, K+1] -> hidden [K+1, D], logits [K+1, V]."""
    hidden = model(tokens, input_pos, rows)
    return hidden[0], model.logits(hidden)[0]


def conclude(state: State, hidden: Tensor, logits: Tensor, drafted: Tensor,
             **inputs) -> tuple[State, Tensor]:
    """Accept, advance the state, and put what the host is to know into one tensor (see Round)."""
    decision = accept(hidden, logits, drafted, **inputs)
    a, token = decision.accept_len, decision.next_token
    last = torch.cat((state.last_two[1:], drafted)).gather(0, a[None])  # [1]: the last token kept
    numbers = torch.stack((token, a, decision.status.long()))
    outcome = torch.cat([part.double() for part in (drafted, numbers, decision.source,
                                                    decision.score)])
    return State(torch.cat((last, token[None])), state.pos + a + 1), outcome


def alone(model: Transformer, tokens: Tensor, input_pos: Tensor, *sampling,
          rows: Tensor | None = None) -> tuple[State, Tensor]:
    """The target reads tokens [1, S] at input_pos [S] and writes one: state and outcome, K = 0."""
    token, _, top = next_token(model, tokens, input_pos, *sampling, rows=rows)
    outcome = torch.stack((token, torch.zeros_like(token), (~top.isfinite()).long()))
    return State(torch.stack((tokens[0, -1], token)), input_pos[-1] + 1), outcome.double()


class Round:
    """One round of speculation: state -> (state, outcome), nothing read back to the host.

    outcome float64 [3K + 3], whole numbers but for the scores: d_1..d_K, the next token, a, status,
    the sources of d [K], the rule's scores [K]. Without a rule K is 0: one step of the target.
    """

    def __init__(self, engine: Engine, rule: Rule | None, draws: Sampling):
        self.engine, self.rule, self.draws = engine, rule, draws

    def __call__(self, state: State) -> tuple[State, Tensor]:
        if self.rule is None:
            return self.step(state)
        engine, (pair, n) = self.engine, state
        drafted, q = engine.drafter.propose(state, self.draws)
        tokens = torch.cat((pair[1:], drafted))[None]  # [1, K+1]
        hidden, logits = engine.verify(engine.target, tokens, n + engine.offsets)
        return self.accept(state, hidden, logits, drafted, q)

    def accept(self, state: State, hidden: Tensor, logits: Tensor, drafted: Tensor, q):
        """The rule decides; where it needs probabilities it gets whole rows of logits."""
        engine, rule, draws, shard = self.engine, self.rule, self.draws, self.engine.shard
        sampled = draws.temperature is not None
        if sampled or rule.needs_probs:
            logits, shard = shard.gather(logits), None
        if q is None and (sampled or rule.needs_draft_probs):  # a deterministic drafter: one-hot
            q = torch.zeros(len(drafted), engine.target.config.vocab_size, device=drafted.device)
            q.scatter_(1, drafted[:, None], 1.0)
        decide = conclude if rule.on_host else engine.conclude
        return decide(state, hidden, logits, drafted, rule=rule, threshold=engine.threshold,
                      stop_tokens=engine.stops, temperature=draws.temperature, top_k=draws.top_k,
                      draft_probs=q, uniforms=draws.draw("uniform", len(drafted)),
                      exponentials=draws.draw("exponential", engine.target.config.vocab_size),
                      shard=shard, first_token=engine.target.first_token)

    def step(self, state: State) -> tuple[State, Tensor]:
        """The target writes one token alone."""
        engine, draws, (pair, n) = self.engine, self.draws, state
        e = draws.draw("exponential", engine.target.config.vocab_size)
        return engine.step(engine.target, pair[None, 1:], n[None], draws.temperature,
                           draws.top_k, e)


class RecordedRound:
    """A round as one CUDA graph: state and outcome lie in static tensors, overwritten by a replay.

    Recording runs the round at position `at`: what the caches held from there on is lost.
    """

    def __init__(self, round: Round, at: int):
        device, side = round.engine.device, torch.cuda.Stream()
        self.state = State(torch.zeros(2, dtype=torch.int64, device=device),
                           torch.tensor(at, device=device))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, and allocates what is kept between calls
                round(self.state)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        if round.draws.temperature is not None:
            self.graph.register_generator_state(round.draws.generator)
        with torch.cuda.graph(self.graph):
            new, self.outcome = round(self.state)
            for static, value in zip(self.state, new):
                static.copy_(value)

    def __call__(self, state: State) -> tuple[State, Tensor]:
        if state is not self.state:
            for static, value in zip(self.state, state):
                static.copy_(value)
        self.graph.replay()
        return self.state, self.outcome


class Answer:
    """The books of one answer: what was committed, who kept it, when it ends, how long it took.

    It knows no model and no device: outcomes of rounds come in as lists, the first from prefill.
    """

    def __init__(self, max_new_tokens: int, stop_tokens: tuple[int, ...], speculate_k: int,
                 rule: str):
        self.max_new_tokens, self.stop_tokens = max_new_tokens, stop_tokens
        self.speculate_k, self.rule, self.names = speculate_k, rule, ("target", "exact", rule)
        self.tokens: list[int] = []
        self.sources: list[str] = []
        self.scores: list[float | None] = []  # of the lossy rule, None where it had no say
        self.refused = 0.0  # highest score of a token that a round was cut before
        self.rounds, self.by_position, self.cancelled = 0, [0] * speculate_k, False
        self.started, self.first_token = time.perf_counter(), None

    stopped = property(lambda self: bool(self.tokens) and self.tokens[-1] in self.stop_tokens)
    done = property(lambda self: self.cancelled or self.stopped or not self.wants(0))

    def wants(self, in_flight: int) -> bool:
        """Whether the length allows another round: each in flight brings a token at least."""
        return len(self.tokens) + in_flight < self.max_new_tokens

    def add(self, outcome: list[float]) -> Block:
        """Commit a round, cut after a stop token and to the length. FloatingPointError: status."""
        K = len(outcome) // 3 - 1
        (*drafted, token, a, status), marks = outcome[:K + 3], outcome[K + 3:]
        a, sources, scores = int(a), marks[:K], marks[K:]
        if status:
            raise FloatingPointError(
                "the target's logits are not finite (NaN or infinity): the weights are damaged, or "
                "overflow in this dtype; try --dtype bfloat16 or float32")
        tokens = [int(token) for token in (*drafted[:a], token)]
        ends = (i + 1 for i, token in enumerate(tokens) if token in self.stop_tokens)
        end = min(next(ends, a + 1), self.max_new_tokens - len(self.tokens))
        if self.first_token is None:
            self.first_token = time.perf_counter() - self.started
        else:
            self.rounds += 1
            for i in range(min(a, end)):
                self.by_position[i] += 1
        block = Block(tokens[:end], [*(self.names[int(i)] for i in sources[:a]), "target"][:end])
        self.tokens += block.tokens
        self.sources += block.sources
        lossy = self.rule not in ("none", "exact")
        self.scores += [*(scores[:a] if lossy else [None] * a), None][:end]
        if lossy and a < K and end > a and drafted[a] not in self.stop_tokens:
            self.refused = max(self.refused, scores[a])
        return block

    def statistics(self) -> dict:
        """What --json says of the answer itself."""
        seconds, each = time.perf_counter() - self.started, 1 / max(self.rounds, 1)
        exact, new = self.sources.count("exact"), len(self.tokens)
        kept = [score for score, source in zip(self.scores, self.sources)
                if source not in ("exact", "target")]
        lossy = len(kept)
        # every threshold in [low, high) gives this same answer; high None: up to 1
        same = [self.refused, min(kept, default=None)]
        return {"tokens": self.tokens, "sources": self.sources, "scores": self.scores,
                "same_thresholds": None if self.rule in ("none", "exact") else same,
                "new_tokens": new, "finish_reason": "stop" if self.stopped else "length",
                "seconds": seconds, "seconds_to_first_token": self.first_token,
                "tokens_per_second": new / seconds, "rounds": self.rounds,
                "tokens_per_round": (new - 1) * each if self.rounds else 0.0,
                "accepted_per_round": (exact + lossy) * each, "accepted_exact": exact,
                "accepted_judge": lossy,
                "acceptance_by_position": [kept * each for kept in self.by_position],
                "rule": self.rule, "speculate_k": self.speculate_k}


class Engine:
    """A target, perhaps a drafter and a rule, and the rounds between them. Batch 1.

    engine = Engine(target, draft, JudgeHead.load(path), speculate_k=16)
    for block in engine.generate(prompt_ids, max_new_tokens=200):
        print(block.tokens, block.sources)
    engine.stats    # the object that --json writes

    draft: a Transformer or a Drafter. rule: a name of RULES or a Rule; by default `judge` with a
    judge, `exact` with a draft, else `none`. threshold defaults to the rule's (the head's) own.
    max_seq_length bounds prompt and answer together. stop_tokens defaults to the target config's.
    tokenizer only puts text into `stats`. compile=True compiles the steps when they first run (see
    warmup; call setup_compiler before), and on CUDA records rounds as graphs. A CUDA device must be
    the current one. ValueError where draft, target and rule do not fit together.
    """

    def __init__(self, target: Transformer, draft: Transformer | Drafter | None = None,
                 judge: JudgeHead | None = None, *, rule: str | Rule | None = None,
                 speculate_k: int = SPECULATE_K, threshold: float | None = None,
                 max_seq_length: int = 2048, stop_tokens: tuple[int, ...] | None = None,
                 tokenizer: Tokenizer | None = None, compile: bool = False):
        device, gpu = target.device, target.device.type == "cuda"
        self.target, self.device, self.shard = target, device, target.shard
        self.tokenizer, self.speculate_k, self.compiled = tokenizer, speculate_k, compile
        self.drafter = ModelDrafter(draft) if isinstance(draft, Transformer) else draft
        self.rules = available_rules(rule, judge, drafts=draft is not None, threshold=threshold)
        self.rule = next(reversed(self.rules))
        draft_model = self.drafter.model if self.drafter else None
        check_fit(target.config, draft_model and draft_model.config, self.rules[self.rule],
                  speculate_k)
        if gpu and device.index not in (None, torch.cuda.current_device()):
            raise ValueError(f"got models on {device} while cuda:{torch.cuda.current_device()} is "
                             "current, expected them on it: call "
                             f"torch.cuda.set_device({device.index}) first")
        self.models = [model for model in (target, draft_model) if model is not None]
        self.max_seq_length = min(max_seq_length, target.config.max_position_embeddings)
        # A last block, and one in flight, must not write outside.
        rows = self.max_seq_length + 2 * (speculate_k + 1) + 1
        self.read = Reader(target, rows, compile, alone)
        if self.drafter:
            self.drafter.setup(target, speculate_k, rows, compile)
        self.stop_tokens = target.config.eos_token_ids if stop_tokens is None else stop_tokens
        self.stops = torch.tensor(self.stop_tokens, dtype=torch.int64, device=device)
        # Filled anew for each answer.
        self.threshold, self.temperature = (torch.ones((), device=device) for _ in range(2))
        self.generator = torch.Generator(device)
        self.offsets = torch.arange(speculate_k + 1, device=device)
        self.step, self.verify = (device_step(f, target, compile) for f in (alone, verify))
        self.conclude = compiled(conclude) if compile and not gpu else conclude  # or its kernel is
        self.ahead, self.record = int(gpu), compile and gpu  # ahead: launched beyond the round read
        self.recorded: dict[tuple, RecordedRound] = {}
        self.stats: dict = {}

    @torch.no_grad()
    def generate(self, prompt_ids: list[int], *, max_new_tokens: int, temperature: float = 0.0,
                 top_k: int | None = None, seed: int = 0, rule: str | Rule | None = None,
                 keep_cache: bool = False) -> Iterator[Block]:
        """Yield the answer block by block: first the token from prefill, then one block a round.

        Ends after a stop token or max_new_tokens (shortened, with a warning, where prompt and
        answer outgrow max_seq_length). `rule` overrides the engine's; keep_cache does not read anew
        what this prompt has in common with the last answer and its prompt (a chat's next turn).
        Afterwards `stats` describes the answer. ValueError: empty prompt, prompt that fills
        max_seq_length, options out of range. FloatingPointError: logits that are not finite, before
        a token of that round is yielded.
        """
        self.stats = {}
        request, rule = Request(max_new_tokens, temperature, top_k, seed), self.find_rule(rule)
        limit, K = request.room(len(prompt_ids),
                                self.max_seq_length), self.speculate_k if rule else 0
        round, draws = self.begin(request, rule)
        answer = Answer(limit, self.stop_tokens, K, rule.name if rule else "none")
        try:
            state, outcome = self.prefill(prompt_ids, draws, drafts=K > 0, keep=keep_cache)
            flights = deque([self.send(outcome)])
            while not answer.done:
                while not flights or len(flights) <= self.ahead and answer.wants(len(flights)):
                    state, outcome = round(state)
                    flights.append(self.send(outcome))
                block = answer.add(flights.popleft()())
                with self.handing_over(block, answer):
                    yield block
        except FloatingPointError:
            self.forget()
            raise
        finally:
            self.close(prompt_ids, answer, request, rule)

    def find_rule(self, rule: str | Rule | None) -> Rule | None:
        """A rule itself or by its name, the engine's for None; ValueError if it cannot run here."""
        rule = self.rule if rule is None else rule
        if isinstance(rule,
                      str) and rule not in self.rules or self.drafter is None and rule != "none":
            raise ValueError(f"got rule {getattr(rule, 'name', rule)!r}, expected one of "
                             f"{', '.join(self.rules)} with what this engine was given")
        rule = self.rules[rule] if isinstance(rule, str) else rule
        return rule and rule.to(self.device)

    def begin(self, request: Request, rule: Rule | None) -> tuple[Callable, Sampling]:
        """The round of an answer, recorded where it can be, and its draws, seeded."""
        self.threshold.fill_(rule.threshold if rule else 1.0)
        self.temperature.fill_(request.temperature or 1.0)
        draws = Sampling(self.temperature if request.temperature else None, request.top_k,
                         self.generator, keep_probs=rule is not None and rule.needs_draft_probs)
        round = Round(self, rule, draws)
        if self.record and not (rule and rule.on_host):
            made = [model.caches_made for model in self.models]
            key = rule, not request.temperature, request.top_k, *made
            if key not in self.recorded:  # anew, too, where a model's caches moved
                self.recorded = {k: v for k, v in self.recorded.items() if [*k[3:]] == made}
                self.forget()
                self.recorded[key] = RecordedRound(round, min(128, self.max_seq_length))
            round = self.recorded[key]
        self.generator.manual_seed(request.seed)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the last answer's round in flight is not this one's
        return round, draws

    def prefill(self, prompt: list[int], draws: Sampling, *, drafts: bool, keep: bool):
        """Read the prompt, but for what is kept, and draw the first token: (state, outcome)."""
        readers = (self.target, self.drafter) if drafts else (self.target,)
        known = [len(os.path.commonprefix((prompt[:-1], reader.cached))) for reader in readers]
        for reader in readers:
            reader.cached = []
        ids, begin = torch.tensor(prompt, device=self.device), min(known) if keep else 0
        if drafts:
            self.drafter.prefill(ids, begin)
        e = draws.draw("exponential", self.target.config.vocab_size)
        return self.read(ids, begin, draws.temperature, draws.top_k, e)

    def send(self, outcome: Tensor) -> Callable[[], list[float]]:
        """Start bringing an outcome to the host; what is returned waits, a round's only wait."""
        if self.device.type != "cuda":
            return outcome.tolist
        host = torch.empty_like(outcome, device="cpu", pin_memory=True)
        host.copy_(outcome, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return lambda: (arrived.synchronize(), host.tolist())[1]

    @contextlib.contextmanager
    def handing_over(self, block: Block, answer: Answer) -> Iterator[None]:
        """Around a yield: ranks end where rank 0's consumer does; its time is not the answer's."""
        self.shard.same(block.tokens)
        paused = time.perf_counter()
        try:
            yield
        except GeneratorExit:
            self.shard.agree(True)
            raise
        answer.cancelled = self.shard.agree(False)
        if not self.ahead:  # else a round goes on meanwhile
            answer.started += time.perf_counter() - paused

    def forget(self) -> None:
        """Clear the caches: NaN in a dead row would still reach every answer."""
        for model in self.models:
            model.clear_caches()
        if self.drafter:
            self.drafter.cached = []

    def close(self, prompt: list[int], answer: Answer, request: Request, rule: Rule | None) -> None:
        """Note what the caches hold, and leave the statistics."""
        # The target's cache lacks the last token at most, the draft's the last two.
        for reader in (self.target, self.drafter) if rule else (self.target,):
            reader.cached = [*prompt, *answer.tokens][:-2] if answer.tokens else []
        text = self.tokenizer.decode if self.tokenizer else lambda ids, **_: None
        self.stats = {
            "prompt": text(prompt), "text": text(answer.tokens, skip_special=True),
            "prompt_tokens": len(prompt), **answer.statistics(),
            "threshold": rule.threshold if rule and rule.name != "exact" else None,
            "temperature": request.temperature, "top_k": request.top_k, "seed": request.seed,
            "device": terminal.device_name(self.device), "compiled": self.compiled,
            "dtype": str(self.target.dtype).removeprefix("torch."), "world_size": self.shard.world}

    def warmup(self, *, temperature: float = 0.0, top_k: int | None = None,
               rules: tuple[str | Rule, ...] | None = None) -> float:
        """Run a few tokens under each rule, so that all is compiled; returns the seconds."""
        start, stop_tokens, self.stop_tokens = time.perf_counter(), self.stop_tokens, ()
        prompt = [0] * max(2, min(cpu.PREFILL_COMPILED, self.max_seq_length // 2))
        new = min(2 + 2 * (self.speculate_k + 1), self.max_seq_length - len(prompt))
        try:
            for rule in rules or (self.rule,):
                for _ in self.generate(prompt, max_new_tokens=new, temperature=temperature,
                                       top_k=top_k, rule=rule):
                    pass
        finally:
            self.stop_tokens, self.stats = stop_tokens, {}
        return time.perf_counter() - start


def setup_compiler(device: torch.device, world: int = 1) -> None:
    """Settings of torch.compile, made once, by a program and not at import."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    dynamo.recompile_limit = 64  # one engine may run several rules, K and cache lengths
    inductor.fx_graph_cache = True  # a second start reads the compiled steps from disk
    if device.type == "cuda":
        inductor.coordinate_descent_tuning = True
    else:  # a step calls dozens of small kernels: not from Python (collectives need it)
        inductor.cpp_wrapper = world == 1


def load_engines(setup: Setup, shard: tp.Shard, max_seq_length: int) -> Callable[[bool], Engine]:
    """Load the weights; what is returned makes an engine of them, compiled or not."""
    models = terminal.load_models(setup, lambda path, progress: Transformer.from_checkpoint(
        path, device=setup.device, dtype=setup.dtype, shard=shard, progress=progress), shard)
    draft = models[1] if setup.draft_path else None
    if setup.drafter:
        draft = drafter.DRAFTERS[setup.drafter]()
    rule = setup.rule or "none"
    return lambda compile: Engine(models[0], draft, rule=rule, speculate_k=setup.speculate_k,
                                  max_seq_length=max_seq_length, tokenizer=setup.tokenizer,
                                  compile=compile)


def compile_for(engine: Engine, options: dict, rules: list[str]) -> None:
    """Compile what the rules need; says on stderr what takes time."""
    setup_compiler(engine.device, engine.shard.world)
    say(f"compiling {', '.join(rules)} (a minute or so the first time, seconds once cached) ...",
        end=" ")
    options = {key: options[key] for key in ("temperature", "top_k")}
    say(f"done in {engine.warmup(**options, rules=tuple(rules)):.0f} s")


def compare(engine: Engine, ids: list[int], options: dict, rules: list[str]) -> list[dict]:
    """The statistics of each rule's median run; in turns, so that a busy moment meets all."""
    say(f"timing {', '.join(rules)}: {COMPARE_RUNS} runs of each, in turns ...")
    runs: dict[str, list[dict]] = {rule: [] for rule in rules}
    for _ in range(COMPARE_RUNS):
        for rule in rules:
            deque(engine.generate(ids, **options, rule=rule), maxlen=0)
            runs[rule].append(engine.stats)
    return [sorted(each, key=lambda s: s["seconds"])[COMPARE_RUNS // 2] for each in runs.values()]


def run(args: argparse.Namespace, setup: Setup, shard: tp.Shard) -> None:
    """What remains to be done once everything that can be checked early was."""
    request, prompt = setup.request, terminal.prompt_of(args)
    ids = setup.tokenizer.encode_prompt(prompt, raw=args.raw, system=args.system)
    length = min(setup.context, 8192)
    if not args.interactive:
        new = request.room(len(ids), setup.context)
        length = min(setup.context, -(-(len(ids) + new) // 128) * 128)  # few, so few compilations
        request = Request(new, request.temperature, request.top_k, request.seed)
    options = vars(request)
    make = load_engines(setup, shard, length)
    rule = setup.rule.name if setup.rule else "none"
    engine = make(setup.compile and not setup.compare)
    if engine.compiled:
        compile_for(engine, options, [rule])
    with terminal.profile(args.profile, shard):
        if args.interactive:
            samples = terminal.chat(engine, options, args.system)
        else:
            samples = terminal.show_answers(engine, ids, options, prompt, args.num_samples)
    shown = samples
    if setup.compare:  # the answer was shown at once, uncompiled; the table is of compiled runs
        rules = list(dict.fromkeys(("none", "exact", rule)))
        if setup.compile:
            engine = make(True)
            compile_for(engine, options, rules)
        shown = compare(engine, ids, options, rules)
        samples[0] = shown[-1] | {"prompt": prompt}
    terminal.write_json(args.json, samples, shard)
    terminal.print_table(shown)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return terminal.parse_args(argv, __doc__, SPECULATE_K, tuple(drafter.DRAFTERS))


def main(args: argparse.Namespace) -> None:
    """Run the command line; ValueError and OSError are a user's mistakes."""
    request = Request(args.max_new_tokens, args.temperature, args.top_k, args.seed)
    setup = Setup.from_args(args, request)
    shard = tp.start(setup.device, check=args.check_ranks)
    terminal.only_first_rank_speaks(shard)
    try:
        run(args, setup, shard)
    finally:
        if sys.exc_info()[0] is None:  # else other ranks may never come to meet this one
            tp.stop()


if __name__ == "__main__":
    terminal.run_main(lambda: main(parse_args()), "generate.py")
