"""Set a judge's threshold to a promise: at most so many answers of the target's are made worse.

A regression is a prompt that the target alone gets right and the judged run gets wrong. δ goes
from strict (1: the exact rule) to loose, and the walk stops before the upper 95% Clopper-Pearson
bound of the share of regressions, among all prompts, passes --max_regressions. As a fixed sequence
that ends at its first failure it promises, whatever the curve looks like: with 95% confidence, the
share on prompts like these is no larger. One greedy run is valid for every δ between the highest
score that it refused and the lowest that it kept, so few steps of the walk run anything anew.

    python scripts/calibrate.py --checkpoint_path TARGET --draft_checkpoint_path DRAFT \\
        --judge judge.safetensors --prompts unseen.jsonl --check number --max_regressions 0.02

Prompts must not be the head's training prompts, and must be as those to come: a promise on GSM8K
says nothing of code. Without an `answer` in the file, the target's own result counts as right. The
threshold and its evidence (prompts, regressions, bound, domain) go into the head's metadata. The
promise is of greedy answers. A second try after a look at the first needs other prompts. Runs
are kept in HEAD.calibration, from which a killed run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import terminal  # noqa: E402
import tp  # noqa: E402
from checkpoint import ModelConfig, atomic_write  # noqa: E402
from generate import Engine  # noqa: E402
from judge import JudgeHead  # noqa: E402
from scripts.answers import CHECKS, Prompt, read_prompts  # noqa: E402
from scripts.jobs import Journal, PairSetup, check_paths, file_hash, pair_options  # noqa: E402

try:
    from scipy.stats import beta
    MISSING = None
except ImportError as error:
    MISSING = error.name

CONFIDENCE = 0.95


def upper_bound(regressions: int, prompts: int, confidence: float = CONFIDENCE) -> float:
    """One-sided Clopper-Pearson bound of a share: regressions of prompts -> share."""
    if regressions >= prompts:
        return 1.0
    return float(beta.ppf(confidence, regressions + 1, prompts - regressions))


def prompts_needed(share: float, confidence: float = CONFIDENCE) -> int:
    """Fewest prompts whose bound, without a regression, is at most `share`."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - share))


def allowed(prompts: int, share: float) -> int:
    """Most regressions whose bound is at most `share`; -1 where even none is too many."""
    most = -1
    while most + 1 < prompts and upper_bound(most + 1, prompts) <= share:
        most += 1
    return most


def promise(regressions: list[int], prompts: int, share: float) -> int | None:
    """How far a walk gets: the last index before the first whose bound passes `share`, or None."""
    most = allowed(prompts, share)
    first = next((i for i, count in enumerate(regressions) if count > most), len(regressions))
    return first - 1 if first else None


class Walk:
    """Greedy runs of each prompt at falling thresholds; `answer(index, δ)` makes one.

    A run is a dict: low and high (it is the same for every δ in [low, high)), result, new_tokens,
    rounds. What is known already is not run.
    """

    def __init__(self, count: int, answer: Callable[[int, float], dict]):
        self.runs: list[list[dict]] = [[] for _ in range(count)]
        self.answer = answer

    def at(self, index: int, threshold: float) -> dict:
        """The run of prompt `index` that holds at this δ."""
        exact = float(np.float32(threshold))  # as scores are compared
        for run in reversed(self.runs[index]):
            if run["low"] <= exact < run["high"]:
                return run
        run = self.answer(index, threshold)
        self.runs[index].append(run)
        return run


def answer_with(engine: Engine, prompt: Prompt, check: Callable, rule: str | object,
                max_new_tokens: int) -> dict:
    """One greedy answer: its result (None: unfinished, or none found) and what the walk needs."""
    ids = engine.tokenizer.encode_prompt(prompt.text, system=prompt.system)
    for _ in engine.generate(ids, max_new_tokens=max_new_tokens, rule=rule):
        pass
    stats = engine.stats
    low, high = stats["same_thresholds"] or (0.0, None)
    found = check(stats["text"]) if stats["finish_reason"] == "stop" else None
    return {"result": None if found is None else str(found), "low": low,
            "high": 2.0 if high is None else high,
            "new_tokens": stats["new_tokens"], "rounds": stats["rounds"]}


