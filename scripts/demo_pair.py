"""Make the bundled demo pair: word problems, a tokenizer, a target, a draft, a judge head, and their evaluation.

The paper's setting in small, with a ground truth. A problem is a short story of quantities that change; a solution works
through it event by event, and nearly every phrase, number order and operation in it may be written in several right ways.
The target prefers some wordings (about 70 to 30), the draft others, and the draft is too small to be right always. So exact
verification rejects much that is right, while a grammar that knows every right wording says where the first mistake is.

    python scripts/demo_pair.py data                  # tokenizer and training texts
    python scripts/demo_pair.py train --model draft   # resumes where it was stopped; so does the next
    python scripts/demo_pair.py train --model target
    python scripts/demo_pair.py head                  # the draft's answers, labelled, then train_head.py
    python scripts/demo_pair.py sweep                 # thresholds, on validation problems
    python scripts/demo_pair.py evaluate --seed 1 --problems 2000 --json eval.json
    python scripts/demo_pair.py int8                  # what int8 weights change, over the same problems
    python scripts/demo_pair.py prompts --seed 3 --problems 300 --output prompts.jsonl

What is made lies in build/demo; the pair itself in build/demo/pair, which the last three take with
--pair build/demo/pair: by default they read the bundled pair. Speed and the best K are measured by
`bench.py pair`.

Training uses Muon for the matrices (arXiv 2502.16982 for the scale of its update) and AdamW for embeddings and norms, in
float32; the result is rounded to bfloat16 and written as a Hugging Face directory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import (  # noqa: E402
    DTYPES,
    STACKED,
    ModelConfig,
    RopeScaling,
    atomic_write,
    check_writable,
    tensor_names,
)
from cpu import can_compile  # noqa: E402
from generate import Engine, setup_compiler  # noqa: E402
from judge import JudgeHead, Rule, Verified, make_rule  # noqa: E402
from model import Transformer  # noqa: E402
from quantize import quantize_checkpoint  # noqa: E402
from scripts.bench_tools import machine  # noqa: E402
from terminal import DEMO  # noqa: E402
from tokenizer import LLAMA3_SPECIAL_TOKENS, LLAMA3_SPLIT, Tokenizer  # noqa: E402
from tp import pick_dtype  # noqa: E402

TRAIN_SEED, HEAD_SEED, VALIDATION_SEED = 0, 1_000_000, 2_000_000  # streams of problems; evaluate takes any other
TRAIN_PROBLEMS, HEAD_PROBLEMS, VALIDATION_PROBLEMS = 60_000, 2_000, 500
MISTAKES_PER_TEXT = 2
MAX_NEW_TOKENS, MAX_SEQ_LENGTH = 160, 256
WAYS = ("draft", "target", "exact", "judge", "oracle", "token_identity")
WORK = ROOT / "build" / "demo"
# One thread each, compilers included; torch reads the first when a worker imports it.
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
MAX_TRAIN_TOKENS = 224
BPE_ENTRIES = 608

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ian", "Jo", "Kim", "Leo", "Mia", "Noor", "Otis", "Pia",
         "Quin", "Rosa", "Sam", "Tara", "Uma", "Vera", "Walt", "Yara")
ITEMS = ("apples", "beads", "cards", "coins", "eggs", "figs", "keys", "kites", "nuts", "pears", "pens", "plums", "rings",
         "shells", "stamps", "stones", "bricks", "candles", "lemons", "marbles", "melons", "pencils", "ribbons", "tickets")
VERBS = {"gain": ("finds", "buys", "wins"), "lose": ("loses", "sells", "drops")}
# What the draft's training leaves out: gaps in its knowledge make it err in words (direction, item) as its size does in numbers.
UNKNOWN = ("drops", *ITEMS[-4:])
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
           "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty")
MAX_VALUE = len(NUMBERS) - 1
# Event k is called ORDINALS[k] in a question and either of OPENINGS[k] in an answer.
ORDINALS = ("First", "Second", "Third", "Fourth")
OPENINGS = (("First", "To begin"), ("Second", "Next"), ("Third", "After that"), ("Fourth", "At last"))
ROPE = {"rope_theta": 10000.0, "rope_scaling": RopeScaling(4.0, 1.0, 4.0, 512)}
MODELS = {
    "target": ModelConfig(vocab_size=864, hidden_size=320, intermediate_size=896, num_layers=8, num_heads=8, num_kv_heads=4,
                          head_dim=40, rms_norm_eps=1e-5, max_position_embeddings=2048, tie_word_embeddings=True, **ROPE),
    "draft": ModelConfig(vocab_size=864, hidden_size=96, intermediate_size=256, num_layers=2, num_heads=8, num_kv_heads=4,
                         head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=2048, tie_word_embeddings=True, **ROPE),
}
# What each training file holds. The target practises harder problems than those it is asked later. A share of the words in
# its later texts is preceded by a slip of the pen ("two go - no, leave Jo"), as in people's texts: so it learns to notice
# mistakes, and what it notices a judge can read. Slips themselves are not learnt.
KINDS = {"practice": {"everyone": True}, "gifts": {"gifts": True}, "target": {}, "draft": {"familiar": True}}
SLIP_SHARE = 0.1
BATCH = 32
RECIPES = {  # stages: texts, steps, peak learning rate
    "target": (("practice", 490, 4e-3), ("gifts", 450, 4e-3), ("target", 660, 3e-3)),
    "draft": (("draft", 222, 6e-3),),
}
# A writer picks among n right wordings with these weights. The grammar lists the target's favourite first and the draft's
# second: each writer knows every wording and merely prefers its own.
WEIGHTS = {
    "target": {2: (0.7, 0.3), 3: (0.6, 0.25, 0.15)},
    "draft": {2: (0.15, 0.85), 3: (0.12, 0.73, 0.15)},
    "any": {2: (0.5, 0.5), 3: (0.34, 0.33, 0.33)},
}


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


# ---- grammar: a solution is a sequence of literals and choices, each of which may be worded in several right ways

class Alt(tuple):
    """A choice between right wordings; each option is a literal, a sequence (list) or another choice."""

    agreed = False  # whether both writers prefer the first option

    def __new__(cls, *options):
        return super().__new__(cls, options)

    def __getnewargs__(self) -> tuple:  # else a worker process would unpickle one option, the tuple of all
        return tuple(self)


class Agreed(Alt):
    """A choice in which the draft's taste is the target's."""

    agreed = True


def write(node, rng: random.Random, writer: str) -> str:
    """One text of the grammar, worded as `writer` prefers."""
    if isinstance(node, str):
        return node
    if isinstance(node, Alt):
        weights = WEIGHTS["target" if node.agreed and writer == "draft" else writer][len(node)]
        return write(rng.choices(node, weights)[0], rng, writer)
    return "".join(write(part, rng, writer) for part in node)


def walk(node, text: str, starts: set[int]) -> tuple[set[int], int]:
    """Match a grammar against text from every position in `starts`: (positions after a full match, furthest position that
    any right wording agrees with)."""
    if isinstance(node, str):
        ends, furthest = set(), 0
        for start in starts:
            agreed = len(os.path.commonprefix((node, text[start:start + len(node)])))
            furthest = max(furthest, start + agreed)
            if agreed == len(node):
                ends.add(start + agreed)
        return ends, furthest
    if isinstance(node, Alt):
        results = [walk(option, text, starts) for option in node]
        return set().union(*(ends for ends, _ in results)), max(furthest for _, furthest in results)
    furthest = 0
    for part in node:
        starts, reached = walk(part, text, starts)
        furthest = max(furthest, reached)
        if not starts:
            break
    return starts, furthest


@dataclass(frozen=True)
class Problem:
    """One word problem: what is asked, every right solution, and the number they end with."""

    prompt: str
    solution: list
    answer: int

    def first_mistake(self, text: str) -> int:
        """Index of the first character that no right solution has there; len(text) where `text` begins a right one."""
        return walk(self.solution, text, {0})[1]

    def is_right(self, text: str) -> bool:
        """Whether the last number of the text is the answer."""
        numbers = re.findall("|".join(sorted(NUMBERS, key=len, reverse=True)), text)
        return bool(numbers) and numbers[-1] == NUMBERS[self.answer]


def addition(a: int, b: int) -> list:
    x, y = NUMBERS[a], NUMBERS[b]
    return [Alt(f"{x} plus {y}", f"{y} plus {x}"), Agreed(" makes ", " is "), NUMBERS[a + b]]


def subtraction(a: int, b: int) -> list:
    x, y = NUMBERS[a], NUMBERS[b]
    return [Alt(f"{x} minus {y}", f"{y} from {x}"), Agreed(" makes ", " is "), NUMBERS[a - b]]


def doubling(a: int) -> list:
    x = NUMBERS[a]
    return [Alt(f"{x} plus {x}", f"two times {x}", f"{x} times two"), Agreed(" makes ", " is "), NUMBERS[2 * a]]


def make_problem(rng: random.Random, *, everyone: bool = False, gifts: bool = False, familiar: bool = False) -> Problem:
    """Someone has a number of one thing, three or four events change it, and the question is how many there are in the end.

    Two harder kinds are only practised by the target: `gifts` from and to others, and the numbers of `everyone` involved.
    An easier one is all that the draft was taught: the verbs and items `familiar` to it.
    """
    known = [word for word in (*ITEMS, *VERBS["gain"], *VERBS["lose"]) if not (familiar and word in UNKNOWN)]
    verbs = {kind: [verb for verb in names if verb in known] for kind, names in VERBS.items()}
    thing, people = rng.choice([item for item in ITEMS if item in known]), rng.sample(NAMES, rng.choice((2, 2, 3)))
    has = {name: rng.randint(2, 9) for name in (people if everyone else people[:1])}
    story = [f"{name} has {NUMBERS[has[name]]} {thing}." for name in has]
    solution: list = []
    for step in range(rng.choice((2, 3, 3, 4) if everyone else (3, 4, 4))):
        if everyone:
            x, y = rng.sample(people, 2)
        else:
            x, y = people[0], rng.choice(people[1:])
            if gifts and rng.random() < 0.3 and has[x] < MAX_VALUE:
                x, y = y, x  # the other one gives
        a, b = has.get(x, MAX_VALUE), has.get(y, 0)  # of who is not followed, the story does not say
        kinds = [kind for kind, possible in (
            ("gain", x in has and a < MAX_VALUE), ("lose", x in has and a > 2), ("give", (gifts or everyone) and a > 2 and b < MAX_VALUE),
            ("double", x in has and a <= MAX_VALUE // 2)) if possible]
        kind = rng.choice(kinds)
        n = rng.randint(1, min(9, {"gain": MAX_VALUE - a, "lose": a - 1, "give": min(a - 1, MAX_VALUE - b), "double": 1}[kind]))
        number = NUMBERS[n]
        if kind == "gain":
            story.append(f"{ORDINALS[step]}, {x} {rng.choice(verbs[kind])} {number} {thing}.")
            event = Alt([x, Alt(" gets ", " gains "), number], [number, Alt(" come to ", " go to "), x])
            effects = [(x, addition(a, n), a + n)]
        elif kind == "lose":
            story.append(f"{ORDINALS[step]}, {x} {rng.choice(verbs[kind])} {number} {thing}.")
            event = Alt([x, Alt(" parts with ", " is rid of "), number], [number, Alt(" leave ", " part from "), x])
            effects = [(x, subtraction(a, n), a - n)]
        elif kind == "give":
            story.append(f"{ORDINALS[step]}, " + rng.choice((f"{x} gives {y} {number} {thing}.",
                                                             f"{y} takes {number} {thing} from {x}.")))
            event = Alt([x, Alt(" hands ", " passes "), number, " to ", y], [y, Alt(" receives ", " accepts "), number, " from ", x])
            effects = [(x, subtraction(a, n), a - n), (y, addition(b, n), b + n)]
        else:
            story.append(f"{ORDINALS[step]}, {x} doubles the {thing}.")
            event = Alt([x, Alt(" doubles the ", " makes twice the "), thing], ["the ", thing, Alt(" of ", " with "), x, " double"])
            effects = [(x, doubling(a), 2 * a)]
        clauses = [[calculation, " so ", name, Agreed(" has ", " holds "), NUMBERS[value]] for name, calculation, value in effects
                   if name in has]
        body = clauses[0]
        if len(clauses) == 2:
            body = Alt([clauses[0], ", ", clauses[1]], [clauses[1], ", ", clauses[0]])
        solution += [" " if step else "", Alt(*OPENINGS[step]), ", ", event, ": ", body, "."]
        has.update({name: value for name, _, value in effects if name in has})
    x, y = rng.sample(people, 2) if everyone else people[:2]
    if everyone and rng.random() < 0.3 and has[x] + has[y] <= MAX_VALUE:
        story.append(f"How many {thing} do {x} and {y} have together?")
        answer = has[x] + has[y]
        solution += [Alt(" Together, ", " In total, "), addition(has[x], has[y]), "."]
    else:
        story.append(f"How many {thing} does {x} have?")
        answer = has[x]
    return Problem(" ".join(story), [*solution, Alt(" Answer: ", " So the answer is "), NUMBERS[answer], "."], answer)


# ---- data

WORD_CLASSES = (NUMBERS, NAMES, ITEMS, ("plus", "minus"), ("gets", "gains", "parts", "doubles"), ("come", "go", "leave", "part"))


def with_slips(problem: Problem, solution: str, rng: random.Random) -> list[tuple[str, bool]]:
    """A right text with wrong words in it, each put right at once, in pieces: (text, whether it is no slip)."""
    pieces, done = [], 0
    for word in re.finditer(r" [A-Za-z]+", solution):
        wrong = [" " + other for group in WORD_CLASSES if word[0][1:] in group for other in group]
        if wrong and rng.random() < SLIP_SHARE:
            before, slip = solution[:word.start()], rng.choice(wrong)
            if problem.first_mistake(before + slip) < len(before + slip):
                pieces += [(solution[done:word.start()], True), (slip, False), (" - no,", True)]
                done = word.start()
    return [*pieces, (solution[done:], True)]


def problem_at(seed: int, index: int, **kind: bool) -> Problem:
    """Problem `index` of stream `seed` (kind: see make_problem); streams of different seeds are independent."""
    return make_problem(random.Random(f"problem:{seed}:{index}"), **kind)


def fresh_problems(seed: int, count: int, *, exclude: set[str]) -> list[Problem]:
    """The first `count` problems of a stream whose texts are not in `exclude` and do not repeat."""
    seen, problems, index = set(exclude), [], 0
    while len(problems) < count:
        problem = problem_at(seed, index)
        index += 1
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            problems.append(problem)
    return problems


@functools.cache
def training_prompts() -> frozenset[str]:
    """Questions of all training problems, the practised ones included (240,000: a quarter of a minute)."""
    return frozenset(problem_at(TRAIN_SEED, index, **kind).prompt for kind in KINDS.values() for index in range(TRAIN_PROBLEMS))


def make_tokenizer():
    """Byte-level BPE over all wordings (at most BPE_ENTRIES entries), then Llama-3.1's 256 special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    texts = ["system user assistant"] * 200
    for index in range(20_000):
        problem = problem_at(TRAIN_SEED, index, everyone=True)
        texts.append(problem.prompt + "\n\n" + write(problem.solution, random.Random(index), "any"))
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=BPE_ENTRIES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in LLAMA3_SPECIAL_TOKENS])
    return bpe


