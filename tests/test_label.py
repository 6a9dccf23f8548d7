"""scripts/label.py: each labeler by its definition, what is written, and runs that are cut short.

Where a test says "planted", that mistake was once put into a copy of the sources, and it failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_tp import finished, torchrun

import model
import terminal
import tp
import train_head
from checkpoint import ModelConfig
from model import Transformer
from quantize import quantize_checkpoint
from scripts import label
from scripts.answers import CHECKS, Prompt
from scripts.demo_pair import NUMBERS, problem_at
from scripts.jobs import Journal, PairSetup
from scripts.labelers import (
    LABELERS,
    Corrupt,
    Example,
    Label,
    Likelihood,
    Pair,
    Task,
    bisect,
    scores,
    swap,
)
from terminal import DEMO
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
STOP, SPECIAL, BOS = 0, 98, 99


# ---- pairs whose models are functions: the response so far -> the next token

class Numerals:
    """Token n spells the number n; STOP, SPECIAL and BOS are no text."""

    special_tokens = {"<special>": SPECIAL, "<bos>": BOS}

    def encode_prompt(self, prompt: str, *, system: str | None = None) -> list[int]:
        return [BOS]

    def decode(self, ids, *, skip_special: bool = False) -> str:
        return " ".join(str(token) for token in ids if token not in (STOP, SPECIAL, BOS))


class Scripted(Pair):
    """A Pair without weights, which checks that it is asked what a real one could answer."""

    def __init__(self, target, draft, *, rollout=None, limit: int = 8, rollouts: int = 4):
        self.target_function, self.draft_function = target, draft
        self.rollout_function = rollout  # response so far, row -> the next token
        self.tokenizer, self.stop_tokens, self.silent = Numerals(), (STOP,), {STOP, SPECIAL, BOS}
        self.limit, self.length, self.rollouts, self.horizon = limit, limit + 1, rollouts, 0
        self.decoded = self.read = 0

    def go_on(self, function, ids: list[int], room: int) -> list[int]:
        assert ids[0] == BOS and 1 <= room and len(ids) + room <= self.length
        response, start = ids[1:], len(ids) - 1
        while len(response) - start < room and (response[start:] or [1])[-1] != STOP:
            response.append(function(tuple(response)))
        return response[start:]

    def target_answer(self, ids, room, *, keep):
        return self.go_on(self.target_function, ids, room)

    def draft_answer(self, ids, room):
        return self.go_on(self.draft_function, ids, room)

    def favourites(self, ids, start):
        return [self.draft_function(tuple(ids[1:i])) for i in range(start, len(ids))]

    def log_probs(self, ids, begin, chosen):
        assert len(chosen) == len(ids) - begin
        argmax = [self.target_function(tuple(ids[1:i + 1])) for i in range(begin, len(ids))]
        return [[0.0] * len(each) for each in chosen], [0.0] * len(chosen), argmax

    def sample_answers(self, ids, room, seed):
        if room < 1:
            return [[] for _ in range(self.rollouts)]
        return [self.go_on(lambda response, row=row: self.rollout_function(response, row), ids,
                           room) for row in range(self.rollouts)]


def last_number(text: str) -> str | None:
    return text.split()[-1] if text else None


def task_of(pair: Pair, answer: str | None = None, **options) -> Task:
    return Task(pair, Prompt("?", answer=answer), last_number, seed=3, **options)


def script(table: dict[tuple, int], otherwise):
    return lambda response: table.get(response, otherwise(response))


def by_prefix(found: list[Example]) -> dict[tuple, bool]:
    """Labels by the response up to the token, the token included."""
    labels = {}
    for response, some in found:
        for each in some:
            prefix = tuple(response[:each.token + 1])
            assert len(prefix) == each.token + 1 and prefix not in labels
            labels[prefix] = each.right
    return labels


# ---- swap

def test_swap_on_a_case_worked_by_hand():
    """The target writes 1 2 3 4. Its result is 4, and what follows was worked out on paper:

    5 for 1: it goes on 6 4, the result is the same: right, and the answer is now 5 6 4.
    7 for 6: it goes on 9: wrong. A stop for 4: no swap. 8 for the stop: 8 8, never ends: wrong.
    """
    target = script({(): 1, (1,): 2, (1, 2): 3, (1, 2, 3): 4, (5,): 6, (5, 6): 4, (5, 7): 9,
                     (5, 6, 4, 8): 8, (5, 6, 4, 8, 8): 8}, lambda response: STOP)
    draft = script({(): 5, (5,): 7, (5, 6): STOP, (5, 6, 4): 8}, lambda response: 1)
    found = list(swap(task_of(Scripted(target, draft, limit=6))))
    assert found == [
        Example([5, 7], [Label(1, False, "swap", rollouts=1)]),
        Example([5, 6, 4, 8], [Label(3, False, "swap", rollouts=1)]),
        Example([5, 6, 4], [Label(0, True, "swap", rollouts=1)])]


def test_swap_ends_where_the_answer_does():
    """4 for 2 ends the answer 1 2 3 4 early and rightly: of what was behind it nothing is left."""
    target = script({(): 1, (1,): 2, (1, 2): 3, (1, 2, 3): 4}, lambda response: STOP)
    draft = script({(): 1, (1,): 4}, lambda response: STOP)
    found = list(swap(task_of(Scripted(target, draft, limit=5))))
    assert found == [Example([1, 4], [Label(1, True, "swap", rollouts=1)])]


def test_swap_leaves_special_tokens_and_the_last_place_alone():
    """A special token is no proposal, and behind the last place there is no room to go on."""
    target = script({(): 1, (1,): 2, (1, 2): 4}, lambda response: STOP)
    draft = script({(): SPECIAL, (1,): 2, (1, 2): 4, (1, 2, 4): 7}, lambda response: 1)
    found = list(swap(task_of(Scripted(target, draft, limit=4))))
    assert found == [Example([1, 2, 4], [])]


@pytest.mark.parametrize("write", [lambda response: 1, lambda response: STOP])
def test_swap_needs_a_result_of_the_target(write):
    """Of an answer that never ends, or that says nothing, there is a note alone."""
    task = task_of(Scripted(write, lambda response: 2))
    assert not list(swap(task)) and task.notes == ["the target's own answer has no result"]


def algorithm_1(target, draft, room: int) -> dict[tuple, bool]:
    """AutoJudge's Algorithm 1 as the paper writes it, everything anew at each step."""

    def complete(response):
        response = list(response)
        while len(response) < room and not (response and response[-1] == STOP):
            response.append(target(tuple(response)))
        return response

    def parse(response):
        said = [token for token in response if token not in (STOP, SPECIAL)]
        return said[-1] if response[-1] == STOP and said else None

    y, left, labels = complete([]), 0, {}
    answer = parse(y)
    if answer is None:
        return {}
    while True:
        mismatches = [i for i, token in enumerate(y) if i >= left and i < room - 1
                      and draft(tuple(y[:i])) not in (token, STOP, SPECIAL)]
        if not mismatches:
            return labels
        i = mismatches[0]
        swapped = [*y[:i], draft(tuple(y[:i]))]
        rewritten = complete(swapped)
        labels[tuple(swapped)] = same = parse(rewritten) == answer
        if same:
            y = rewritten
        left = i + 1


