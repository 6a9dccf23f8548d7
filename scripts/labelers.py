"""Labels without annotators: which tokens of an answer are right, found by running the pair.

A labeler yields `Example`s of one prompt: an answer's tokens, and labels for some of them. All
decode greedily but for rollouts, and each answer ends at a stop token or has no result.

swap (AutoJudge, arXiv 2504.20039, Algorithm 1): along the target's answer, put the draft's token
    where it differs, let the target go on, and compare the results: right if the same (and then the
    answer goes on from there). It asks what the target can recover from, at a rollout a label.
likelihood (SelfJudge, arXiv 2510.02329): how much less likely the target finds the draft's token
    than its own, and its own next N tokens once that stands before them. N + 1 tokens read a label;
    needs no check. Our addition: along the draft's answer, too, where one pass labels all.
bisect: of the draft's wrong answers, the first token after which the share of sampled rollouts of
    the target that still come out right falls below half of what it was: log2(n) batches of
    rollouts an answer. Of the draft's right answers every token is right.
corrupt: the draft's right answers with one number, operator or name replaced by what the draft
    finds likeliest of the same kind. No target tokens; an augmentation.

likelihood's threshold lets a tenth of what swap found wrong pass (label.py --tau_quantile 0.9;
notes on the paper say the 0.1 quantile, which would let nine tenths pass).

Shapes: B rollouts, S tokens read, N horizon, V vocabulary. Stop tokens get no label: the judge has
no say there. Counts: `decoded` target tokens written, `read` target tokens read in passes of many.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Callable, Hashable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from drafter import PREFILL_CHUNK, device_step
from generate import Engine
from judge import greedy, probs, sample
from model import Transformer
from scripts.answers import Prompt
from scripts.jobs import PairSetup
from tokenizer import Tokenizer

NOT_FINITE = "the target's logits are not finite (NaN or infinity); try another --dtype"


class Label(NamedTuple):
    """One token of an answer: right or not, and how that was found."""

    token: int  # its index in the response
    right: bool | None  # None: the score decides, once the threshold τ is known
    labeler: str
    score: float | None = None  # likelihood's s; bisect's share of right rollouts after the token
    rollouts: int = 0  # of the target, that this label took


class Example(NamedTuple):
    """An answer, or the beginning of one, and labels for some of its tokens."""

    response: list[int]
    labels: list[Label]


def rollout_step(model: Transformer, tokens: Tensor, input_pos: Tensor, temperature: Tensor,
                 exponentials: Tensor, *, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A token for each of B rollouts: tokens [B, 1] at input_pos [1], e [B, V] -> [B], top [B]."""
    hidden = model(tokens, input_pos, rows)[:, -1]  # [B, D]
    logits = model.shard.gather(model.logits(hidden).float())
    return sample(probs(logits, temperature), exponentials), logits.amax(-1)