def run_data(args: argparse.Namespace) -> None:
    """Write tokenizer.json, and the training sequences: each writer's, and the target's practice, a safetensors file each."""
    args.work.mkdir(parents=True, exist_ok=True)
    bpe = make_tokenizer()
    bpe.save(str(args.work / "tokenizer.json"))
    begin, header, end, eot = (bpe.token_to_id(f"<|{name}|>") for name in
                               ("begin_of_text", "start_header_id", "end_header_id", "eot_id"))
    turn = {role: [header, *bpe.encode(role).ids, end, *bpe.encode("\n\n").ids] for role in ("user", "assistant")}
    for name, kind in KINDS.items():
        writer = "draft" if name == "draft" else "target"
        tokens = torch.full((TRAIN_PROBLEMS, MAX_TRAIN_TOKENS), -1, dtype=torch.int16)
        learn = torch.zeros(TRAIN_PROBLEMS, MAX_TRAIN_TOKENS, dtype=torch.bool)  # answers, but neither questions nor slips
        for index in tqdm(range(TRAIN_PROBLEMS), desc=f"{name} texts", unit=" problems"):
            problem = problem_at(TRAIN_SEED, index, **kind)
            rng = random.Random(f"{writer}:{index}")
            solution = write(problem.solution, rng, writer)
            pieces = with_slips(problem, solution, rng) if name == "target" else [(solution, True)]
            row = [begin, *turn["user"], *bpe.encode(problem.prompt).ids, eot, *turn["assistant"]]
            for text, learnt in pieces:
                ids = bpe.encode(text).ids
                learn[index, len(row):len(row) + len(ids)] = learnt
                row += ids
            learn[index, len(row)] = True
            row.append(eot)
            tokens[index, :len(row)] = torch.tensor(row)
        save_file({"tokens": tokens, "learn": learn}, args.work / f"{name}.safetensors")
    lengths = (tokens >= 0).sum(1).float()
    print(f"{bpe.get_vocab_size()} tokens in the vocabulary; sequences of {lengths.mean():.0f} tokens on average, "
          f"{lengths.max():.0f} at most, of which {learn.sum(1).float().mean():.0f} are learnt")


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as aside:
        aside.write_text(text)


