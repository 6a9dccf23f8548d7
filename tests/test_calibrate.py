"""calibrate.py: the bound, the walk against a brute force, the claim it rests on, the promise.

The walk reruns nothing that a greedy run has said already: "valid for every δ in [low, high)" is
tried on real rounds of the bundled pair, just inside and just outside.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import terminal
from generate import Engine
from judge import JudgeHead
from model import Transformer
from scripts import calibrate
from scripts.answers import CHECKS
from scripts.calibrate import (
    Walk,
    allowed,
    main,
    parse_args,
    promise,
    prompts_needed,
    sequence,
    upper_bound,
    walk_down,
)
from scripts.demo_pair import problem_at
from tokenizer import Tokenizer

stats = pytest.importorskip("scipy.stats")

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "checkpoints" / "demo"


# ---- the bound

@pytest.mark.parametrize(("share", "needed"), [(0.01, (299, 473, 773)), (0.02, (149, 236, 386))])
def test_prompts_needed_for_a_promise(share, needed):
    """Known values: prompts for none, one and three regressions."""
    for regressions, prompts in zip((0, 1, 3), needed):
        assert upper_bound(regressions, prompts) <= share < upper_bound(regressions, prompts - 1)
        assert allowed(prompts, share) == regressions
        assert allowed(prompts - 1, share) == regressions - 1
    assert prompts_needed(share) == needed[0]


@pytest.mark.parametrize(("regressions", "prompts"), [(0, 9), (1, 20), (7, 50), (19, 20)])
def test_bound_is_where_so_few_regressions_become_unlikely(regressions, prompts):
    """Clopper and Pearson: the share at which as many or fewer happen with probability 5%."""
    share = upper_bound(regressions, prompts)
    few = sum(math.comb(prompts, k) * share ** k * (1 - share) ** (prompts - k)
              for k in range(regressions + 1))
    assert few == pytest.approx(0.05, abs=1e-9)


def test_bound_of_nothing_but_regressions():
    assert upper_bound(5, 5) == 1.0
    assert allowed(4, 0.5) == -1 and allowed(5, 0.5) == 0  # 1 - 0.05 ** (1 / 5) = 0.451
    for share in (0.5, 0.3, 0.05, 0.0123):
        needed = prompts_needed(share)
        assert allowed(needed, share) == 0 and allowed(needed - 1, share) == -1


def test_promise_ends_before_the_first_failure():
    most = allowed(236, 0.02)
    assert most == 1
    assert promise([0, 0, 1, 1], 236, 0.02) == 3
    assert promise([0, 1, 2, 0, 0], 236, 0.02) == 1  # what comes after a failure does not count
    assert promise([2, 0, 0], 236, 0.02) is None
    assert promise([0], 148, 0.02) is None  # not even none of so few
    assert promise([], 236, 0.02) is None


def test_sequence_reaches_the_lowest():
    assert sequence(0.25, 0.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert len(sequence(0.05, 0.0)) == 21 and sequence(0.05, 0.0)[-1] == 0.0
    assert sequence(0.1, 0.7) == [1.0, 0.9, 0.8, 0.7]
    assert sequence(0.3, 0.0) == [1.0, 0.7, 0.4, 0.1]  # never below


# ---- the walk

class Scripted:
    """A prompt whose run is a step function of δ: other results, tokens and rounds a piece."""

    def __init__(self, rng: random.Random, grid: list[float], *, right: float = 0.7):
        scores = [rng.random() for _ in range(rng.randint(0, 6))]
        scores += rng.sample(grid, rng.randint(0, 2))  # a score that is a threshold
        self.borders = sorted({0.0, *(float(np.float32(score)) for score in scores), 2.0})
        self.pieces = [{"result": rng.choices(("7", "8", None), (right, 0.2, 0.1))[0],
                        "new_tokens": rng.randint(2, 60), "rounds": rng.randint(1, 40)}
                       for _ in self.borders[1:]]

    def piece(self, threshold: float) -> int:
        """Which piece a run at δ is of: as the engine compares, in float32."""
        return sum(border <= float(np.float32(threshold)) for border in self.borders) - 1

    def run(self, threshold: float) -> dict:
        i = self.piece(threshold)
        return {"low": self.borders[i], "high": self.borders[i + 1], **self.pieces[i]}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step", [0.05, 0.1, 0.25])
def test_walk_is_a_brute_force_with_fewer_runs(seed, step):
    rng, thresholds = random.Random(f"{seed} {step}"), sequence(step, 0.0)
    prompts = [Scripted(rng, thresholds) for _ in range(30)]
    alone = [rng.choice(("7", "7", "7", "8", None)) for _ in prompts]
    expected = [rng.choice(("7", "7", "7", own)) for own in alone]
    made = []

    def answer(index: int, threshold: float) -> dict:
        made.append((index, prompts[index].piece(threshold)))
        return prompts[index].run(threshold)

    brute = []
    for threshold in thresholds:
        runs = [prompt.run(threshold) for prompt in prompts]
        brute.append({
            "threshold": threshold,
            "regressions": sum(own == right and own is not None and run["result"] != right
                               for right, own, run in zip(expected, alone, runs)),
            "tokens_per_round": sum(run["new_tokens"] - 1 for run in runs)
            / sum(run["rounds"] for run in runs)})
    walk = Walk(len(prompts), answer)
    assert walk_down(walk, expected, alone, thresholds, most=None, quiet=True) == brute
    seen = {(index, prompt.piece(threshold)) for index, prompt in enumerate(prompts)
            for threshold in thresholds}
    assert Counter(made) == Counter(seen)  # each piece that a threshold meets, once
    assert len(made) < len(prompts) * len(thresholds)
    # another walk, from loose to strict and finer, is answered by the same runs where it can be
    for threshold in reversed(thresholds):
        for index, prompt in enumerate(prompts):
            assert walk.at(index, threshold) == prompt.run(threshold)
    assert len(made) == len(seen)


def test_walk_breaks_off_at_the_first_step_with_too_many():
    """The step that breaks off is left out, and its other prompts are not run."""
    made = []

    def answer(index: int, threshold: float) -> dict:
        made.append((index, threshold))
        return {"low": threshold, "high": 2.0, "new_tokens": 11, "rounds": 5,
                "result": "7" if threshold > 0.5 or index == 3 else "8"}

    steps = walk_down(Walk(4, answer), ["7"] * 4, ["7"] * 4, [1.0, 0.75, 0.5, 0.25], most=1,
                      quiet=True)
    assert [step["threshold"] for step in steps] == [1.0, 0.75]
    assert all(step["regressions"] == 0 and step["tokens_per_round"] == 2.0 for step in steps)
    assert [index for index, threshold in made if threshold == 0.5] == [0, 1]
    assert not any(threshold == 0.25 for _, threshold in made)


def test_a_regression_is_what_the_target_alone_gets_right():
    for expected, alone, judged, regressed in (
            ("7", "7", "7", False), ("7", "7", "8", True), ("7", "7", None, True),
            ("7", "8", "8", False), ("7", "8", "9", False), ("7", None, None, False),
            ("7", "8", "7", False), (None, None, None, False), (None, None, "7", False)):
        assert calibrate.regressed(expected, alone, judged) is regressed, (expected, alone, judged)


# ---- the promise

def just_above(rng: random.Random, share: float, thresholds: list[float]) -> list[float]:
    """One jump from nothing to just over the share: what is hardest to see."""
    return [0.0] * 4 + [share * 1.01] * (len(thresholds) - 4)


def always_above(rng: random.Random, share: float, thresholds: list[float]) -> list[float]:
    """Just over the share from the second step on, each step's regressions on their own."""
    return [0.0] + [share * 1.01] * (len(thresholds) - 1)