def log_prob_step(model: Transformer, tokens: Tensor, input_pos: Tensor, chosen: Tensor, *,
                  rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [1, S] at input_pos [S], chosen [S, C] -> log P(chosen next) [S, C], that of the
    argmax [S], and the argmax [S]."""
    hidden = model(tokens, input_pos, rows)[0]
    found = model.shard.gather(model.logits(hidden).float()).log_softmax(-1)  # [S, V]
    return found.gather(1, chosen), found.amax(-1), found.argmax(-1)


class Pair:
    """Target and draft over one pair of caches, and every way in which labelers run them."""

    def __init__(self, target: Transformer, draft: Transformer, setup: PairSetup, length: int, *,
                 rollouts: int = 8, temperature: float = 0.7, horizon: int = 20):
        self.target, self.draft, self.tokenizer = target, draft, setup.tokenizer
        self.rollouts, self.horizon = rollouts, horizon
        self.length, self.limit = length, setup.max_new_tokens  # of prompt and answer; of answers
        rows = length + max(2 * (setup.speculate_k + 1) + 1, horizon + 2)
        target.setup_caches(rollouts, rows)  # the engine runs in row 0 of the batch
        options = {"speculate_k": setup.speculate_k, "max_seq_length": length,
                   "tokenizer": setup.tokenizer, "compile": setup.compile}
        self.engine = Engine(target, draft, rule="exact", **options)
        self.stop_tokens = self.engine.stop_tokens
        self.draft_alone = Engine(draft, stop_tokens=self.stop_tokens, **options)
        self.silent = {*self.stop_tokens, *setup.tokenizer.special_tokens.values()}
        self.step = device_step(rollout_step, target, setup.compile)
        self.score = device_step(log_prob_step, target, setup.compile)
        self.score_once = device_step(log_prob_step, target, False)
        self.temperature = torch.tensor(temperature, device=target.device)
        self.generator = torch.Generator(target.device)
        self.decoded = self.read = 0

    def target_answer(self, ids: list[int], room: int, *, keep: bool) -> list[int]:
        """The target's greedy continuation of ids by exact speculation, `room` tokens at most.

        keep: what the cache holds of ids is not read again.
        """
        cached = self.target.cached if keep else []
        answer = self._run(self.engine, ids, room, keep)
        self.decoded += len(answer)
        self.read += len(ids) - _common(ids[:-1], cached)
        return answer

    def draft_answer(self, ids: list[int], room: int) -> list[int]:
        """The draft's own greedy answer."""
        return self._run(self.draft_alone, ids, room, False)

    def _run(self, engine: Engine, ids: list[int], room: int, keep: bool) -> list[int]:
        for _ in engine.generate(ids, max_new_tokens=room, keep_cache=keep):
            pass
        return engine.stats["tokens"]

    @torch.no_grad()
    def own_logits(self, ids: list[int], start: int) -> Tensor:
        """The draft's logits [S, V] of the positions start..len(ids)-1, after what precedes each.

        In one pass without a cache, uncompiled: a length comes once. Columns are this rank's.
        """
        draft = self.draft
        with draft.uncompiled_parts():
            hidden = draft(torch.tensor([ids], device=draft.device))[0, start - 1:-1]
            return draft.logits(hidden)

    def draft_logits(self, ids: list[int], start: int) -> Tensor:
        """The same, whole rows on every rank."""
        return self.draft.shard.gather(self.own_logits(ids, start))

    def favourites(self, ids: list[int], start: int) -> list[int]:
        """The draft's argmax for each position start..len(ids)-1."""
        logits = self.own_logits(ids, start)
        return greedy(logits, self.draft.shard, self.draft.first_token)[0].tolist()

    @torch.no_grad()
    def log_probs(self, ids: list[int], begin: int, chosen: list[list[int]]) -> tuple:
        """Read ids from `begin` on: log P(chosen), lists of [C]; that of the argmax; the argmax.

        Entry i is of the token after ids[begin + i]. What was before `begin` must be in the cache.
        """
        device, found = self.target.device, ([], [], [])
        positions = torch.arange(begin, len(ids), device=device)
        tokens, chosen = torch.tensor(ids[begin:], device=device), torch.tensor(chosen).to(device)
        fixed = len(tokens) == self.horizon + 1  # one shape, worth compiling; others come once
        step = self.score if fixed else self.score_once
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = slice(start, start + PREFILL_CHUNK)
            with contextlib.nullcontext() if fixed else self.target.uncompiled_parts():
                parts = step(self.target, tokens[chunk][None], positions[chunk], chosen[chunk])
            for one, part in zip(found, parts):
                one.extend(part.tolist())
            if not parts[1].isfinite().all():
                raise FloatingPointError(NOT_FINITE)
        self.read += len(tokens)
        self.target.cached = ids
        return found

    @torch.no_grad()
    def sample_answers(self, ids: list[int], room: int, seed: int) -> list[list[int]]:
        """B sampled continuations of ids by the target, as one batch over one prefill.

        They share positions, so the prefix is read once and its cache rows are copied to all B.
        """
        model, B = self.target, self.rollouts
        self.read += len(ids) - 1 - _common(ids[:-1], model.cached)
        self._read_prefix(ids[:-1])
        for layer in model.layers if len(ids) > 1 else ():
            for rows in (layer.self_attn.cache.k, layer.self_attn.cache.v):
                rows[1:B, :, :len(ids) - 1] = rows[:1, :, :len(ids) - 1]
        tokens = torch.tensor(ids[-1:] * B, device=model.device)
        self.generator.manual_seed(seed)
        answers: list[list[int]] = [[] for _ in range(B)]
        vocabulary = model.config.vocab_size
        for position in range(len(ids) - 1, len(ids) - 1 + room):
            e = torch.empty(B, vocabulary, device=model.device).exponential_(
                generator=self.generator)
            tokens, top = self.step(model, tokens[:, None],
                                    torch.tensor([position], device=model.device),
                                    self.temperature, e)
            if not top.isfinite().all():
                raise FloatingPointError(NOT_FINITE)
            for answer, token in zip(answers, tokens.tolist()):
                if not (answer and answer[-1] in self.stop_tokens):
                    answer.append(token)
                    self.decoded += 1
            if all(answer[-1] in self.stop_tokens for answer in answers):
                break
        return answers

    def _read_prefix(self, ids: list[int]) -> None:
        """Bring row 0 of the target's cache to hold ids."""
        model = self.target
        begin = _common(ids, model.cached)
        if begin < len(ids):
            self.engine.read(torch.tensor(ids, device=model.device), begin, None, None, None)
        model.cached = ids

    def text(self, response: list[int]) -> str:
        return self.tokenizer.decode(response, skip_special=True)

    def finished(self, response: list[int]) -> bool:
        return bool(response) and response[-1] in self.stop_tokens


def _common(a: list[int], b: list[int]) -> int:
    """Length of the beginning that two lists share."""
    return len(os.path.commonprefix((a, b)))


class Task:
    """One prompt under work: what several labelers need of it is made once, when first asked for.

    check: text -> what is compared; None where no labeler needs one. `notes` says what was left
    out. Costs of target's and draft's own answers are counted apart, under "answers".
    """

    def __init__(self, pair: Pair, prompt: Prompt, check: Callable[[str], Hashable | None] | None,
                 *, seed: int, score_swaps: bool = False):
        self.pair, self.prompt, self.check, self.seed = pair, prompt, check, seed
        self.score_swaps = score_swaps  # swap's tokens get likelihood's score, to find τ by
        self.ids = pair.tokenizer.encode_prompt(prompt.text, system=prompt.system)
        self.room = min(pair.limit, pair.length - len(self.ids))  # for an answer
        self.notes: list[str] = []
        self.answers_cost = [0, 0]  # decoded, read

    def result(self, response: list[int]) -> Hashable | None:
        """What is compared of an answer; None for one that did not end or says nothing."""
        return self.check(self.pair.text(response)) if self.pair.finished(response) else None

    @cached_property
    def target_answer(self) -> list[int]:
        """The target's own greedy answer, its stop token included."""
        before = self.pair.decoded, self.pair.read
        answer = self.pair.target_answer(self.ids, self.room, keep=False)
        self.answers_cost = [self.pair.decoded - before[0], self.pair.read - before[1]]
        return answer

    @cached_property
    def draft_answer(self) -> list[int]:
        return self.pair.draft_answer(self.ids, self.room)

    @cached_property
    def right(self) -> Hashable | None:
        """The right result: the reference's where the prompt has one, else the target's own."""
        if self.prompt.answer is not None:
            return self.check(self.prompt.answer)
        return self.result(self.target_answer)

    def strip(self, response: list[int]) -> list[int]:
        """Without the stop token that ends it."""
        return response[:-1] if self.pair.finished(response) else response

    def all_right(self, response: list[int], labeler: str) -> Example:
        """Every token of an answer that came out right."""
        response = self.strip(response)
        return Example(response, [Label(i, True, labeler) for i, token in enumerate(response)
                                  if token not in self.pair.silent])


def swap(task: Task) -> Iterator[Example]:
    """AutoJudge's Algorithm 1; right swaps stay in the answer, which goes on from there."""
    pair, y, answer = task.pair, task.target_answer, task.result(task.target_answer)
    if answer is None:
        task.notes.append("the target's own answer has no result")
        return
    favourites, left = pair.favourites([*task.ids, *y], len(task.ids)), 0
    right: list[Label] = []
    while True:
        i = next((i for i in range(left, min(len(y), task.room - 1)) if favourites[i] != y[i]
                  and favourites[i] not in pair.silent), None)
        if i is None:
            break
        swapped, score = [*y[:i], favourites[i]], None
        if task.score_swaps:
            score = scores(task, y, {i: favourites[i]})[i]
        swapped += pair.target_answer([*task.ids, *swapped], task.room - i - 1, keep=True)
        if task.result(swapped) == answer:
            y = swapped
            right.append(Label(i, True, "swap", score, rollouts=1))
            favourites = pair.favourites([*task.ids, *y], len(task.ids))
        else:
            yield Example(swapped[:i + 1], [Label(i, False, "swap", score, rollouts=1)])
        left = i + 1
    yield Example(task.strip(y), right)


def scores(task: Task, y: list[int], drafted: dict[int, int]) -> dict[int, float]:
    """SelfJudge's s for the tokens `drafted`, by their place in the answer y.

    s = log P(d | y<i) - log P(y_i | y<i) + sum over the next N of
        [log P(y_j | ... d ...) - log P(y_j | y<j)]
    Places are taken from the last to the first: the cache before each still holds y.
    """
    pair, n, N = task.pair, len(task.ids), task.pair.horizon
    ids, first, last = [*task.ids, *y], min(drafted), max(drafted)
    # the row before y[j] knows of y[j]: rows from that of `first` to that N after `last`
    read = ids[:min(n + last + N, len(ids) - 1)]
    begin = min(_common(read[:-1], pair.target.cached), n + first - 1)
    chosen = [[ids[row + 1], drafted.get(row + 1 - n, 0)] for row in range(begin, len(read))]
    base = dict(zip(range(begin + 1 - n, len(ids)), pair.log_probs(read, begin, chosen)[0]))
    found = {}
    for i in sorted(drafted, reverse=True):
        found[i] = base[i][1] - base[i][0]
        after = y[i + 1:i + 1 + N]
        if not after:
            continue
        padding = [0] * (N - len(after))  # one shape, read in vain
        rows = pair.log_probs([*ids[:n + i], drafted[i], *after, *padding], n + i,
                              [[token] for token in (*after, *padding, 0)])[0]
        found[i] += sum(rows[j][0] - base[i + 1 + j][0] for j in range(len(after)))
    return found


class Likelihood:
    """SelfJudge's score for the draft's tokens. along: whose answer they stand in.

    target: where the draft would differ from the target's own answer, as published. draft: where
    the target would differ from the draft's own answer, up to the first wrong token, which is what
    a judge reads in use; there is no other continuation to compare with, so the horizon is 0, and
    nothing is decoded by the target at all.
    """

    def __init__(self, along: str = "target"):
        self.along = along

    def __call__(self, task: Task) -> Iterator[Example]:
        if self.along in ("target", "both"):
            yield from self.along_target(task)
        if self.along in ("draft", "both"):
            yield from self.along_draft(task)

    def along_target(self, task: Task) -> Iterator[Example]:
        pair, y = task.pair, task.target_answer
        favourites = pair.favourites([*task.ids, *y], len(task.ids))
        drafted = {i: d for i, (d, t) in enumerate(zip(favourites, y)) if d != t
                   and d not in pair.silent}
        for i, score in sorted(scores(task, y, drafted).items()) if drafted else ():
            yield Example([*y[:i], drafted[i]], [Label(i, None, "likelihood", score=score)])

    def along_draft(self, task: Task) -> Iterator[Example]:
        pair, z, n = task.pair, task.draft_answer, len(task.ids)
        chosen = [*[[0]] * (n - 1), *([token] for token in z)]
        own, best, argmax = pair.log_probs([*task.ids, *z[:-1]], 0, chosen)
        labels = [Label(i, None, "likelihood", score=own[row][0] - best[row])
                  for i, row in enumerate(range(n - 1, n - 1 + len(z)))
                  if argmax[row] != z[i] and z[i] not in pair.silent]
        yield Example(task.strip(z), labels)


def bisect(task: Task) -> Iterator[Example]:
    """The first token of the draft's wrong answer that the target no longer recovers from."""
    pair, z, n = task.pair, task.draft_answer, len(task.ids)
    if task.right is None:
        task.notes.append("no right result is known")
        return
    if task.result(z) == task.right:
        yield task.all_right(z, "bisect")
        return
    argmax = pair.log_probs([*task.ids, *z[:-1]], 0, [[0]] * (n + len(z) - 1))[-1]
    places = [i for i, token in enumerate(z) if argmax[n - 1 + i] != token]
    if not places or not pair.finished(z):
        task.notes.append("the draft's answer did not end" if places else
                          "the target would have written the draft's wrong answer")
        return
    rollouts = 0

    def share(length: int) -> float:
        nonlocal rollouts
        if pair.finished(z[:length]):  # its last place is where it stops, wrong
            return 0.0
        rollouts += pair.rollouts
        seed = random.Random(f"{task.seed}:{length}").getrandbits(62)
        answers = pair.sample_answers([*task.ids, *z[:length]], task.room - length, seed)
        return sum(task.result([*z[:length], *one]) == task.right
                   for one in answers) / pair.rollouts

    high, at = share(0), len(places) - 1
    low = share(places[at] + 1)
    if low >= high / 2:
        task.notes.append("the target recovers from all of the draft's answer" if high else
                          "the target never came out right")
        return
    begin = -1  # index of the last place after which the share is still high
    while at - begin > 1:
        middle = (begin + at) // 2
        now = share(places[middle] + 1)
        if now < high / 2:
            at, low = middle, now
        else:
            begin, high = middle, now
    c = places[at]
    labels = [Label(i, True, "bisect") for i, token in enumerate(z[:c]) if token not in pair.silent]
    if z[c] not in pair.silent:
        labels.append(Label(c, False, "bisect", score=low, rollouts=rollouts))
    yield Example(z[:c + 1], labels)


NUMERALS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
            "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy "
            "eighty ninety").split()