# ---- training

def stacked_sizes(config: ModelConfig) -> dict[str, list[int]]:
    """Rows of the matrices that one parameter of ours stacks."""
    kv_rows = config.num_kv_heads * config.head_dim
    return {"qkv_proj": [config.num_heads * config.head_dim, kv_rows, kv_rows],
            "gate_up_proj": [config.intermediate_size] * 2}


def orthogonalize(gradient: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly (Newton-Schulz of Muon). torch.optim.Muon does it in bfloat16, which
    CPUs without bfloat16 units emulate at a tenth of the speed; this is float32."""
    x = gradient / (gradient.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Trainer:
    """Model, optimiser state and step of one training run, saved and resumed as a whole."""

    def __init__(self, config: ModelConfig, recipe: str, device: str, *, seed: int = 0):
        torch.manual_seed(seed)
        self.recipe = recipe
        self.model = Transformer(config).to(device)
        for name, p in self.model.named_parameters():
            if p.dim() == 2:
                fan_in = config.hidden_size if "embed" in name else p.shape[1]
                std = fan_in ** -0.5 * (0.5 if "embed" not in name else 1.0)
                nn.init.normal_(p, std=std / (2 * config.num_layers) ** 0.5 if "o_proj" in name or "down" in name else std)
        self.state = {f"{kind}.{name}": torch.zeros_like(p) for name, p in self.model.named_parameters() for kind in ("m", "v")}
        self.step = 0

    def update(self, learning_rate: float) -> None:
        """One optimiser step: Muon for the layers' matrices, AdamW for the rest."""
        split = stacked_sizes(self.model.config)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.step += 1
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                m, v = self.state[f"m.{name}"], self.state[f"v.{name}"]
                if p.dim() == 2 and "embed" not in name:
                    m.lerp_(p.grad, 0.05)
                    ahead = p.grad.lerp(m, 0.95)  # Nesterov
                    sizes = split.get(name.split(".")[-2], [p.shape[0]])
                    update = torch.cat([orthogonalize(part) * 0.2 * max(part.shape) ** 0.5 for part in ahead.split(sizes)])
                    p.mul_(1 - learning_rate * 0.1)
                else:
                    m.lerp_(p.grad, 0.1)
                    v.lerp_(p.grad.square(), 0.02)
                    update = (m / (1 - 0.9 ** self.step)) / ((v / (1 - 0.98 ** self.step)).sqrt() + 1e-8)
                p.add_(update, alpha=-learning_rate)
                p.grad = None

    def save(self, path: Path) -> None:
        tensors = {f"p.{name}": p.data for name, p in self.model.named_parameters()} | self.state
        with atomic_write(path) as aside:
            save_file(tensors, aside, metadata={"step": str(self.step), "recipe": self.recipe})

    def resume(self, path: Path) -> None:
        with safe_open(path, "pt", device=str(self.model.device)) as file:
            if file.metadata().get("recipe") != self.recipe:
                raise ValueError(f"{path}: got the state of another recipe, expected {self.recipe}; remove it to start anew")
            self.step = int(file.metadata()["step"])
            for name, p in self.model.named_parameters():
                p.data.copy_(file.get_tensor(f"p.{name}"))
            self.state = {name: file.get_tensor(name) for name in self.state}


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def run_train(args: argparse.Namespace) -> None:
    """Train one of the two models on its writer's texts and export it to --pair."""
    set_threads(args.threads)
    plan = [(name, i, count, peak) for name, count, peak in RECIPES[args.model] for i in range(count)]  # one entry a step
    trainer = Trainer(MODELS[args.model], repr(RECIPES[args.model]), args.device)
    state = args.work / f"{args.model}-state.safetensors"
    if state.exists():
        trainer.resume(state)
    forward = torch.compile(trainer.model, dynamic=True) if args.compile else trainer.model
    order = torch.randperm(TRAIN_PROBLEMS, generator=torch.Generator().manual_seed(1))
    stage = None
    saved = time.monotonic()
    bar = tqdm(total=len(plan), initial=trainer.step, desc=f"train {args.model}", unit=" steps", mininterval=5)
    while trainer.step < len(plan):
        name, i, count, peak = plan[trainer.step]
        if stage != name:
            with safe_open(args.work / f"{name}.safetensors", "pt") as file:
                stage, tokens, learn = name, file.get_tensor("tokens"), file.get_tensor("learn")
            lengths = (tokens >= 0).sum(1)
        # Neighbours of similar length share a batch, so that little is computed for padding.
        first = trainer.step // 16 * 16 * BATCH
        pool = order[torch.arange(first, first + 16 * BATCH) % len(order)]
        pool = pool[lengths[pool].argsort()].view(16, BATCH)
        shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(first))
        rows = pool[shuffle[trainer.step % 16]]
        width = int(lengths[rows].max())
        x = tokens[rows, :width].long().to(args.device)
        answer = learn[rows, 1:width].to(args.device)
        hidden = forward(x[:, :-1].clamp(min=0))
        loss = F.cross_entropy(trainer.model.logits(hidden[answer]), x[:, 1:][answer])
        loss.backward()
        trainer.update(peak * min(1.0, (i + 1) / 30, 1.15 * (1 - i / count) + 0.01))
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if trainer.step % 50 == 0:
            tqdm.write(f"{args.model} step {trainer.step} loss {loss.item():.4f}")
        if time.monotonic() - saved > 120 or trainer.step == len(plan):
            trainer.save(state)
            saved = time.monotonic()
    bar.close()
    export(trainer.model, args.work, args.pair / args.model)
    print(f"wrote {args.pair / args.model}")