def random_pair(seed: int):
    """A target and a draft that agree two times of three; few results, so that many are the same"""
    def target(response):
        draw = random.Random(f"{seed} target {response}")
        return draw.choice((STOP, STOP, 1, 1, 1, 1, 1, 2, SPECIAL))

    def draft(response):
        draw = random.Random(f"{seed} draft {response}")
        return target(response) if draw.random() < 0.6 else draw.choice((STOP, 1, 2, 2, SPECIAL))

    return target, draft


def test_swap_is_algorithm_1_on_random_pairs():
    """Planted: left = i + 2, the answer not replaced, favourites not asked anew."""
    kinds = {True: 0, False: 0}
    for seed in range(800):
        target, draft = random_pair(seed)
        found = by_prefix(list(swap(task_of(Scripted(target, draft, limit=9)))))
        assert found == algorithm_1(target, draft, 9), seed
        for right in found.values():
            kinds[right] += 1
    assert min(kinds.values()) > 100


# ---- likelihood

def make_setup(target: Path, draft: Path, *, new: int = 40, K: int = 4) -> PairSetup:
    return PairSetup(target, draft, Tokenizer.from_checkpoint(target), torch.device("cpu"),
                     torch.float32, 512, False, K, new)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint) -> SimpleNamespace:
    """Two random float32 models that disagree nearly everywhere."""
    target, draft = tiny_checkpoint(), tiny_checkpoint(seed=1, hidden_size=32,
                                                       intermediate_size=64)
    setup = make_setup(target, draft)
    models = setup.load(tp.Shard())

    def pair(**options) -> Pair:
        return Pair(*models, setup, 128, **options)

    return SimpleNamespace(path=target, models=models, setup=setup, pair=pair)


def add_noise(pair: Pair, size: float = 1e3) -> None:
    """Large finite noise into every cache row: what is dead must not matter."""
    generator = torch.Generator().manual_seed(8)
    for each in (pair.target, pair.draft):
        for layer in each.layers:
            for rows in (layer.self_attn.cache.k, layer.self_attn.cache.v):
                rows.copy_(size * torch.randn(rows.shape, generator=generator))
        each.cached = []


@torch.no_grad()
def log_softmax(model_: Transformer, ids: list[int]) -> torch.Tensor:
    """log P [len(ids), V] by one whole uncached pass."""
    return model_.logits(model_(torch.tensor([ids]))[0]).log_softmax(-1)


def direct_scores(model_: Transformer, ids: list[int], y: list[int], drafted: dict[int, int],
                  horizon: int) -> dict[int, float]:
    """SelfJudge's s by its formula: for each place one whole pass over ids, y<i, d, y>i."""
    n, base = len(ids), log_softmax(model_, [*ids, *y])
    found = {}
    for i, d in drafted.items():
        other = log_softmax(model_, [*ids, *y[:i], d, *y[i + 1:]])
        places = range(i + 1, min(i + 1 + horizon, len(y)))
        found[i] = float(base[n + i - 1, d] - base[n + i - 1, y[i]] + sum(
            other[n + j - 1, y[j]] - base[n + j - 1, y[j]] for j in places))
    return found


@contextlib.contextmanager
def norms_in_full():
    """RMSNorm in the precision of its input; model.py's takes the mean square in float32."""
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.RMSNorm, "forward", forward)
        yield


@pytest.mark.parametrize("horizon", [0, 1, 5, 20])
def test_likelihood_is_its_formula_in_float64(tiny, horizon):
    """For a wrong token at every place of an answer, to its end; several places, one, and again.

    The tolerance is what whole float32 passes are off, times four. Planted: base[i + j] for
    base[i + 1 + j]; a horizon one short; places from first to last; a cache trusted or not noted.
    """
    pair = tiny.pair(horizon=horizon)
    add_noise(pair)
    task = Task(pair, Prompt("How many apples has Tom?"), None, seed=0)
    generator = torch.Generator().manual_seed(4)
    y = torch.randint(0, 456, (32,), generator=generator).tolist()
    drafted = {i: (token + 1 + i) % 456 for i, token in enumerate(y)}
    with norms_in_full():
        double = Transformer.from_checkpoint(tiny.path, dtype=torch.float64)
        expected = direct_scores(double, task.ids, y, drafted, horizon)
    single = direct_scores(tiny.models[0], task.ids, y, drafted, horizon)
    tolerance = 4 * max(abs(single[i] - expected[i]) for i in drafted)
    assert tolerance < 1e-2 < min(abs(s) for s in expected.values())
    for some in (list(drafted), [7], [3, 9, 30], [len(y) - 1], [0], [5, 6, 7], list(drafted)):
        found = scores(task, y, {i: drafted[i] for i in some})
        assert found.keys() == set(some)
        assert max(abs(found[i] - expected[i]) for i in some) <= tolerance
    pair._read_prefix([*task.ids, *y[:-1]])  # as after the target's own answer
    for i in (7, 31, 7, 9, 0):
        found = scores(task, y, {i: drafted[i]})
        assert abs(found[i] - expected[i]) <= tolerance