def climbing(rng: random.Random, share: float, thresholds: list[float]) -> list[float]:
    """From nothing to three times the share."""
    return [3 * share * i / (len(thresholds) - 1) for i in range(len(thresholds))]


def jumping(rng: random.Random, share: float, thresholds: list[float]) -> list[float]:
    """No order at all."""
    return [0.0, 0.0, 0.0] + [rng.choice((0.2, 0.9, 1.3)) * share for _ in thresholds[3:]]


SHARE, PROMPTS, REPETITIONS = 0.1, 76, 200  # 76 allow 3 regressions: a bound of 9.9%
POPULATION = 4000


def population(shape: Callable, seed: int, thresholds: list[float]) -> np.ndarray:
    """bool [prompts, thresholds]: whether a prompt regresses there; a column's mean is the truth.

    `just_above` and `climbing` are monotone in each prompt; the others draw every step anew.
    """
    rng, generator = random.Random(seed), np.random.default_rng(seed)
    shares = np.array(shape(rng, SHARE, thresholds))
    once = shape in (just_above, climbing)
    luck = generator.permuted(np.tile((np.arange(POPULATION) + 0.5) / POPULATION,
                                      (1 if once else len(thresholds), 1)), axis=1)
    return (luck < shares[:, None]).T


def broken_promises(shape: Callable, seed: int, stop: Callable) -> int:
    """How often, of REPETITIONS samples, the walk ends where the truth is above the share."""
    thresholds = sequence(0.1, 0.0)
    regresses, broken = population(shape, seed, thresholds), 0
    truth = regresses.mean(0)
    generator = np.random.default_rng(seed + 1)
    for _ in range(REPETITIONS):
        some = regresses[generator.integers(POPULATION, size=PROMPTS)]

        def answer(index: int, threshold: float, some=some) -> dict:
            at = thresholds.index(threshold)
            exact = float(np.float32(threshold))
            return {"low": exact, "high": float(np.nextafter(np.float32(exact), np.float32(2))),
                    "result": "8" if some[index, at] else "7", "new_tokens": 2, "rounds": 1}

        steps = walk_down(Walk(PROMPTS, answer), ["7"] * PROMPTS, ["7"] * PROMPTS, thresholds,
                          most=None, quiet=True)
        chosen = stop([step["regressions"] for step in steps])
        broken += chosen is not None and truth[chosen] > SHARE
    return broken