def export(model: Transformer, work: Path, directory: Path) -> None:
    """Write a Hugging Face directory: bfloat16 weights under their usual names, config, tokenizer."""
    config, directory = model.config, Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sizes = stacked_sizes(config)
    weights = {}
    for name, p in model.named_parameters():
        parts = p.data.split(sizes[name.split(".")[-2]]) if name.split(".")[-2] in STACKED else [p.data]
        for source, part in zip(tensor_names(name), parts, strict=True):
            weights[source] = part.to("cpu", torch.bfloat16).contiguous()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((work / "tokenizer.json").read_text())
    ids = {entry["content"]: entry["id"] for entry in raw["added_tokens"]}
    eos = [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]]
    files = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "hidden_act": "silu",
            "rms_norm_eps": config.rms_norm_eps, "max_position_embeddings": config.max_position_embeddings,
            "rope_theta": config.rope_theta, "rope_scaling": {"rope_type": "llama3", **vars(config.rope_scaling)},
            "tie_word_embeddings": config.tie_word_embeddings, "attention_bias": False, "mlp_bias": False,
            "torch_dtype": "bfloat16", "bos_token_id": ids["<|begin_of_text|>"], "eos_token_id": eos},
        "generation_config.json": {"bos_token_id": ids["<|begin_of_text|>"], "eos_token_id": eos, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
            "clean_up_tokenization_spaces": False, "model_max_length": config.max_position_embeddings,
            "chat_template": CHAT_TEMPLATE}}
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    shutil.copy(work / "tokenizer.json", directory / "tokenizer.json")