def test_likelihood_labels_every_token_that_the_draft_would_have_put(tiny):
    pair = tiny.pair(horizon=5)
    task = Task(pair, Prompt("How many apples?"), None, seed=0)
    y = task.target_answer
    with torch.no_grad():
        logits = pair.draft.logits(pair.draft(torch.tensor([[*task.ids, *y]]))[0])
    favourites = logits[len(task.ids) - 1:-1].argmax(-1).tolist()
    places = {i: d for i, d in enumerate(favourites) if d != y[i] and d not in pair.silent}
    found = list(Likelihood()(task))
    assert len(y) == 40 and len(places) > 10
    assert [example.response for example in found] == [[*y[:i], d] for i, d in places.items()]
    expected = direct_scores(pair.target, task.ids, y, places, 5)
    for (_, (each,)), i in zip(found, places):
        assert each[:3] == (i, None, "likelihood") and each.rollouts == 0
        assert each.score == pytest.approx(expected[i], abs=1e-3)


def test_likelihood_says_when_all_agree(tiny):
    pair = Pair(tiny.models[0], tiny.models[0], tiny.setup, 128)
    task = Task(pair, Prompt("How many apples?"), None, seed=0)
    assert not list(Likelihood()(task)) and pair.read == len(task.ids) - 1 + 1


def test_swap_with_scores_has_likelihoods_and_the_swaps_of_one_without(tiny):
    """Scores overwrite cache rows that the swap's own rollout then must not trust."""
    def check(text):
        return len(text) % 2

    found = {}
    for score in (False, True):
        pair = tiny.pair(horizon=5)
        pair.stop_tokens = pair.engine.stop_tokens = tuple(range(0, 456, 15))
        pair.engine.stops = torch.tensor(pair.stop_tokens)
        pair.silent |= {*pair.stop_tokens}
        add_noise(pair)
        task = Task(pair, Prompt("And now?"), check, seed=0, score_swaps=score)
        found[score] = list(swap(task))
        assert not task.notes
    plain = [Example(response, [each._replace(score=None) for each in labels])
             for response, labels in found[True]]
    assert plain == found[False]
    assert sum(len(labels) for _, labels in plain) > 3
    assert {each.right for _, labels in plain for each in labels} == {True, False}
    assert all(math.isfinite(each.score) for _, labels in found[True] for each in labels)


# ---- bisect

def planted(n: int, c: int, *, before: float = 1.0, after: float = 0.0) -> Scripted:
    """The draft writes 1 2 .. n and is wrong from token c on; the target wants another everywhere.

    Of rollouts a share `before` come out right (97) from a beginning that ends before c, and a
    share `after` from one that holds c.
    """
    def draft(response):
        return len(response) + 1 if len(response) < n else STOP

    def rollout(response, row):
        if response and response[-1] in (97, 96):
            return STOP
        right = before if len(response) <= c else after
        return 97 if row < right * 8 else 96

    return Scripted(lambda response: 50, draft, rollout=rollout, limit=n + 3, rollouts=8)


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.5, 0.125), (0.25, 0.0)])
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_bisect_finds_a_mistake_planted_anywhere(n, shares):
    """Planted: share(places[middle]), without the token in question; at = middle - 1."""
    for c in range(n):
        pair = planted(n, c, before=shares[0], after=shares[1])
        task = task_of(pair, answer="97")
        (found,) = bisect(task)
        assert found.response == list(range(1, c + 2)) and not task.notes
        assert [each[:3] for each in found.labels] == [
            *((i, True, "bisect") for i in range(c)), (c, False, "bisect")]
        last = found.labels[-1]
        assert last.score in (shares[1], None) and last.rollouts % 8 == 0
        # places: n tokens and the stop, the last of which is never asked
        assert last.rollouts <= 8 * (1 + math.ceil(math.log2(n + 1)))


def test_bisect_takes_half_of_what_it_was_and_not_of_all():
    """From 7 of 8 by 4 (a half at least of 7 of 8) to 2, which is no less than half of 4, to 0."""
    counts = {0: 8, 1: 7, 2: 4, 3: 2, 4: 0, 5: 0}
    pair = planted(5, 9)
    pair.rollout_function = lambda response, row: (
        STOP if response and response[-1] in (97, 96) else
        97 if row < counts[len(response)] else 96)
    (found,) = bisect(task_of(pair, answer="97"))
    # asked: 8 at none, 2 after three tokens falls below half of 8, then 7 after one, 4 after two
    assert found.labels[-1] == Label(2, False, "bisect", score=0.25, rollouts=32)


def test_bisect_of_a_right_answer_labels_all_right():
    pair = planted(4, 0)
    (found,) = bisect(task_of(pair, answer="4"))
    assert found == Example([1, 2, 3, 4], [Label(i, True, "bisect") for i in range(4)])


def test_bisect_only_asks_where_target_and_draft_disagree():
    """The target would have written 1 2 too: the first mistake can only be what it would not."""
    pair = planted(6, 1)
    pair.target_function = lambda response: 50 if len(response) in (2, 4) else len(response) + 1
    (found,) = bisect(task_of(pair, answer="97"))
    assert found.response == [1, 2, 3] and found.labels[-1][:2] == (2, False)


def test_bisect_without_a_right_rollout_or_a_disagreement_has_a_note():
    task = task_of(planted(4, 0, before=0.0), answer="97")
    assert not list(bisect(task)) and task.notes == ["the target never came out right"]
    pair = planted(4, 0)
    pair.target_function = pair.draft_function
    task = task_of(pair, answer="97")
    assert not list(bisect(task))
    assert task.notes == ["the target would have written the draft's wrong answer"]
    task = task_of(Scripted(lambda response: 1, lambda response: 2))  # never ends: no result
    assert not list(bisect(task)) and task.notes == ["no right result is known"]


def test_bisect_of_an_answer_that_does_not_end():
    """Rollouts from late in it fail for lack of room: they would blame a right token."""
    pair = planted(20, 3)
    pair.limit = 6
    pair.length = 7
    task = task_of(pair, answer="97")
    assert not list(bisect(task)) and task.notes == ["the draft's answer did not end"]