def kept(regressions: list[int]) -> int | None:
    return promise(regressions, PROMPTS, SHARE)


def without_a_bound(regressions: list[int]) -> int | None:
    """Wrong: the share in the sample is taken for the truth."""
    most = int(SHARE * PROMPTS)
    first = next((i for i, n in enumerate(regressions) if n > most), len(regressions))
    return first - 1 if first else None


def past_a_failure(regressions: list[int]) -> int | None:
    """Wrong: the loosest threshold that passes, whatever failed before it."""
    passing = [i for i, n in enumerate(regressions) if n <= allowed(PROMPTS, SHARE)]
    return passing[-1] if passing else None


# at most 5% break, and as many more as a sample of 200 may show (once in a thousand)
MOST_BROKEN = int(stats.binom.ppf(0.999, REPETITIONS, 0.05))


@pytest.mark.parametrize("shape", [just_above, always_above, climbing, jumping])
def test_promise_holds_whatever_the_curve(shape):
    assert allowed(PROMPTS, SHARE) == 3
    assert broken_promises(shape, 11, kept) <= MOST_BROKEN


@pytest.mark.parametrize(("shape", "wrong"), [(just_above, without_a_bound),
                                              (always_above, without_a_bound),
                                              (always_above, past_a_failure)])
def test_wrong_rules_break_the_promise(shape, wrong):
    """The test above can fail."""
    assert broken_promises(shape, 11, wrong) > 2 * MOST_BROKEN


# ---- on the bundled pair

@pytest.fixture(scope="module")
def engine() -> Engine:
    target, draft = (Transformer.from_checkpoint(DEMO / name, dtype=torch.float32)
                     for name in ("target", "draft"))
    return Engine(target, draft, JudgeHead.load(DEMO / "judge.safetensors"), speculate_k=16,
                  max_seq_length=256, tokenizer=Tokenizer.from_checkpoint(DEMO / "target"))