# ---- the judge's data: the draft's proposals along right texts, labelled by the grammar

def mistake_span(text: str, at: int) -> list[int]:
    """The word or number that holds the first mistake: [start, end) in characters."""
    run = re.match(r"[A-Za-z]+|\d+|.", text[at:], re.DOTALL)
    return [at, at + (run.end() if run else 0)]


@torch.no_grad()
def proposals(draft: Transformer, tokenizer: Tokenizer, problem: Problem, writer: str, rng: random.Random) -> list[dict]:
    """Labelled answers for one problem: a right text, and that text up to a place where the draft would err, with its error.

    The draft reads a right text and at every token proposes its favourite and one draw; a proposal that no right wording
    begins with is a mistake. Those are what a judge meets in use: the first mistake after a right beginning.
    """
    solution = write(problem.solution, rng, writer)
    prompt = tokenizer.encode_chat([{"role": "user", "content": problem.prompt}])
    ids = tokenizer.encode(solution)
    hidden = draft(torch.tensor([[*prompt, *ids]], device=draft.device))[0, len(prompt) - 1:-1]  # row i proposes ids[i]
    logits = draft.logits(hidden).float()
    generator = torch.Generator(draft.device).manual_seed(rng.getrandbits(32))
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    special = set(tokenizer.special_tokens.values())
    wrong = []
    for proposed in (logits.argmax(-1).tolist(), drawn.tolist()):
        for i, token in enumerate(proposed):
            if token == ids[i] or token in special:
                continue
            text = tokenizer.decode([*ids[:i], token])
            at = problem.first_mistake(text)
            if at < len(text):
                wrong.append({"response": text, "errors": [mistake_span(text, at)]})
    unique = list({entry["response"]: entry for entry in wrong}.values())
    chosen = rng.sample(unique, min(MISTAKES_PER_TEXT, len(unique)))
    return [{"prompt": problem.prompt, **entry} for entry in [{"response": solution, "errors": []}, *chosen]]


def run_head(args: argparse.Namespace) -> None:
    """Write labelled answers, train the head with train_head.py, and count the mistakes per token for the control."""
    set_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    draft = Transformer.from_checkpoint(args.pair / "draft", device=args.device,
                                        dtype=torch.float32)
    tokenizer = Tokenizer.from_checkpoint(args.pair / "target")
    if args.problems > HEAD_PROBLEMS:
        raise ValueError(f"got --problems {args.problems}, expected at most {HEAD_PROBLEMS}: more are not kept from the held-out ones")
    weights = (args.pair / "draft" / "model.safetensors").read_bytes()
    key = hashlib.sha256(weights + str(args.problems).encode())
    answers = args.work / f"answers-{key.hexdigest()[:8]}.jsonl"
    if not answers.exists():
        problems = fresh_problems(HEAD_SEED, args.problems, exclude=training_prompts())
        lines = []
        for index, problem in enumerate(tqdm(problems, desc="draft proposes", unit=" problems")):
            writer = ("draft", "any", "target")[index % 3]
            lines += [json.dumps(entry) for entry in proposals(draft, tokenizer, problem, writer, random.Random(index))]
        write_text(answers, "\n".join(lines) + "\n")
    entries = [json.loads(line) for line in answers.read_text().splitlines()]
    print(f"{len(entries)} answers to {args.problems} problems, {sum(bool(e['errors']) for e in entries)} of them with a mistake")
    command = [sys.executable, str(ROOT / "train_head.py"), "--checkpoint_path",
               str(args.pair / "target"), "--data", str(answers), "--output",
               str(args.pair / "judge.safetensors"), *args.rest]
    print(" ".join(command[1:]))
    subprocess.run(command, check=True)
    scores = json.dumps(token_identity(entries, tokenizer))
    write_text(args.pair / "token_identity.json", scores + "\n")