def test_bisect_asks_whether_the_target_recovers_from_all():
    """Sampled rollouts may come out right after the last place, too: nothing is blamed then."""
    pair = planted(6, 3, after=1.0)
    pair.target_function = lambda response: len(response) + 1 if len(response) != 4 else 50
    pair.draft_function = script({(1, 2, 3, 4): 9, (1, 2, 3, 4, 9): STOP}, lambda r: len(r) + 1)
    pair.target_function = script({(1, 2, 3, 4, 9): STOP}, pair.target_function)
    task = task_of(pair, answer="97")
    assert not list(bisect(task))
    assert task.notes == ["the target recovers from all of the draft's answer"]


def test_bisect_gives_no_label_to_a_stop_token():
    """The draft only ends too early: all before its stop token is right."""
    pair = planted(4, 4)
    (found,) = bisect(task_of(pair, answer="97"))
    assert found.response == [1, 2, 3, 4, STOP]
    assert found.labels == [Label(i, True, "bisect") for i in range(4)]


# ---- batched rollouts

@torch.no_grad()
def rollouts_alone(pair: Pair, ids: list[int], room: int, seed: int) -> list[list[int]]:
    """Each row by itself and without a cache, by its slice of the same exponentials."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.empty(pair.rollouts, pair.target.config.vocab_size).exponential_(
        generator=generator) for _ in range(room)]
    answers = []
    for row in range(pair.rollouts):
        answer: list[int] = []
        while len(answer) < room and not (answer and answer[-1] in pair.stop_tokens):
            hidden = pair.target(torch.tensor([[*ids, *answer]]))[0, -1]
            p = (pair.target.logits(hidden) / pair.temperature).softmax(-1)
            answer.append(int((p / drawn[len(answer)][row]).argmax()))
        answers.append(answer)
    return answers


def test_batched_rollouts_are_single_ones(tiny):
    """Also after other rollouts, and for a longer beginning of which the first is in the cache.

    Planted: rows copied one too few; one layer's alone; one draw for all; too much noted.
    """
    pair = tiny.pair(rollouts=4, temperature=1.5)
    pair.stop_tokens = tuple(range(0, 456, 20))
    add_noise(pair)
    ids = pair.tokenizer.encode_prompt("How many apples has Tom?")
    longer = [*ids, 17, 230, 44, 98, 301, 5]
    ends = set()
    for some, room, seed in ((ids, 30, 1), (longer, 24, 2), (longer, 24, 3), (ids[:9], 12, 4),
                             (ids[:1], 6, 5), ([*ids[:9], 7, 7], 12, 6), (longer, 1, 7),
                             ([*longer[:-1], 7, 7], 12, 8)):
        before = pair.decoded
        found = pair.sample_answers(some, room, seed)
        assert found == rollouts_alone(pair, some, room, seed)
        assert pair.decoded - before == sum(map(len, found))
        assert all(len(answer) <= room for answer in found) and len(set(map(tuple, found))) > 1
        ends |= {len(answer) < room for answer in found}
    assert ends == {True, False}
    found = pair.sample_answers([*longer, 3], 10, 9)  # all but the last token is in the cache
    fresh = tiny.pair(rollouts=4, temperature=1.5)
    fresh.stop_tokens = pair.stop_tokens
    assert found == fresh.sample_answers([*longer, 3], 10, 9)
    assert fresh.read == len(longer)


def test_reading_counts_what_the_cache_lacks(tiny):
    pair = tiny.pair(rollouts=2)
    pair.sample_answers([300, 1, 2, 3], 4, 0)
    assert pair.read == 3
    pair.sample_answers([300, 1, 2, 3, 4, 5], 4, 0)
    assert pair.read == 5
    pair.sample_answers([300, 1, 9, 3], 4, 0)
    assert pair.read == 6


# ---- corrupt

WORDS = ["<stop>", " two", " three", "two", " plus", " minus", " Ann", " Bob", " has", ".", " Cy",
         "teen", " seventeen", " 12", "+", "Dan"]


class Words(Numerals):
    special_tokens, vocab_size = {"<stop>": STOP}, len(WORDS)

    def token_bytes(self, token: int) -> bytes:
        return b"<bos>" if token == BOS else WORDS[token].encode()

    def decode(self, ids, *, skip_special: bool = False) -> str:
        return "".join(WORDS[token] for token in ids if token != STOP)


def corrupted(z: list[int], count: int, seed: int = 3) -> tuple[list[Example], torch.Tensor]:
    pair = Scripted(lambda response: STOP,
                    lambda response: z[len(response)] if len(response) < len(z) else STOP, limit=12)
    pair.tokenizer, pair.silent = Words(), {STOP}
    logits = torch.randn(len(z) + 1, len(WORDS), generator=torch.Generator().manual_seed(seed))
    pair.draft_logits = lambda ids, start: logits[:len(ids) - start]
    task = Task(pair, Prompt("?", answer="three"), CHECKS["number"], seed=seed)
    assert task.draft_answer == [*z, STOP]
    task.ids = [BOS, 6, 8, 7, 8, 6, 8, 10, 9, 15]  # <bos> Ann has Bob has Ann has Cy.Dan
    return list(Corrupt(count)(task)), logits


def test_corrupt_replaces_by_the_drafts_likeliest_of_the_same_kind():
    """Ann has two plus three. Planted: the least likely, any leading space, the row before."""
    z, places = [6, 8, 1, 4, 2], set()
    same = {6: [7, 10], 1: [2, 12], 4: [5], 2: [1, 12]}  # by kind and leading space
    for seed in range(12):
        (whole, *wrong), logits = corrupted(z, 2, seed)
        assert whole == Example(z, [Label(i, True, "corrupt") for i in range(5)])
        assert len(wrong) == 2 and len({len(response) for response, _ in wrong}) == 2
        for response, labels in wrong:
            i = len(response) - 1
            assert response[:i] == z[:i] and labels == [Label(i, False, "corrupt")]
            assert response[i] == max(same[z[i]], key=lambda token: logits[i, token])
            places.add(i)
    assert places == {0, 2, 3, 4}


def test_corrupt_takes_what_has_another_of_its_kind():
    """`two` and `Dan` without a space before them have no other; neither has what is no word."""
    found, _ = corrupted([15, 8, 3, 9, 2], 50)
    assert [len(response) for response, _ in found] == [5, 5]


def test_corrupt_leaves_wrong_answers_alone():
    pair = Scripted(lambda response: STOP, lambda response: 1 if not response else STOP)
    task = task_of(pair, answer="2")
    assert not list(Corrupt()(task)) and "nothing to corrupt" in task.notes[0]


# ---- lines of the output

@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(DEMO / "target")


def made(tokenizer: Tokenizer, ids: list[int], *labels: Label, tau: float = 0.0,
         system: str | None = None) -> dict:
    return label.record(Prompt("q", system), Example(ids, list(labels)), tokenizer, tau, set())


def test_record_has_spans_of_the_wrong_tokens_alone(tokenizer):
    text = "First, Mia has six."
    ids = tokenizer.encode(text)
    spelled = [tokenizer.token_bytes(token).decode() for token in ids]
    for i, piece in enumerate(spelled):
        begin = len("".join(spelled[:i]))
        line, end = made(tokenizer, ids, Label(i, False, "swap", -2.5, 1)), begin + len(piece)
        assert line == {"prompt": "q", "response": text[:end], "errors": [[begin, end]],
                        "labels": [{"token": i, "right": False, "labeler": "swap", "score": -2.5,
                                    "rollouts": 1}]}
        assert made(tokenizer, ids, Label(i, True, "swap"))["errors"] == []
    line = made(tokenizer, ids, Label(0, True, "swap"), system="Be brief.")
    assert line["system"] == "Be brief." and made(tokenizer, ids) is None


def test_record_lets_the_threshold_decide(tokenizer):
    ids = tokenizer.encode("Mia has six.")
    for tau, right in ((-5.0, True), (-4.0, False), (-3.0, False)):
        line = made(tokenizer, ids, Label(0, None, "likelihood", -4.0), tau=tau)
        assert line["labels"][0]["right"] is right and bool(line["errors"]) is not right


def test_record_keeps_ids_where_the_text_is_read_as_others(tokenizer):
    """Tokens that end within a character, and a word spelled letter by letter."""
    plain = tokenizer.encode("Mia has é")
    right = Label(0, True, "swap")
    assert "response_ids" not in made(tokenizer, plain, right)
    letters = [tokenizer.encode(letter)[0] for letter in " has"]
    assert made(tokenizer, letters, right)["response_ids"] == letters != tokenizer.encode(" has")
    half = [token for token in range(tokenizer.vocab_size)
            if tokenizer.token_bytes(token) in (b"\xc3", b"\xa9")]
    half.sort(key=lambda token: -tokenizer.token_bytes(token)[0])
    cut = [*letters, half[0]]
    line = made(tokenizer, cut, Label(4, False, "swap"))
    assert line["response"] == " has\ufffd" and line["errors"] == [[4, 5]]
    assert line["response_ids"] == cut
    whole = [*letters, *half]  # the second half adds no character of its own
    line = made(tokenizer, whole, Label(5, False, "swap"))
    assert line["response"] == " hasé" and line["errors"] == [[4, 5]]
    first = made(tokenizer, half, Label(1, False, "swap"))
    assert first["response"] == "é" and first["errors"] == [[0, 1]]
    assert "response_ids" not in first  # the text gives both halves back
    alone = made(tokenizer, half[:1], Label(0, False, "swap"))
    assert alone["response"] == "\ufffd" and alone["errors"] == [[0, 1]]
    assert made(tokenizer, cut, right)["response_ids"] == cut
    for each, ids in ((line, whole), (first, half), (alone, half[:1])):
        assert train_head.response_ids(each, tokenizer) == ids
        answer = train_head.encode_answer(json.dumps(each).encode(), tokenizer, context=2048,
                                          negatives="mistake")
        assert answer.labels[-1] == train_head.WRONG
        assert set(answer.labels[:-1]) <= {train_head.LEFT_OUT}


def test_a_token_that_two_labelers_label_counts_once(tokenizer):
    """The first has it; a wrong one cuts what follows it in the second's answer all the same."""
    seen: set = set()

    def labels(ids: list[int], *given: Label) -> list[tuple]:
        line = label.record(Prompt("q"), Example(ids, list(given)), tokenizer, -4.0, seen)
        return [(each["token"], each["right"], each["labeler"]) for each in line["labels"]
                ] if line else []

    assert labels([71, 72], Label(0, True, "a"), Label(1, False, "a")) == [
        (0, True, "a"), (1, False, "a")]
    assert labels([71, 72, 73], Label(1, None, "b", -9.0), Label(2, None, "b", -1.0)) == []
    assert labels([71, 74, 73], Label(0, True, "b"), Label(2, None, "b", -1.0)) == [(2, True, "b")]
    assert labels([71, 74, 73], Label(2, False, "c")) == []
    assert labels([72, 72], Label(1, True, "c")) == [(1, True, "c")]  # after another beginning