def answer_at(engine: Engine, index: int, threshold: float) -> dict:
    """A judged answer to problem `index` and how it came about."""
    rule = engine.rules["judge"]
    rule.threshold = threshold
    ids = engine.tokenizer.encode_prompt(problem_at(5, index).prompt)
    for _ in engine.generate(ids, max_new_tokens=60, rule=rule):
        pass
    return {key: engine.stats[key] for key in ("tokens", "sources", "rounds", "same_thresholds")}


@pytest.mark.parametrize("index", [1, 3])
def test_a_run_holds_inside_its_thresholds_and_not_outside(engine, index):
    """The border scores are those of two tokens: beyond either, that token goes the other way.

    Where it does, the target's token stands in place of the draft's or the reverse, and they
    differ, so the answer must, too. Float32 scores are equal as long as the tokens are.
    """
    inside = outside = 0
    for threshold in (0.9, 0.75, 0.4):
        run = answer_at(engine, index, threshold)
        low, high = run["same_thresholds"]
        assert low <= float(np.float32(threshold)) < (2.0 if high is None else high)
        within, beyond = [low], []
        if high is not None:
            within.append(float(np.nextafter(np.float32(high), np.float32(0))))
            beyond.append(high)
        if low > 0:
            beyond.append(float(np.nextafter(np.float32(low), np.float32(0))))
        for other in within:
            assert answer_at(engine, index, other) == run, (threshold, other)
            inside += other != threshold
        for other in beyond:
            again = answer_at(engine, index, other)
            assert (again["tokens"], again["rounds"], again["sources"]) != (
                run["tokens"], run["rounds"], run["sources"]), (threshold, other)
            outside += 1
    assert inside >= 3 and outside >= 3


def test_walk_on_real_runs_is_a_brute_force(engine):
    """From strict to loose, a prompt's runs are those made at each δ, with fewer of them."""
    made = []

    def answer(index: int, threshold: float) -> dict:
        made.append(threshold)
        run = answer_at(engine, 3, threshold)
        low, high = run["same_thresholds"]
        return run | {"low": low, "high": 2.0 if high is None else high}

    walk, thresholds = Walk(1, answer), sequence(0.1, 0.0)
    walked = [walk.at(0, threshold)["tokens"] for threshold in thresholds]
    assert len(made) < len(thresholds)
    left = [i for i, threshold in enumerate(thresholds) if threshold not in made]
    assert [answer_at(engine, 3, thresholds[i])["tokens"] for i in left] == \
        [walked[i] for i in left]


def test_stop_tokens_do_not_count_as_refused(engine, monkeypatch):
    """The judge has no say there: no δ keeps them, so their score is no border.

    What the exact rule and the judge refuse in one run is made a stop token in the next.
    """
    index, threshold = 3, 0.9
    run = answer_at(engine, index, threshold)
    low, _ = run["same_thresholds"]
    looser = answer_at(engine, index, float(np.nextafter(np.float32(low), np.float32(0))))
    at = next(i for i, pair in enumerate(zip(run["tokens"], looser["tokens"]))
              if pair[0] != pair[1])
    refused = looser["tokens"][at]  # the draft's token, of the highest score that was refused
    assert looser["sources"][at] == "judge" and refused not in run["tokens"][:at + 1]
    monkeypatch.setattr(engine, "stop_tokens", (*engine.stop_tokens, refused))
    monkeypatch.setattr(engine, "stops", torch.tensor(engine.stop_tokens))
    stopping = answer_at(engine, index, threshold)
    assert stopping["tokens"][:at + 1] == run["tokens"][:at + 1]
    assert stopping["same_thresholds"][0] < low
    inside = answer_at(engine, index, stopping["same_thresholds"][0])
    assert inside == stopping


# ---- the command

