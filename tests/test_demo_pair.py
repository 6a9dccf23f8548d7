"""The bundled pair and its maker: the grammar against enumeration, the checkpoints as others open them, the main command."""

import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from generate import DEMO, DEMO_PROMPT, Engine
from judge import JudgeHead
from model import Transformer
from scripts import demo_pair
from scripts.demo_pair import Alt, problem_at, walk, write
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def enumerate_texts(node) -> list[str]:
    if isinstance(node, str):
        return [node]
    if isinstance(node, Alt):
        return [text for option in node for text in enumerate_texts(option)]
    return ["".join(parts) for parts in itertools.product(*map(enumerate_texts, node))]


def test_first_mistake_agrees_with_enumeration():
    grammar = ["a", Alt("b", "bc", ["c", Alt("d", "")]), Alt("ce", "e"), "f"]
    texts = enumerate_texts(grammar)
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("abcdef", k=rng.randint(0, 7)))
        expected = max(len(os.path.commonprefix((text, right))) for right in texts)
        assert walk(grammar, text, {0})[1] == expected, text


def test_every_wording_is_right_and_mistakes_are_found_where_they_are():
    for index in range(300):
        problem, rng = problem_at(123, index), random.Random(index)
        for writer in ("target", "draft", "any"):
            text = write(problem.solution, rng, writer)
            assert problem.first_mistake(text) == len(text) and problem.is_right(text)
        at = text.rindex(demo_pair.NUMBERS[problem.answer])
        other = demo_pair.NUMBERS[(problem.answer + 1) % len(demo_pair.NUMBERS)]
        wrong = text[:at] + other + "."
        assert at <= problem.first_mistake(wrong) < len(wrong) and not problem.is_right(wrong)
        stranger = next(name for name in demo_pair.NAMES if name not in problem.prompt)
        name = next(word.strip(",.:") for word in text.split() if word.strip(",.:") in demo_pair.NAMES)
        wrong = text.replace(name, stranger, 1)
        assert text.index(name) <= problem.first_mistake(wrong) <= text.index(name) + 1


def test_problems_survive_the_way_to_a_worker():
    problem = problem_at(5, 0)
    assert pickle.loads(pickle.dumps(problem)) == problem


def test_held_out_problems_are_in_no_training_text():
    problems = demo_pair.held_out(1, 200)
    seen = demo_pair.training_prompts()
    assert len({p.prompt for p in problems}) == 200 and not seen & {p.prompt for p in problems}
    with pytest.raises(ValueError, match="which training used"):
        demo_pair.held_out(demo_pair.TRAIN_SEED, 1)


def test_slips_are_mistakes_and_are_put_right():
    slips = 0
    for index in range(100):
        problem, rng = problem_at(123, index), random.Random(index)
        solution = write(problem.solution, rng, "target")
        before = ""
        for text, right in demo_pair.with_slips(problem, solution, rng):
            if not right:
                slips += 1
                assert problem.first_mistake(before + text) < len(before + text)
            elif text != " - no,":
                before += text
        assert before == solution
    assert slips > 100


def test_the_draft_never_meets_what_is_unknown_to_it():
    met = [any(word in problem_at(0, index, **kind).prompt for word in demo_pair.UNKNOWN for index in range(300))
           for kind in (demo_pair.KINDS["draft"], demo_pair.KINDS["target"])]
    assert met == [False, True]


def test_mistake_spans_cover_one_word():
    assert demo_pair.mistake_span("so Mia has nine", 3) == [3, 6]
    assert demo_pair.mistake_span("so Mia has nine", 11) == [11, 15]
    assert demo_pair.mistake_span("a, b", 1) == [1, 2]


@pytest.fixture(scope="module")
def pair():
    return (Transformer.from_checkpoint(DEMO / "target", dtype=torch.float32),
            Transformer.from_checkpoint(DEMO / "draft", dtype=torch.float32),
            JudgeHead.load(DEMO / "judge.safetensors"), Tokenizer.from_checkpoint(DEMO / "target"))