def swap_line(right: list[float], wrong: list[float], index: int = 0) -> dict:
    labels = [Label(i, i < len(right), "swap", score, 1)
              for i, score in enumerate([*right, *wrong])]
    labels.append(Label(len(labels), False, "bisect", -1000.0))
    return {"index": index, "examples": [[[1] * len(labels), labels]], "notes": [], "cost": {}}


def test_tau_is_a_quantile_of_what_swap_found_wrong():
    args = argparse.Namespace(tau=None, tau_quantile=0.9)
    lines = [swap_line([0.0, -1.0, -3.05], [-float(i) for i in range(1, 31)]),
             swap_line([-50.0], [-31.0])]
    tau, source, count = label.find_tau(lines, args)
    assert count == 31
    assert tau == pytest.approx(-4.0)  # of -1 to -31: a tenth of them exceeds it
    assert "0.9 quantile over 31" in source and "75% of the 4" in source
    args.tau_quantile = 1.0
    assert label.find_tau(lines, args)[0] == -1.0
    few = [swap_line([0.0], [-1.0] * (label.TAU_LABELS - 1))]
    assert label.find_tau(few, args)[0] == label.TAU
    enough = [swap_line([0.0], [-1.0] * label.TAU_LABELS)]
    assert label.find_tau(enough, args)[0] == -1.0
    args.tau = -2.5
    assert label.find_tau(lines, args) == (-2.5, "as given", 0)