def write_prompts(path: Path, count: int, *, answers: bool = True) -> Path:
    """Problems of a stream that no head was trained on, short ones."""
    problems = sorted((problem_at(5, i) for i in range(4 * count)), key=lambda p: len(p.prompt))
    with path.open("w") as file:
        for problem in problems[:count]:
            line = {"prompt": problem.prompt, "domain": "word problems"}
            if answers:
                line["answer"] = problem.answer
            file.write(json.dumps(line) + "\n")
    return path


def options(prompts: Path, head: Path, *others: str) -> list[str]:
    return ["--checkpoint_path", str(DEMO / "target"), "--draft_checkpoint_path",
            str(DEMO / "draft"), "--judge", str(DEMO / "judge.safetensors"), "--output", str(head),
            "--prompts", str(prompts), "--check", "number", "--no-compile", "--dtype", "float32",
            "--device", "cpu", "--max_new_tokens", "100", *others]


@pytest.mark.parametrize(("given", "share", "needed"), [(148, 0.02, 149), (298, 0.01, 299)])
def test_too_few_prompts_are_refused(tmp_path, monkeypatch, capsys, given, share, needed):
    """Exit status 2, one line that says how many, and not a weight read."""
    monkeypatch.setattr(Transformer, "from_checkpoint", lambda *_, **__: pytest.fail("weights"))
    prompts = write_prompts(tmp_path / "unseen.jsonl", given)
    args = parse_args(options(prompts, tmp_path / "head", "--max_regressions", str(share)))
    with pytest.raises(SystemExit) as left:
        terminal.run_main(lambda: main(args), "calibrate.py")
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert f"got {given} prompts, expected {needed} or more" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["unseen.jsonl"]


@pytest.mark.parametrize(("line", "others", "message"), [
    ({"prompt": "q", "answer": "none"}, (), "1 answers have nothing that --check number finds"),
    ({"prompt": "word " * 3000, "answer": "7"}, (), "expected fewer than the context's"),
    ({"prompt": "q", "answer": "7"}, ("--max_regressions", "0"), "got --max_regressions 0.0"),
    ({"prompt": "q", "answer": "7"}, ("--step", "0"), "got --step 0.0"),
    ({"prompt": "q", "answer": "7"}, ("--limit", "4"), "got 4 prompts, expected 5 or more"),
    ({"prompt": "q", "answer": "7"}, ("--output", "/nowhere/head"), "/nowhere"),
])
def test_what_does_not_fit_is_refused(tmp_path, monkeypatch, line, others, message):
    monkeypatch.setattr(Transformer, "from_checkpoint", lambda *_, **__: pytest.fail("weights"))
    prompts = tmp_path / "unseen.jsonl"
    fitting = {"prompt": "q", "answer": "#### 7"}
    fitting = [fitting | {"prompt": f"q{i}"} for i in range(4)]
    prompts.write_text("\n".join(json.dumps(each) for each in [*fitting, line]))
    args = parse_args(options(prompts, tmp_path / "head", "--max_regressions", "0.5", *others))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(args)


def test_a_killed_run_goes_on_and_runs_nothing_twice(engine, tmp_path, monkeypatch, capsys):
    """Without references, so the target's own results count as right."""
    prompts = write_prompts(tmp_path / "unseen.jsonl", 5, answers=False)
    head, made, alone, answer_with = tmp_path / "head", [], [], calibrate.answer_with

    def counted(engine, prompt, check, rule, max_new_tokens):
        if len(made) == kill_at:
            raise KeyboardInterrupt
        run = answer_with(engine, prompt, check, rule, max_new_tokens)
        made.append((prompt.text, "none" if rule == "none" else (run["low"], run["high"])))
        if rule == "none":
            alone.append((prompt.text, run["result"]))
        return run

    monkeypatch.setattr(calibrate, "answer_with", counted)
    args = ["--max_regressions", "0.5", "--step", "0.5", "--lowest", "0.5"]
    journal = tmp_path / "head.calibration"
    for kill_at in (3, 8):  # among the target's own answers, within the walk
        with pytest.raises(KeyboardInterrupt):
            main(parse_args(options(prompts, head, *args)))
        assert not head.exists() and len(journal.read_text().splitlines()) == 1 + kill_at
        with journal.open("ab") as file:
            file.write(b'{"index": 3, "rule": "ju')  # half a line, of a kill while it was written
    kill_at = None
    capsys.readouterr()
    main(parse_args(options(prompts, head, *args)))
    assert not journal.exists()
    assert len(made) == len(set(made))  # no prompt twice at δs for which one run holds
    assert Counter(what for _, what in made)["none"] == 5
    said = capsys.readouterr().out
    about = json.loads(JudgeHead.load(head).metadata["calibration"])
    assert about["prompts"] == 5 and about["regressions"] == 0  # 5 allow none
    assert about["domain"] == "word problems" and about["check"] == "number"
    assert f"{about['regressions']} of 5 were here" in said

    # what was said agrees with the runs that it is about
    rule = engine.rules["judge"]
    rule.threshold, right = JudgeHead.load(head).threshold, 0
    assert rule.threshold in (1.0, 0.5)
    for text, own in alone:
        for _ in engine.generate(engine.tokenizer.encode_prompt(text), max_new_tokens=100,
                                 rule=rule):
            pass
        right += str(CHECKS["number"](engine.stats["text"])) == own
    assert right == 5