def token_identity(entries: list[dict], tokenizer: Tokenizer) -> list[float]:
    """The control's score of each token id: how often it is right in the judge's own training data (add-one smoothed)."""
    right, wrong = [1.0] * tokenizer.vocab_size, [1.0] * tokenizer.vocab_size
    for entry in entries:
        ids = tokenizer.encode(entry["response"])
        for token in ids[:-1] if entry["errors"] else ids:
            right[token] += 1
        if entry["errors"]:  # the text ends with its mistake
            wrong[ids[-1]] += 1
    return [r / (r + w) for r, w in zip(right, wrong)]


# ---- evaluation

class Oracle(Rule):
    """Keeps what the grammar finds right: the best that a judge could do. It reads the tokens back,
    and so runs on the host."""

    name = "oracle"
    on_host = True

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.problem: Problem | None = None
        self.so_far: list[int] = []  # tokens of the answer that are committed; Bench keeps it

    def score(self, seen: Verified) -> torch.Tensor:
        """1 up to the first mistake of the text that the draft goes on with, 0 from there on."""
        decoder, right = self.tokenizer.stream(skip_special=False), []
        text = decoder.push(self.so_far)
        for token in seen.drafted.tolist():
            text += decoder.push([token])
            right.append(self.problem.first_mistake(text) == len(text))
        return torch.tensor(right, dtype=torch.float32).cumprod(0)


class TokenIdentity(Rule):
    """The control: a score that looks at nothing but the drafted token."""

    name = "token_identity"

    def __init__(self, scores: list[float], threshold: float):
        self.scores, self.threshold = torch.tensor(scores), threshold

    def to(self, device: torch.device) -> TokenIdentity:
        self.scores = self.scores.to(device)
        return self

    def score(self, seen: Verified) -> torch.Tensor:
        return self.scores[seen.drafted]


class Way(NamedTuple):
    """One way of WAYS to answer, at a K, with the judge's or the control's threshold; the judge's
    head is the pair's, or that of a file."""

    rule: str
    speculate_k: int = 16
    threshold: float | None = None
    head: str | None = None

    def __str__(self) -> str:
        return f"{self.rule}, K={self.speculate_k}" + (f", threshold {self.threshold:g}" if self.threshold is not None else "")


class Bench:
    """The pair, loaded once, and every way to answer with it: a rule, perhaps with a threshold, perhaps with its own K."""

    def __init__(self, pair: Path, *, dtype: torch.dtype, compile: bool, max_k: int):
        self.target, self.draft = (Transformer.from_checkpoint(pair / name, dtype=dtype) for name in ("target", "draft"))
        for model in (self.target, self.draft):  # once, for the largest K: an engine that made them anew would recompile the rest
            model.setup_caches(1, MAX_SEQ_LENGTH + 2 * (max_k + 1) + 1)
        self.head = JudgeHead.load(pair / "judge.safetensors")
        self.tokenizer = Tokenizer.from_checkpoint(pair / "target")
        self.identity_scores = json.loads((pair / "token_identity.json").read_text())
        self.oracle = Oracle(self.tokenizer)
        self.options = {"max_seq_length": MAX_SEQ_LENGTH, "tokenizer": self.tokenizer, "compile": compile}
        self.engines: dict[tuple[bool, int], Engine] = {}
        self.rules: dict[Way, Rule] = {}

    def engine(self, way: Way) -> Engine:
        """The draft alone, or the pair: made when first asked for, one for each K; it compiles what
        is first run."""
        alone, k = way.rule == "draft", way.speculate_k
        if (alone, k) not in self.engines:
            models = (self.draft,) if alone else (self.target, self.draft)
            self.engines[alone, k] = Engine(*models, speculate_k=k, **self.options)
        return self.engines[alone, k]

    def find_head(self, way: Way) -> JudgeHead:
        return JudgeHead.load(way.head) if way.head else self.head

    def rule(self, way: Way) -> str | Rule:
        """What `generate` takes; one object a way, as rules are compiled by object."""
        if way.rule in ("draft", "target"):
            return "none"
        if way.rule == "oracle":
            return self.oracle
        if way not in self.rules:
            self.rules[way] = (TokenIdentity(self.identity_scores, way.threshold)
                               if way.rule == "token_identity" else
                               make_rule(way.rule, head=self.find_head(way),
                                         threshold=way.threshold))
        return self.rules[way]

    def answer(self, problem: Problem, way: Way) -> dict:
        """Answer one problem greedily; what the statistics need of it."""
        engine = self.engine(way)
        ids = self.tokenizer.encode_prompt(problem.prompt)
        self.oracle.problem, self.oracle.so_far = problem, []
        for block in engine.generate(ids, max_new_tokens=MAX_NEW_TOKENS, rule=self.rule(way)):
            self.oracle.so_far += block.tokens
        stats = engine.stats
        right = stats["finish_reason"] == "stop" and problem.is_right(stats["text"])
        return {"right": right, "accepted": stats["accepted_exact"] + stats["accepted_judge"],
                "rounds": stats["rounds"], "new_tokens": stats["new_tokens"],
                "tokens": stats["tokens"]}


_worker: list[Bench] = []  # one in each worker process, none elsewhere


def _start_worker(pair: Path, ways: tuple[Way, ...], dtype: torch.dtype, compile: bool) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    compile = compile and can_compile(device) is None
    if compile:
        setup_compiler(device)
    max_k = max(way.speculate_k for way in ways)
    _worker.append(Bench(pair, dtype=dtype, compile=compile, max_k=max_k))


def _answer_all(problem: Problem, ways: tuple[Way, ...]) -> list[dict]:
    return [_worker[0].answer(problem, way) for way in ways]