def test_tau_of_an_earlier_run_must_be_one_that_swap_found(tmp_path):
    file = tmp_path / "swap.json"
    report = {"tau": -3.5, "tau_labels": 40, "horizon": 0}
    file.write_text(json.dumps(report))
    assert label.read_tau(str(file), 0) == -3.5 and label.read_tau("-2", 7) == -2.0
    for change, message in (({"tau_labels": 0}, "in which swap found"), ({"tau": None}, "a number"),
                            ({"tau": math.nan}, "a number"), ({"horizon": 20}, "at horizon 20")):
        file.write_text(json.dumps(report | change))
        with pytest.raises(ValueError, match=message):
            label.read_tau(str(file), 0)


def test_swap_runs_first_whatever_the_order(tmp_path):
    """Its labels carry the scores that τ is found by; the other way round they were dropped."""
    for order in ("swap,likelihood", "likelihood,swap", "likelihood,swap,likelihood"):
        args = label.parse_args(arguments(tmp_path / "prompts", tmp_path / "out", "--labeler",
                                          order, "--check", "number"))
        label.check_options(args)
        assert args.labeler == ["swap", "likelihood"]


def test_likelihood_along_the_draft_scores_its_own_answer(tiny):
    """log P(z_i) less the target's best, wherever the target would differ; nothing is decoded."""
    pair = tiny.pair(horizon=0)
    add_noise(pair)
    task = Task(pair, Prompt("How many apples?"), None, seed=0)
    [(response, labels)] = Likelihood("draft")(task)
    z = task.draft_answer
    assert pair.decoded == 0 and "target_answer" not in vars(task)
    with torch.no_grad():
        hidden = pair.target(torch.tensor([[*task.ids, *z]]))[0, len(task.ids) - 1:-1]
        found = pair.target.logits(hidden).double().log_softmax(-1)
    places = [i for i, token in enumerate(z) if found[i].argmax() != token
              and token not in pair.silent]
    assert len(places) > 10 and response == task.strip(z)
    assert [each.token for each in labels] == places
    for each in labels:
        expected = found[each.token, z[each.token]] - found[each.token].max()
        assert each.score == pytest.approx(expected.item(), abs=1e-3) and each.right is None


def test_an_answer_is_cut_after_its_first_wrong_token(tokenizer):
    """What follows it builds on it; a lower τ lets more stand."""
    ids = tokenizer.encode("Tom has 12 apples and 3 pears.")
    labels = [Label(i, None, "likelihood", score) for i, score in ((0, -1.0), (2, -5.0), (4, -9.0),
                                                                   (5, -1.0))]
    for tau, kept, last in ((-4.0, 2, 3), (-6.0, 3, 5), (-10.0, 4, len(ids))):
        line = label.record(Prompt("?"), Example(ids, labels), tokenizer, tau, set())
        assert tokenizer.encode(line["response"]) == ids[:last]
        assert [each["right"] for each in line["labels"]] == [True] * (kept - 1) + [tau == -10.0]
        assert len(line["errors"]) == (tau != -10.0)


# ---- the journal

KEY = {"prompts": "abc", "seed": 0, "labeler": ["swap"]}


def lines_of(path: Path, key: dict = KEY) -> list[dict]:
    with Journal(path, key, tp.Shard()) as journal:
        return journal.lines


def test_journal_goes_on_and_cuts_a_torn_line(tmp_path):
    """Planted: a torn line that is kept, so that the next one is written behind it."""
    path = tmp_path / "out.partial"
    with Journal(path, KEY, tp.Shard()) as journal:
        assert journal.lines == []
        journal.append({"index": 0, "text": "né\n"})
        assert len(path.read_bytes().splitlines()) == 2  # on disk before the next
        journal.append({"index": 1})
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        count = max(sum(end < size for end in ends) - 1, 0)
        expected = [{"index": 0, "text": "né\n"}, {"index": 1}][:count]
        assert lines_of(path) == expected
        with Journal(path, KEY, tp.Shard()) as journal:
            journal.append({"index": "new"})
        assert lines_of(path) == [*expected, {"index": "new"}]


def test_journal_refuses_other_settings_by_name(tmp_path):
    path = tmp_path / "out.partial"
    assert lines_of(path) == []
    before = path.read_bytes()
    for key, names in (({**KEY, "seed": 1}, ["seed: 0, now 1"]),
                       ({**KEY, "labeler": ["bisect"], "prompts": "d"}, ["labeler", "prompts"]),
                       ({**KEY, "more": 1}, ["more: None, now 1"]), ({"seed": 0}, ["prompts"])):
        with pytest.raises(ValueError, match="other settings") as caught:
            lines_of(path, key)
        assert all(name in str(caught.value) for name in names) and "remove it" in str(caught.value)
        assert "seed" not in str(caught.value) or key.get("seed") == 1
    assert path.read_bytes() == before
    assert lines_of(path, {**KEY, "labeler": ("swap",)}) == []  # as JSON keeps it


@pytest.mark.parametrize("damage", [b"{half\n", b"\0\0\0\n", b"[1]\n", b"5\n", b'"text"\n',
                                    b'{"prompts": "abc", "seed": 0, "labeler": ["swap"]}\n{x\n{}\n',
                                    b"\xff\xfe\n"])
def test_journal_refuses_a_damaged_file(damage, tmp_path):
    path = tmp_path / "out.partial"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match="got a damaged file|other settings"):
        lines_of(path)
    assert path.read_bytes() == damage