def test_expected_results_are_the_references_or_the_targets_own():
    prompts = [calibrate.Prompt("a", answer="so 1,200"), calibrate.Prompt("b")]
    right = calibrate.expected_results(prompts, ["3", "4"], CHECKS["number"])
    assert right == [str(CHECKS["number"]("1200")), "4"]
    assert calibrate.expected_results(prompts[1:], [None], CHECKS["number"]) == [None]


@pytest.mark.slow
def test_command_line(tmp_path):
    """Twice the prompts that 30% needs, as a user runs it."""
    count = 2 * prompts_needed(0.3)
    prompts, head = write_prompts(tmp_path / "unseen.jsonl", count), tmp_path / "head.safetensors"
    command = [sys.executable, str(ROOT / "scripts" / "calibrate.py"),
               *options(prompts, head, "--max_regressions", "0.3", "--step", "0.25",
                        "--record", str(tmp_path / "record.json"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    calibrated, before = JudgeHead.load(head), JudgeHead.load(DEMO / "judge.safetensors")
    assert torch.equal(calibrated.weight, before.weight)
    assert torch.equal(calibrated.bias, before.bias)
    about = json.loads(calibrated.metadata["calibration"])
    record = json.loads((tmp_path / "record.json").read_text())
    assert (about["prompts"], about["max_regressions"]) == (count, 0.3)
    assert about["confidence"] == 0.95 and about["draft"] == "draft"
    assert (about["dtype"], about["speculate_k"]) == ("float32", 16)
    bound = upper_bound(about["regressions"], count)
    assert about["bound"] == pytest.approx(bound, abs=1e-5) and bound <= 0.3
    regressions = [step["regressions"] for step in record["steps"]]
    assert [step["threshold"] for step in record["steps"]] == [1.0, 0.75, 0.5, 0.25, 0.0]
    chosen = record["steps"][promise(regressions, count, 0.3)]
    assert (chosen["threshold"], chosen["regressions"]) == (
        calibrated.threshold, about["regressions"])
    for step in record["steps"]:  # the record has enough to count anew
        exact = float(np.float32(step["threshold"]))
        counted = sum(next(bad for low, high, bad in runs if low <= exact < high)
                      for runs in record["runs"])
        assert counted == step["regressions"]
    for said in (f"With 95% confidence, at threshold {calibrated.threshold:g} at most "
                 f"{about['bound']:.2%} of prompts like these (word problems)",
                 f"{about['regressions']} of {count} were here", f"wrote it into {head}",
                 f"{chosen['threshold']:<10g}*", "next: python generate.py"):
        assert said in done.stdout, said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "head.safetensors", "record.json", "unseen.jsonl"]
    failed = subprocess.run([*command, "--limit", "8"], capture_output=True, text=True,
                            cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert "got 8 prompts, expected 9 or more" in failed.stderr