def test_pair_is_small_and_complete():
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) <= 25_000_000
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (DEMO / "target" / name).is_file() and (DEMO / "draft" / name).is_file()


@pytest.mark.parametrize("name", ["target", "draft"])
@torch.no_grad()
def test_pair_opens_in_transformers(name, pair):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / name)
    chat = [{"role": "user", "content": DEMO_PROMPT}]
    ids = pair[3].encode_chat(chat)
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == ids
    ours = pair[0] if name == "target" else pair[1]
    tokens = torch.tensor([ids])
    ref = theirs(tokens).logits
    assert (ours.logits(ours(tokens)) - ref).norm() / ref.norm() < 2e-5
    assert set(ours.config.eos_token_ids) == set(theirs.generation_config.eos_token_id)


def test_dimensions_divide_for_eight_ranks(pair):
    for model in pair[:2]:
        config = model.config
        assert config.num_kv_heads < config.num_heads
        for size in (config.num_heads, config.hidden_size, config.vocab_size):
            assert size % 8 == 0
        assert config.intermediate_size % 32 == 0


def test_rules_on_held_out_problems(pair):
    """A small version of `demo_pair.py evaluate`: lossless is lossless, and the judge keeps far more at nearly no cost."""
    target, draft, head, tokenizer = pair
    engine = Engine(target, draft, head, speculate_k=16, max_seq_length=384, tokenizer=tokenizer)
    stats = {"none": [], "exact": [], "judge": []}
    right = dict.fromkeys(stats, 0)
    problems = demo_pair.held_out(1, 12)
    for problem in problems:
        ids = tokenizer.encode_chat([{"role": "user", "content": problem.prompt}])
        for rule, entries in stats.items():
            for _ in engine.generate(ids, max_new_tokens=256, rule=rule):
                pass
            entries.append(engine.stats)
            right[rule] += problem.is_right(engine.stats["text"])
    assert [s["tokens"] for s in stats["exact"]] == [s["tokens"] for s in stats["none"]]
    accepted = {rule: sum(s["accepted_exact"] + s["accepted_judge"] for s in entries) / sum(s["rounds"] for s in entries)
                for rule, entries in stats.items()}
    assert accepted["judge"] > 2 * accepted["exact"] > 0
    assert right["none"] >= 0.85 * len(problems) and right["judge"] >= right["none"] - 0.1 * len(problems)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_writes_the_cpus_tokens(pair, compile):
    """The whole way on a GPU, fused kernel included, in float32; no tie is known on these problems."""
    tokenizer, answers = pair[3], []
    for device in ("cpu", "cuda"):
        target, draft = (Transformer.from_checkpoint(DEMO / name, device=device, dtype=torch.float32)
                         for name in ("target", "draft"))
        head = JudgeHead.load(DEMO / "judge.safetensors")
        engine = Engine(target, draft, head, max_seq_length=256, tokenizer=tokenizer, compile=compile and device == "cuda")
        answers.append([])
        for problem in demo_pair.held_out(1, 5):
            ids = tokenizer.encode_chat([{"role": "user", "content": problem.prompt}])
            for rule in ("none", "exact", "judge"):
                for _ in engine.generate(ids, max_new_tokens=160, rule=rule):
                    pass
                answers[-1].append(engine.stats["tokens"])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("flags", [["--no-compile"], []], ids=["uncompiled", "compiled"])
def test_main_command_shows_three_rules(flags, tmp_path):
    out = tmp_path / "out.json"
    done = subprocess.run([sys.executable, str(ROOT / "generate.py"), "--judge", *flags, "--json", str(out)], capture_output=True,
                          text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines()[-3:]]
    assert rows == ["target", "exact", "judge"]
    sample, = json.loads(out.read_text())
    assert sample["rule"] == "judge" and sample["prompt"] == DEMO_PROMPT and sample["text"].strip() in done.stdout
    assert ("compiling:" in done.stderr) is (not flags)