def test_journal_refuses_a_second_process(tmp_path):
    """Another process holds the lock; the system takes it back however that one ends."""
    pytest.importorskip("fcntl")
    path = tmp_path / "out.partial"
    lines_of(path)
    code = ("import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.flock(file, fcntl.LOCK_EX); "
            "print('held', flush=True); sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        before = path.read_bytes()
        with pytest.raises(ValueError, match="another run is writing it"):
            lines_of(path)
        assert path.read_bytes() == before
    finally:
        holder.kill()
        holder.communicate()
    with Journal(path, KEY, tp.Shard()):
        with pytest.raises(ValueError, match="another run is writing it"):
            Journal(path, KEY, tp.Shard())
    assert lines_of(path) == []


def test_journal_reads_what_another_wrote_until_the_lock(tmp_path, monkeypatch):
    """A run that ends between this one's first look and its lock has added a line."""
    fcntl = pytest.importorskip("fcntl")
    path, lock = tmp_path / "out.partial", fcntl.flock
    lines_of(path)

    def flock(file, how):
        with path.open("ab") as other:
            other.write(b'{"index": 0}\n')
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert lines_of(path) == [{"index": 0}]
    assert path.read_bytes().endswith(b'{"index": 0}\n')


# ---- the command line on the bundled pair

def demo_prompts(path: Path, indices: list[int]) -> Path:
    problems = [problem_at(5, index) for index in indices]
    path.write_text("".join(json.dumps({"prompt": each.prompt, "answer": NUMBERS[each.answer]})
                            + "\n" for each in problems))
    return path


def arguments(prompts: Path, output: Path, *more: object) -> list[str]:
    return [*map(str, ("--checkpoint_path", DEMO / "target", "--draft_checkpoint_path",
                       DEMO / "draft", "--no-compile", "--dtype", "float32", "--device", "cpu",
                       "--max_new_tokens", 100, "--prompts", prompts, "--output", output, *more))]


@pytest.fixture
def command(monkeypatch):
    """The command line in this process, as run_main ends it."""
    def run(arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["label.py", *arguments])
        terminal.run_main(lambda: label.main(label.parse_args(arguments)), "label.py")

    monkeypatch.setattr("warnings.formatwarning", lambda *_, **__: "")  # put back afterwards
    return run


def test_all_labelers_run_end_to_end(command, tmp_path, capsys, tokenizer):
    prompts, out = demo_prompts(tmp_path / "prompts.jsonl", [2, 3]), tmp_path / "labels.jsonl"
    command(arguments(prompts, out, "--labeler", "swap,likelihood,bisect,corrupt", "--check",
                      "number", "--rollouts", 2, "--json", tmp_path / "costs.json"))
    said = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "costs.json", "labels.jsonl", "prompts.jsonl"]
    report = json.loads((tmp_path / "costs.json").read_text())
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    counts = {name: {True: 0, False: 0} for name in LABELERS}
    seen = set()
    for line in lines:
        ids = line.get("response_ids") or tokenizer.encode(line["response"])
        assert len(line["errors"]) == sum(not each["right"] for each in line["labels"])
        for each in line["labels"]:
            counts[each["labeler"]][each["right"]] += 1
            prefix = line["prompt"], *ids[:each["token"] + 1]
            assert prefix not in seen
            seen.add(prefix)
            if not each["right"]:
                assert each["token"] == len(ids) - 1  # cut after it
    assert {line["prompt"] for line in lines} == {problem_at(5, i).prompt for i in (2, 3)}
    for name, found in counts.items():
        costs = report["labelers"][name]
        assert found == {True: costs["right"], False: costs["wrong"]}
        assert f"\n{name} " in said
    assert counts["swap"][True] and counts["swap"][False] and counts["likelihood"][False]
    assert counts["bisect"][True] + counts["corrupt"][True] and counts["corrupt"][False]
    assert report["prompts"] == 2 and "train_head.py" in said
    answers = train_head.read_answers(out, tokenizer, context=2048, negatives="mistake")
    assert len(answers) == len(lines)
    labels = [label for answer in answers for label in answer.labels]
    assert labels.count(train_head.WRONG) == sum(found[False] for found in counts.values())
    assert labels.count(train_head.CORRECT) == sum(found[True] for found in counts.values())
    with pytest.raises(SystemExit, match="2"):
        command(arguments(prompts, out, "--labeler", "likelihood"))
    assert "is there already" in capsys.readouterr().err


def test_dry_run_says_hours_and_writes_nothing(command, tmp_path, capsys):
    prompts = demo_prompts(tmp_path / "prompts.jsonl", [0, 1, 2])
    command(arguments(prompts, tmp_path / "out.jsonl", "--labeler", "likelihood", "--dry_run",
                      "--max_new_tokens", 30, "--json", tmp_path / "costs.json"))
    said = capsys.readouterr().out
    assert re.search(r"3 prompts; from 2 of them: about [\d,]+ labels, [\d,]+ target tokens "
                     r"written and [\d,]+ read, \d+\.\d\d hours", said)
    assert list(tmp_path.iterdir()) == [prompts]


BAD_OPTIONS = {
    "labeler": (["--labeler", "swop"], "got labeler 'swop', expected some of swap"),
    "one of two": (["--labeler", "likelihood,"], "got labeler ''"),
    "check": (["--labeler", "bisect,likelihood,swap"], "bisect,swap without --check"),
    "rollouts": (["--labeler", "likelihood", "--rollouts", "1"], "got --rollouts 1"),
    "temperature": (["--labeler", "likelihood", "--rollout_temperature", "nan"], "temperature nan"),
    "horizon": (["--labeler", "likelihood", "--horizon", "-1"], "got --horizon -1"),
    "along": (["--labeler", "likelihood", "--along", "both"], "got --along both with --horizon 20"),
    "tau": (["--labeler", "likelihood", "--tau", "nan"], "got --tau nan, expected a number"),
    "quantile": (["--labeler", "likelihood", "--tau_quantile", "1.5"], "got --tau_quantile 1.5"),
    "limit": (["--labeler", "likelihood", "--limit", "0"], "got --limit 0"),
    "speculate_k": (["--labeler", "likelihood", "--speculate_k", "0"], "speculate_k 0"),
    "max_new_tokens": (["--labeler", "likelihood", "--max_new_tokens", "0"], "max_new_tokens 0"),
    "checkpoint": (["--labeler", "likelihood", "--draft_checkpoint_path", "/none"], "/none"),
    "prompts": (["--labeler", "likelihood", "--prompts", "/none"], "/none"),
    "bad prompts": (["--labeler", "likelihood", "--prompts", str(ROOT / "README.md")],
                    "README.md, line 1: "),
    "directory": (["--labeler", "likelihood", "--output", "/none/out.jsonl"], "/none")}