def regressed(expected: str | None, alone: str | None, judged: str | None) -> bool:
    """Whether the target alone is right and the judged run is not."""
    return alone is not None and alone == expected and judged != expected


def sequence(step: float, lowest: float) -> list[float]:
    """Thresholds from 1 down to `lowest`, `step` apart."""
    count = int((1 - lowest) / step + 1e-9)
    return [round(1 - i * step, 6) for i in range(count + 1)]


def walk_down(walk: Walk, expected: list[str | None], alone: list[str | None],
              thresholds: list[float], *, most: int | None, quiet: bool = False) -> list[dict]:
    """The steps from strict to loose, to the first with more than `most` regressions (None: all).

    A step is a dict: threshold, regressions, tokens_per_round; the one that breaks off is left out.
    """
    steps = []
    bar = tqdm(thresholds, desc="thresholds, strict to loose", unit=" steps", disable=quiet)
    for threshold in bar:
        count = tokens = rounds = 0
        for index, (right, own) in enumerate(zip(expected, alone)):
            run = walk.at(index, threshold)
            count += regressed(right, own, run["result"])
            tokens, rounds = tokens + run["new_tokens"] - 1, rounds + run["rounds"]
            if most is not None and count > most:
                return steps
            bar.set_postfix(threshold=threshold, regressions=count, refresh=False)
        steps.append({"threshold": threshold, "regressions": count,
                      "tokens_per_round": tokens / max(rounds, 1)})
    return steps