KINDS = {  # of one kind no two mean the same
    "digits": re.compile(r"\d+"), "numeral": re.compile("|".join(NUMERALS)),
    "operator": re.compile(r"[-+*/]"), "operation": re.compile("plus|minus|times")}
NAME = re.compile(r" [A-Z][a-z]+")


def kinds(tokenizer: Tokenizer) -> dict[int, tuple]:
    """Token id -> (which of KINDS, whether a space begins it), for the tokens that are one."""
    found = {}
    special = set(tokenizer.special_tokens.values())
    for token in (i for i in range(tokenizer.vocab_size) if i not in special):
        text = tokenizer.token_bytes(token).decode(errors="replace")
        for kind, pattern in KINDS.items():
            if pattern.fullmatch(text.strip(" ")):
                found[token] = kind, text.startswith(" ")
    return found


def names(task: Task) -> dict[int, tuple]:
    """The capitalised words within the prompt's sentences, as `kinds` has others."""
    texts = [task.pair.tokenizer.token_bytes(i).decode(errors="replace") for i in task.ids]
    return {task.ids[i]: ("name", True) for i in range(1, len(texts))
            if NAME.fullmatch(texts[i]) and re.search(r"[\w,;]$", texts[i - 1])}


class Corrupt:
    """Right answers with one number, operator or name replaced by the draft's likeliest other.

    A name is replaced by another of the prompt's. Where both orders are right ("two plus three"),
    the label is not: labels are near-exact.
    """

    def __init__(self, count: int = 2):
        self.count = count  # corruptions an answer
        self.kinds: dict[int, tuple] | None = None

    def __call__(self, task: Task) -> Iterator[Example]:
        pair, z = task.pair, task.draft_answer
        if task.right is None or task.result(z) != task.right:
            task.notes.append("the draft's answer is not right: nothing to corrupt")
            return
        yield task.all_right(z, "corrupt")
        if self.kinds is None:
            self.kinds = kinds(pair.tokenizer)
        known = self.kinds | names(task)
        places = [i for i, token in enumerate(z) if token in known]
        logits = pair.draft_logits([*task.ids, *z], len(task.ids))
        for i in sorted(random.Random(task.seed).sample(places, min(self.count, len(places)))):
            others = [token for token, kind in known.items()
                      if kind == known[z[i]] and token != z[i]
                      and not same_digits(pair.tokenizer, token, z[i])]
            if others:
                other = others[int(logits[i, others].argmax())]
                yield Example([*z[:i], other], [Label(i, False, "corrupt")])


def same_digits(tokenizer: Tokenizer, a: int, b: int) -> bool:
    """Whether two tokens spell one number in digits, as 7 and 07 do."""
    first, second = (tokenizer.token_bytes(token).strip() for token in (a, b))
    return first.isdigit() and second.isdigit() and int(first) == int(second)


LABELERS: dict[str, Callable[..., Callable[[Task], Iterator[Example]]]] = {
    "swap": lambda args: swap, "likelihood": lambda args: Likelihood(args.along),
    "bisect": lambda args: bisect, "corrupt": lambda args: Corrupt(args.corruptions)}
NEED_CHECK = {"swap", "bisect", "corrupt"}