@contextlib.contextmanager
def worker_environment():
    """What processes that are started within see of the environment."""
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def answer_problems(pair: Path, problems: list[Problem], ways: tuple[Way, ...], *,
                    dtype: torch.dtype, workers: int, compile: bool) -> dict[Way, list[dict]]:
    """Answer every problem in every way, one thread a worker; per way a list in the order of the problems."""
    pool = ProcessPoolExecutor(workers, mp_context=torch.multiprocessing.get_context("spawn"),
                               initializer=_start_worker, initargs=(pair, ways, dtype, compile))
    with worker_environment(), pool:
        results = list(tqdm(pool.map(_answer_all, problems, [ways] * len(problems), chunksize=4), total=len(problems),
                            desc=f"answer in {len(ways)} ways", unit=" problems", smoothing=0.05))
    return {way: [result[i] for result in results] for i, way in enumerate(ways)}


def summary(answers: list[dict]) -> dict:
    """Means over answers; acceptance is pooled over rounds."""
    rounds = sum(a["rounds"] for a in answers)
    return {"accuracy": statistics.mean(a["right"] for a in answers),
            "accepted_per_round": sum(a["accepted"] for a in answers) / rounds,
            "tokens_per_round": sum(a["new_tokens"] - 1 for a in answers) / rounds,
            "mean_new_tokens": statistics.mean(a["new_tokens"] for a in answers)}