@pytest.mark.parametrize("options, said", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_one_line_before_weights(options, said, command, tmp_path, capsys,
                                                 monkeypatch):
    monkeypatch.setattr(Transformer, "from_checkpoint", lambda *_, **__: pytest.fail("it loads"))
    prompts = demo_prompts(tmp_path / "prompts.jsonl", [0])
    with pytest.raises(SystemExit, match="^2$"):
        command([*arguments(prompts, tmp_path / "out.jsonl"), *options])
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and captured.err.startswith("label.py: ")
    assert said in captured.err and not captured.out
    assert list(tmp_path.iterdir()) == [prompts]


def script_command(*arguments_: object) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "label.py"), *map(str, arguments_)]


def test_a_mistake_ends_the_program_with_status_2(tmp_path):
    prompts = demo_prompts(tmp_path / "prompts.jsonl", [0])
    done = subprocess.run(script_command(*arguments(prompts, tmp_path / "out", "--labeler", "x")),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1


def test_prompts_that_fill_the_context_are_left_out(tiny):
    pair = Pair(*tiny.models, tiny.setup, 16)
    args = argparse.Namespace(check=None, seed=0)
    line = label.label_prompt(pair, Prompt("word " * 40), args, {"likelihood": Likelihood()}, 0)
    assert not line["examples"] and "leaves no room" in line["notes"][0]
    assert ModelConfig.from_checkpoint(tiny.path).max_position_embeddings > 16


def test_passes_of_every_length_run_uncompiled(tiny, monkeypatch):
    """Compiled parts compile anew for each length, and give up at the 65th."""
    pair = tiny.pair(horizon=5)
    for each in tiny.models:
        monkeypatch.setattr(each, "run_block", lambda *_: pytest.fail("a compiled block ran"))
    ids = pair.tokenizer.encode_prompt("How many apples?")
    assert len(pair.favourites([*ids, 5, 6, 7], len(ids))) == 3
    assert len(pair.log_probs([*ids, 5], 0, [[0]] * (len(ids) + 1))[0]) == len(ids) + 1
    with pytest.raises(pytest.fail.Exception, match="a compiled block ran"):
        pair.log_probs([*ids, 5, 5, 5, 5, 5, 5], len(ids), [[0]] * 6)  # the one shape that recurs


def test_the_draft_stops_where_the_target_would(tiny, monkeypatch):
    """A base model's own end of text is not the chat's."""
    monkeypatch.setattr(tiny.models[1], "config", dataclasses.replace(
        tiny.models[1].config, eos_token_ids=(3,)))
    pair = tiny.pair()
    assert pair.draft_alone.stop_tokens == pair.engine.stop_tokens != (3,)


def test_logits_that_are_not_finite_are_no_scores(tiny, monkeypatch):
    pair = tiny.pair(horizon=0)
    monkeypatch.setattr(pair.target.norm, "weight", torch.nn.Parameter(
        torch.full_like(pair.target.norm.weight, math.inf), requires_grad=False))
    task = Task(pair, Prompt("How many apples?"), None, seed=0)
    with pytest.raises(FloatingPointError, match="not finite"):
        list(Likelihood("draft")(task))


# ---- killed, and spread over ranks

@pytest.mark.slow
def test_killed_ten_times_it_writes_the_same_bytes(tmp_path):
    """kill -9 at random moments."""
    prompts, draw = demo_prompts(tmp_path / "prompts.jsonl", list(range(8))), random.Random(1)
    options = ("--labeler", "bisect,likelihood,corrupt", "--check", "number", "--rollouts", 2,
               "--max_new_tokens", 90)
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(output: Path) -> subprocess.Popen:
        return subprocess.Popen(script_command(*arguments(prompts, output, *options)), env=env,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    whole = tmp_path / "whole.jsonl"
    assert start(whole).wait(300) == 0
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    kills = middle = began = 0
    while kills < 10:
        process = start(output)
        lines = partial.read_bytes().count(b"\n") if partial.exists() else 0
        # half of them at any moment from the start on, half once it has begun to label
        deadline = time.monotonic() + 120
        while kills % 2 and process.poll() is None and time.monotonic() < deadline and (
                partial.read_bytes().count(b"\n") if partial.exists() else 0) <= lines:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1.5 if kills % 2 else 6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.communicate()
            now = partial.read_bytes().count(b"\n") if partial.exists() else 0
            began += now > 0
            middle += 2 <= now <= 8
        else:
            assert process.returncode == 0, process.stderr.read()
            assert not partial.exists()
        if output.exists() and not partial.exists():  # through, or killed behind its last step
            assert output.read_bytes() == whole.read_bytes()
            output.unlink()
    done = start(output)
    _, said = done.communicate(timeout=300)
    assert done.returncode == 0, said
    assert output.read_bytes() == whole.read_bytes() and not partial.exists()
    assert middle >= 4, (middle, began)  # of ten; the others hit its start or its end


def read_labels(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_and_int8_label_as_one_process(tmp_path, command):
    """float32 labels are one process's; int8 has its own answers, and is run to the end."""
    prompts = demo_prompts(tmp_path / "prompts.jsonl", [0])
    quantize_checkpoint(DEMO / "target", tmp_path / "int8")
    options = ("--labeler", "swap,likelihood", "--check", "number")
    alone, ranks, int8 = (tmp_path / f"{name}.jsonl" for name in ("alone", "ranks", "int8"))
    command(arguments(prompts, alone, *options))
    out, err = finished(torchrun("scripts/label.py", *arguments(prompts, ranks, *options)))
    assert out.count("wrote ") == 1 and "destroy_process_group" not in err
    command(arguments(prompts, int8, *options, "--checkpoint_path", tmp_path / "int8"))
    assert not list(tmp_path.glob("*.partial"))
    ours, theirs = read_labels(alone), read_labels(ranks)
    assert len(ours) == len(theirs) > 3 and read_labels(int8)
    for one, other in zip(ours, theirs):
        for each, same in zip(one["labels"], other["labels"], strict=True):
            if each["score"] is not None:
                assert same.pop("score") == pytest.approx(each.pop("score"), abs=1e-3)
        assert one == other
