"""The bundled pair and its maker: the grammar against enumeration, the checkpoints as others open them, the main command."""

import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from generate import Engine
from judge import JudgeHead, Verified
from model import Transformer
from scripts import demo_pair
from scripts.demo_pair import Alt, problem_at, walk, write
from terminal import DEMO, DEMO_PROMPT, DEMO_PROMPTS
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


def test_held_out_problems_are_in_no_training_text(monkeypatch):
    """All streams made one, so that every problem is met again by all who take from them."""
    sizes = {"TRAIN_PROBLEMS": 300, "HEAD_PROBLEMS": 40, "VALIDATION_PROBLEMS": 50}
    for name, size in sizes.items():
        monkeypatch.setattr(demo_pair, name, size)
    monkeypatch.setattr(demo_pair, "problem_at", lambda seed, *args, **kind: problem_at(0, *args, **kind))
    demo_pair.training_prompts.cache_clear()
    try:
        seen = demo_pair.training_prompts()
        problems = [demo_pair.fresh_problems(demo_pair.HEAD_SEED, 40, exclude=seen),
                    demo_pair.held_out(demo_pair.VALIDATION_SEED, 50), demo_pair.held_out(1, 20)]
    finally:
        demo_pair.training_prompts.cache_clear()
    prompts = [problem.prompt for each in problems for problem in each]
    assert len(set(prompts)) == len(prompts) == 110 and not seen & set(prompts)
    assert len(seen) > 1000  # what is practised counts too
    with pytest.raises(ValueError, match="which training used"):
        demo_pair.held_out(demo_pair.TRAIN_SEED, 1)
    with pytest.raises(ValueError, match="at most 50"):
        demo_pair.held_out(demo_pair.VALIDATION_SEED, 51)


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


def test_rules_on_fresh_problems(pair):
    """A small version of `demo_pair.py evaluate`: lossless is lossless, and the judge keeps far more at nearly no cost."""
    target, draft, head, tokenizer = pair
    engine = Engine(target, draft, head, speculate_k=16, max_seq_length=384, tokenizer=tokenizer)
    stats = {"none": [], "exact": [], "judge": []}
    right = dict.fromkeys(stats, 0)
    problems = [problem_at(1, index) for index in range(4)]
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
        for problem in (problem_at(1, index) for index in range(5)):
            ids = tokenizer.encode_chat([{"role": "user", "content": problem.prompt}])
            for rule in ("none", "exact", "judge"):
                for _ in engine.generate(ids, max_new_tokens=160, rule=rule):
                    pass
                answers[-1].append(engine.stats["tokens"])
    assert answers[0] == answers[1]


def test_what_is_made_goes_into_a_folder_of_its_own():
    made = ROOT / "build" / "demo" / "pair"
    for command in (["data"], ["train", "--model", "draft"], ["head"]):
        assert demo_pair.parse_args(command).pair == made
    for command in ("evaluate", "int8", "sweep"):
        assert demo_pair.parse_args([command]).pair == DEMO
        assert demo_pair.parse_args([command, "--pair", "x"]).pair == Path("x")


@pytest.fixture(scope="module")
def bench() -> demo_pair.Bench:
    return demo_pair.Bench(DEMO, dtype=torch.float32, compile=False, max_k=8)


def answer(bench: demo_pair.Bench, problem: demo_pair.Problem, way: demo_pair.Way) -> list[tuple[str, str]]:
    """(text, source) of each token."""
    result = bench.answer(problem, way)
    sources = bench.engine(way).stats["sources"]
    return [(bench.tokenizer.decode([token]), source) for token, source in zip(result["tokens"], sources)]


def test_oracle_keeps_what_the_grammar_finds_right(bench):
    kept = 0
    for index in range(3):
        problem, text = problem_at(7, index), ""
        for piece, source in answer(bench, problem, demo_pair.Way("oracle", 8)):
            if source == "oracle":
                kept += 1
                assert problem.first_mistake(text + piece) == len(text + piece)
            text += piece
    assert kept > 20


def test_control_keeps_tokens_by_their_own_score(bench):
    problem, scores = problem_at(7, 0), bench.identity_scores
    kept = [bench.tokenizer.encode(piece) for piece, source in
            answer(bench, problem, demo_pair.Way("token_identity", 8, 0.9))
            if source == "token_identity"]
    assert len(kept) > 5 and all(scores[ids[0]] > 0.9 for ids in kept)
    exact, strict = (bench.answer(problem, way) for way in (
        demo_pair.Way("exact", 8), demo_pair.Way("token_identity", 8, 1.0)))
    assert exact == strict  # no score is above 1
    seen = Verified(None, None, torch.tensor([2, 0, 2]), None, None, None)
    assert demo_pair.TokenIdentity([0.25, 0.5, 0.75], 0.9).score(seen).tolist() == [0.75, 0.25, 0.75]


def test_judge_takes_a_threshold_of_its_own(bench):
    problem = problem_at(7, 1)
    exact, strict, free = (bench.answer(problem, way) for way in (
        demo_pair.Way("exact", 8), demo_pair.Way("judge", 8, 1.0), demo_pair.Way("judge", 8, 0.5)))
    assert exact == strict and free["rounds"] < exact["rounds"]


def test_evaluate(tmp_path, monkeypatch, capsys):
    """In one worker process, uncompiled, over problems that need no list of the training's."""
    monkeypatch.setattr(demo_pair, "held_out",
                        lambda seed, count: [problem_at(seed, index) for index in range(count)])
    out = tmp_path / "eval.json"
    demo_pair.main(demo_pair.parse_args([
        "evaluate", "--problems", "2", "--speculate_k", "8", "--workers", "1", "--no-compile", "--dtype", "float32",
        "--json", str(out)]))
    report = json.loads(out.read_text())
    assert all(set(report[way]) == {"accuracy", "accepted_per_round", "tokens_per_round",
                                    "mean_new_tokens"} for way in demo_pair.WAYS)
    assert report["oracle"]["accepted_per_round"] > report["exact"]["accepted_per_round"]
    assert report["exact"]["mean_new_tokens"] == report["target"]["mean_new_tokens"] > 30
    assert report["target"]["tokens_per_round"] == 1 and report["exact_differs_from_target"] == 0
    about = report["settings"]["machine"]
    assert {"commit", "command", "device", "torch"} <= set(about) and about["threads"] == 1
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:8]]
    assert rows == list(demo_pair.WAYS)


def test_workers_see_one_thread_and_the_environment_comes_back(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    with demo_pair.worker_environment():
        assert demo_pair.WORKER_ENVIRONMENT.items() <= os.environ.items()
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompt_of_the_demo_script_is_answered_rightly(dtype):
    prompt, = re.findall(r'--prompt "(.+)"', (ROOT / "scripts" / "demo.sh").read_text())
    assert DEMO_PROMPTS.match(prompt) and prompt != DEMO_PROMPT
    bench = demo_pair.Bench(DEMO, dtype=dtype, compile=False, max_k=16)
    problem = demo_pair.Problem(prompt, [], 10)  # (2 + 5) · 2 - 4
    assert all(bench.answer(problem, demo_pair.Way(rule))["right"]
               for rule in ("target", "exact", "judge"))


def test_main_command_shows_three_rules(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "generate.py"), "--judge", "--no-compile",
               "--max_new_tokens", "24", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines()[-3:]]
    assert rows == ["target", "exact", "judge"]
    sample, = json.loads(out.read_text())
    assert sample["rule"] == "judge" and sample["prompt"] == DEMO_PROMPT
    assert sample["text"].strip() in done.stdout and "compiling" not in done.stderr