def print_steps(steps: list[dict], chosen: int | None, prompts: int) -> None:
    """A row a step, and a mark (*) at the chosen one."""
    print(f"\n{'threshold':<11}{'regressions':>12}{'bound':>9}{'tokens a round':>16}")
    for i, step in enumerate(steps):
        count = step["regressions"]
        print(f"{step['threshold']:<10g}{'*' if i == chosen else ' '}{count:>12}"
              f"{upper_bound(count, prompts):>9.2%}{step['tokens_per_round']:>16.2f}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--judge", required=True, metavar="HEAD", help="the head; its metadata gets the threshold")
    add("--output", metavar="HEAD", help="where the calibrated head goes (default: over --judge)")
    add("--prompts", required=True, metavar="FILE",
        help="JSON lines: prompt (perhaps system, answer, domain), or GSM8K's; unseen in training")
    add("--check", choices=CHECKS, required=True, help="what makes two answers the same")
    add("--max_regressions", type=float, default=0.02, metavar="SHARE",
        help="of all prompts, at most (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="the first N prompts alone")
    add("--lowest", type=float, default=0.0, help="where the walk ends (default: %(default)s)")
    add("--step", type=float, default=0.05, metavar="δ",
        help="of the walk; a finer one finds a little more speed and runs more (%(default)s)")
    add("--record", metavar="FILE",
        help="walk on to --lowest and write what every prompt did at every threshold")
    return pair_options(parser, speculate_k=16).parse_args(argv)


def check_options(args: argparse.Namespace) -> list[Prompt]:
    """The prompts; ValueError for options out of range or prompts too few to promise anything."""
    if MISSING:
        raise ValueError(f"got no {MISSING}, expected it; pip install -r requirements-train.txt")
    for name, low, high in (("max_regressions", 1e-6, 0.5), ("lowest", 0, 1), ("limit", 1, 1e12),
                            ("step", 1e-4, 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"got --{name} {value}, expected a number from {low:g} to {high:g}")
    args.output = args.output or args.judge
    check_paths(inputs=[args.prompts], outputs=[args.output, args.record])
    read = read_prompts(args.prompts, limit=args.limit)
    prompts = list({(prompt.text, prompt.system): prompt for prompt in read}.values())
    if len(prompts) < len(read):
        terminal.say(f"{len(read) - len(prompts)} prompts occur twice and count once")
    needed = prompts_needed(args.max_regressions)
    if len(prompts) < needed:
        raise ValueError(
            f"{args.prompts}: got {len(prompts)} prompts, expected {needed} or more: with fewer, "
            f"no run without a single regression could promise at most {args.max_regressions:g} "
            f"with {CONFIDENCE:.0%} confidence; give more, or ask for less")
    unknown = sum(prompt.answer is not None and CHECKS[args.check](prompt.answer) is None
                  for prompt in prompts)
    if unknown:
        raise ValueError(f"{args.prompts}: {unknown} answers have nothing that --check "
                         f"{args.check} finds, expected one in each; mend them or take another")
    return prompts


class Calibration:
    """Runs prompts through a journal, so that none is run twice."""

    def __init__(self, engine: Engine, prompts: list[Prompt], journal: Journal, args):
        self.engine, self.prompts, self.journal, self.args = engine, prompts, journal, args
        self.check, self.rule = CHECKS[args.check], engine.rules["judge"]
        self.alone: dict[int, str | None] = {}
        self.walk = Walk(len(prompts), self.judged)
        for line in journal.lines:
            if line["rule"] == "none":
                self.alone[line["index"]] = line["result"]
            else:
                self.walk.runs[line["index"]].append(line)

    def judged(self, index: int, threshold: float) -> dict:
        """A judged run of a prompt."""
        self.rule.threshold = threshold
        return self.run(index, self.rule, "judge")

    def run(self, index: int, rule: object, name: str) -> dict:
        line = {"index": index, "rule": name, **answer_with(
            self.engine, self.prompts[index], self.check, rule, self.args.max_new_tokens)}
        self.journal.append(line)
        return line

    def target_alone(self) -> list[str | None]:
        """The target's own results."""
        missing = [index for index in range(len(self.prompts)) if index not in self.alone]
        for index in tqdm(missing, desc="target alone", unit=" prompts", disable=self.quiet):
            self.alone[index] = self.run(index, "none", "none")["result"]
        return [self.alone[index] for index in range(len(self.prompts))]

    quiet = property(lambda self: self.engine.shard.rank > 0)


def evidence(args: argparse.Namespace, prompts: list[Prompt], regressions: int | None,
             setup: PairSetup) -> dict:
    """What the head's metadata says of its threshold; regressions None: nothing is promised."""
    domains = sorted({prompt.domain for prompt in prompts if prompt.domain})
    return {"max_regressions": args.max_regressions, "confidence": CONFIDENCE,
            "prompts": len(prompts), "regressions": regressions,
            "bound": None if regressions is None else round(
                upper_bound(regressions, len(prompts)), 5),
            "domain": ", ".join(domains) or Path(args.prompts).name, "check": args.check,
            "draft": setup.draft_path.resolve().name, "speculate_k": args.speculate_k,
            "dtype": str(setup.dtype).removeprefix("torch."), "temperature": 0.0,
            "max_new_tokens": args.max_new_tokens}


def expected_results(prompts: list[Prompt], alone: list[str | None],
                     check: Callable) -> list[str | None]:
    """The right results: the references', or the target's own where there is none."""
    return [own if prompt.answer is None else str(check(prompt.answer))
            for prompt, own in zip(prompts, alone)]


def write_record(args: argparse.Namespace, steps: list[dict], walk: Walk,
                 expected: list[str | None], alone: list[str | None], about: dict) -> None:
    """All steps, and of each prompt its runs: [low, high, whether it regressed]."""
    runs = [[[run["low"], run["high"], regressed(right, own, run["result"])] for run in each]
            for each, right, own in zip(walk.runs, expected, alone)]
    target_right = sum(own is not None and own == right for right, own in zip(expected, alone))
    record = {**about, "command": shlex.join(["python", *sys.argv]), "target_right": target_right,
              "steps": steps, "runs": runs}
    with atomic_write(args.record) as aside:
        aside.write_text(json.dumps(record) + "\n")


def conclude(args: argparse.Namespace, prompts: list[Prompt], calibration: Calibration,
             head: JudgeHead, setup: PairSetup) -> None:
    """Walk, say what can be promised, and write it into the head."""
    alone = calibration.target_alone()
    expected = expected_results(prompts, alone, calibration.check)
    most = allowed(len(prompts), args.max_regressions)
    thresholds = sequence(args.step, args.lowest)
    steps = walk_down(calibration.walk, expected, alone, thresholds,
                      most=None if args.record else most, quiet=calibration.quiet)
    if calibration.quiet:
        return
    chosen = promise([step["regressions"] for step in steps], len(prompts), args.max_regressions)
    print_steps(steps, chosen, len(prompts))
    if args.record:
        count = None if chosen is None else steps[chosen]["regressions"]
        write_record(args, steps, calibration.walk, expected, alone,
                     evidence(args, prompts, count, setup))
    if chosen is None:
        raise ValueError(
            f"got more than {most} regressions even at threshold 1, where only rounding parts the "
            "judged run from the target alone; expected fewer: take more prompts that were not "
            "used here, or --dtype float32")
    step = steps[chosen]
    about = evidence(args, prompts, step["regressions"], setup)
    head.metadata |= {"threshold": str(step["threshold"]), "calibration": json.dumps(about)}
    head.save(args.output)
    print(f"\nWith {CONFIDENCE:.0%} confidence, at threshold {step['threshold']:g} at most "
          f"{about['bound']:.2%} of prompts like these ({about['domain']}) are answered wrong that "
          f"the target alone gets right: {step['regressions']} of {len(prompts)} were here. "
          f"{step['tokens_per_round']:.2f} tokens a round, {steps[0]['tokens_per_round']:.2f} by "
          f"the exact rule.")
    if chosen + 1 < len(thresholds):
        print(f"The next step, {thresholds[chosen + 1]:g}, had more than the {most} regressions "
              f"that {len(prompts)} prompts allow at {args.max_regressions:g}.")
    if chosen == 0:
        print("So the judge keeps nothing: nothing looser can be promised. Train a better head, or "
              "take more prompts that were not used here: what is asked for after a look at these "
              "would be no promise.")
    print(f"wrote it into {args.output}\nnext: python generate.py "
          f"--checkpoint_path {args.checkpoint_path} --draft_checkpoint_path "
          f"{args.draft_checkpoint_path} --judge {args.output}")


def main(args: argparse.Namespace) -> None:
    """Run the command line; ValueError and OSError are a user's mistakes."""
    prompts = check_options(args)
    setup, head = PairSetup.from_args(args), JudgeHead.load(args.judge)
    head.check(ModelConfig.from_checkpoint(args.checkpoint_path).hidden_size)
    longest = max(len(setup.tokenizer.encode_prompt(prompt.text, system=prompt.system))
                  for prompt in prompts)
    if longest >= setup.context:
        raise ValueError(f"{args.prompts}: got a prompt of {longest} tokens, expected fewer than "
                         f"the context's {setup.context}")
    shard = tp.start(setup.device)
    terminal.only_first_rank_speaks(shard)
    target, draft = setup.load(shard)
    engine = Engine(target, draft, head, speculate_k=setup.speculate_k, compile=setup.compile,
                    max_seq_length=setup.length(longest), tokenizer=setup.tokenizer)
    journal_path = Path(f"{args.output}.calibration")
    # the head by its tensors: a calibrated copy of it is the same head
    tensors = head.weight.numpy().tobytes() + head.bias.numpy().tobytes()
    key = {"prompts": file_hash(args.prompts), "check": args.check, "limit": args.limit,
           "head": hashlib.sha256(tensors).hexdigest()[:16], "step": args.step,
           "lowest": args.lowest, "max_regressions": args.max_regressions, **setup.key()}
    with Journal(journal_path, key, shard) as journal:
        conclude(args, prompts, Calibration(engine, prompts, journal, args), head, setup)
    if shard.rank == 0:
        journal_path.unlink()
    tp.stop()


if __name__ == "__main__":
    terminal.run_main(lambda: main(parse_args()), "calibrate.py")