def paired_difference(ours: list[dict], theirs: list[dict]) -> dict:
    """Mean difference of accuracy over the same problems, with a 95% interval (normal approximation)."""
    differences = [a["right"] - b["right"] for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(differences)
    half = statistics.NormalDist().inv_cdf(0.975) * statistics.stdev(differences) / len(differences) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def held_out(seed: int, count: int) -> list[Problem]:
    """Problems of a stream of its own that neither training nor the judge's data nor validation contain."""
    if seed in (TRAIN_SEED, HEAD_SEED):
        raise ValueError(f"got --seed {seed}, which training used; expected another one")
    exclude = training_prompts()
    exclude |= {p.prompt for p in fresh_problems(HEAD_SEED, HEAD_PROBLEMS, exclude=exclude)}
    if seed != VALIDATION_SEED:
        exclude |= {p.prompt for p in fresh_problems(VALIDATION_SEED, VALIDATION_PROBLEMS, exclude=exclude)}
    elif count > VALIDATION_PROBLEMS:
        raise ValueError(f"got --problems {count}, expected at most {VALIDATION_PROBLEMS}: more are not kept from the held-out ones")
    return fresh_problems(seed, count, exclude=exclude)


def run_prompts(args: argparse.Namespace) -> None:
    """Write held-out problems as prompt lines: what a person would bring who has no grammar."""
    check_writable(args.output)
    lines = [json.dumps({"prompt": problem.prompt, "answer": NUMBERS[problem.answer]})
             for problem in held_out(args.seed, args.problems)]
    write_text(Path(args.output), "\n".join(lines) + "\n")
    print(f"wrote {len(lines)} prompts to {args.output}")


def settings(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """What a report says of itself: machine, commit, command, torch version; and its settings."""
    about = machine(torch.device("cpu")) | {"threads": 1}  # of a worker
    pair = "bundled pair" if args.pair == DEMO else str(args.pair)
    return {"machine": about, "pair": pair, "problems": args.problems,
            "seed": getattr(args, "seed", VALIDATION_SEED), "dtype": str(dtype).removeprefix("torch."),
            "workers": args.workers, "compiled": args.compile}


def write_report(path: str | None, report: dict) -> None:
    if path:
        write_text(Path(path), json.dumps(report, indent=1) + "\n")


def answering(args: argparse.Namespace) -> tuple[torch.dtype, dict]:
    """dtype, and how to answer (options of answer_problems)."""
    check_writable(args.json)
    dtype = pick_dtype(args.dtype, MODELS["target"], torch.device("cpu"))
    return dtype, {"dtype": dtype, "workers": args.workers, "compile": args.compile}


def print_difference(name: str, d: dict) -> None:
    print(f"accuracy, {name}: {100 * d['mean']:+.2f} points "
          f"[{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]")


def run_evaluate(args: argparse.Namespace) -> None:
    """Accuracy, acceptance and length of answers of every way over N problems; prints the table."""
    if args.seed == VALIDATION_SEED:
        raise ValueError(f"got --seed {args.seed}, on which thresholds were chosen; expected another one")
    dtype, options = answering(args)
    path = args.judge or args.pair / "judge.safetensors"
    head = JudgeHead.load(path)
    head.check(ModelConfig.from_checkpoint(args.pair / "target").hidden_size)
    problems = held_out(args.seed, args.problems)
    threshold = head.threshold if args.threshold is None else args.threshold
    thresholds = {"judge": threshold, "token_identity": args.identity_threshold}
    ways = {rule: Way(rule, args.speculate_k, thresholds.get(rule),
                      str(path) if rule == "judge" else None) for rule in WAYS}
    found = answer_problems(args.pair, problems, tuple(ways.values()), **options)
    answers = {rule: found[way] for rule, way in ways.items()}
    report: dict[str, dict] = {rule: summary(each) for rule, each in answers.items()}
    report["paired"] = {f"judge - {rule}": paired_difference(answers["judge"], answers[rule])
                        for rule in ("target", "draft", "oracle", "token_identity")}
    report["exact_differs_from_target"] = sum(
        a["tokens"] != b["tokens"] for a, b in zip(answers["exact"], answers["target"]))
    report["settings"] = settings(args, dtype) | {
        "speculate_k": args.speculate_k, "threshold": threshold, "judge": str(path),
        "identity_threshold": args.identity_threshold}
    print(f"\n{'rule':<16}{'accuracy':>9}{'accepted/round':>16}{'tokens/round':>14}"
          f"{'tokens/answer':>15}")
    for rule in WAYS:
        row = report[rule]
        print(f"{rule:<16}{100 * row['accuracy']:9.1f}{row['accepted_per_round']:16.2f}"
              f"{row['tokens_per_round']:14.2f}{row['mean_new_tokens']:15.1f}")
    for name, difference in report["paired"].items():
        print_difference(name, difference)
    write_report(args.json, report)


def run_int8(args: argparse.Namespace) -> None:
    """The pair in int8 beside the pair as stored, over the same problems: accuracy of target and judge, tokens kept."""
    dtype, options = answering(args)
    problems = held_out(args.seed, args.problems)
    target, judge = Way("target", args.speculate_k), Way("judge", args.speculate_k)
    report: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        pairs = {"stored": args.pair, "int8": Path(scratch)}
        for name in MODELS:
            quantize_checkpoint(args.pair / name, pairs["int8"] / name)
        for name in ("judge.safetensors", "token_identity.json"):
            shutil.copy(args.pair / name, pairs["int8"] / name)
        answers = {name: answer_problems(pair, problems, (target, judge), **options)
                   for name, pair in pairs.items()}
    print(f"\n{'pair':<10}{'target accuracy':>17}{'judge accuracy':>16}{'accepted/round':>16}")
    for name in pairs:
        report[name] = {"target": summary(answers[name][target]), "judge": summary(answers[name][judge])}
        print(f"{name:<10}{report[name]['target']['accuracy']:17.2%}{report[name]['judge']['accuracy']:16.2%}"
              f"{report[name]['judge']['accepted_per_round']:16.2f}")
    report["paired"] = {str(way.rule): paired_difference(answers["int8"][way], answers["stored"][way]) for way in (target, judge)}
    for rule, difference in report["paired"].items():
        print_difference(f"{rule}, int8 - stored", difference)
    report["settings"] = settings(args, dtype) | {"speculate_k": args.speculate_k}
    write_report(args.json, report)


def run_sweep(args: argparse.Namespace) -> None:
    """Choose thresholds on validation problems, by acceptance and accuracy at K = 16."""
    dtype, options = answering(args)
    problems = held_out(VALIDATION_SEED, args.problems)
    ways = [Way("draft"), Way("target"), Way("oracle"), Way("exact"), *(Way("judge", 16, t) for t in args.thresholds),
            *(Way("token_identity", 16, t) for t in args.identity_thresholds)]
    answers = answer_problems(args.pair, problems, tuple(ways), **options)
    rows = [{**way._asdict(), **summary(answers[way])} for way in ways]
    for way, row in zip(ways, rows):
        print(f"{way!s:<40} accuracy {row['accuracy']:6.1%}  accepted/round {row['accepted_per_round']:5.2f}")
    write_report(args.json, {"settings": settings(args, dtype), "rows": rows})


def maker_arguments(commands, run: Callable, name: str, help: str) -> argparse.ArgumentParser:
    """A command that makes a part of a pair."""
    parser = commands.add_parser(name, help=help)
    parser.add_argument("--work", type=Path, default=WORK,
                        help="texts and training state (%(default)s)")
    parser.add_argument("--pair", type=Path, default=WORK / "pair", metavar="DIR",
                        help="where the pair is written (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch (default: its choice)")
    parser.set_defaults(run=run)
    return parser


def reader_arguments(commands, run: Callable, name: str, help: str, *,
                     problems: int) -> argparse.ArgumentParser:
    """A command that answers problems with a pair."""
    parser = commands.add_parser(name, help=help)
    add = parser.add_argument
    add("--pair", type=Path, default=DEMO, metavar="DIR",
        help="target, draft and judge.safetensors (default: the bundled pair)")
    add("--problems", type=int, default=problems, help="default: %(default)s")
    add("--workers", type=int, default=os.cpu_count(),
        help="processes of one thread (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="default: as generate.py runs the pair on this CPU")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="default: on")
    add("--json", metavar="FILE", help="write the report")
    parser.set_defaults(run=run)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maker_arguments(commands, run_data, "data", "write the tokenizer and the training texts")
    train = maker_arguments(commands, run_train, "train",
                            "train one model; resumes where it was stopped")
    train.add_argument("--model", choices=MODELS, required=True)
    train.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    head = maker_arguments(commands, run_head, "head",
                           "label the draft's proposals and train the judge head on them")
    head.add_argument("--problems", type=int, default=HEAD_PROBLEMS, help="default: %(default)s")
    head.add_argument("rest", nargs="*", help="options of train_head.py, after --")
    evaluate = reader_arguments(commands, run_evaluate, "evaluate",
                                "accuracy and acceptance of every rule", problems=2000)
    int8 = reader_arguments(commands, run_int8, "int8", "accuracy and acceptance of the pair in "
                            "int8, beside the pair as stored", problems=2000)
    for command in (evaluate, int8):
        command.add_argument("--seed", type=int, default=1,
                             help="stream of held-out problems (default: %(default)s)")
        command.add_argument("--speculate_k", type=int, default=16, help="default: %(default)s")
    prompts = commands.add_parser("prompts", help="write problems as prompt lines with answers")
    prompts.add_argument("--seed", type=int, required=True, help="stream of held-out problems")
    prompts.add_argument("--problems", type=int, required=True, metavar="N")
    prompts.add_argument("--output", required=True, metavar="FILE")
    prompts.set_defaults(run=run_prompts)
    evaluate.add_argument("--judge", type=Path, metavar="HEAD", help="default: the pair's own head")
    evaluate.add_argument("--threshold", type=float, help="default: the head's own")
    evaluate.add_argument("--identity_threshold", type=float, default=0.95, help="the control's, by sweep (default: %(default)s)")
    sweep = reader_arguments(commands, run_sweep, "sweep",
                             "choose thresholds on validation problems", problems=200)
    sweep.add_argument("--thresholds", type=float, nargs="*", default=[0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
    sweep.add_argument("--identity_thresholds", type=float, nargs="*", default=[0.5, 0.7, 0.8, 0.9, 0.95])
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    args.run(args)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        print(f"demo_pair.py: {error}", file=sys.stderr)
        sys.exit(2)
