"""How good labels without annotators are, on the bundled pair, where a grammar knows the truth.

    python scripts/bench_labels.py truth --seed 3 --problems 400 --output truth.jsonl
    python scripts/bench_labels.py labels swap=swap.jsonl bisect=bisect.jsonl --seed 3 \\
        --problems 400 --costs swap=swap.json bisect=bisect.json --json labels.json
    python scripts/bench_labels.py heads truth=a.safetensors swap=b.safetensors --json heads.json
    python scripts/bench_labels.py calibration --record record.json

`truth` labels the draft's proposals by the grammar, as the bundled head's were. `labels` compares
what scripts/label.py wrote with the grammar, on the tokens that the exact rule rejects, for two
questions: is the token wrong (no right wording goes on so), and does it change the answer (the
target, going on from there, ends with another result)? `heads` evaluates trained heads, each at its
own threshold, over the same held-out problems. `calibration` draws prompts from a record of
calibrate.py again and again, and counts how often the promise is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import terminal  # noqa: E402
import tp  # noqa: E402
import train_head  # noqa: E402
from checkpoint import DTYPES, atomic_write, check_writable  # noqa: E402
from judge import JudgeHead, greedy  # noqa: E402
from model import Transformer  # noqa: E402
from scripts import calibrate, demo_pair  # noqa: E402
from scripts.answers import CHECKS, Prompt  # noqa: E402
from scripts.bench_tools import machine  # noqa: E402
from scripts.demo_pair import NUMBERS, Problem, Way, write_report  # noqa: E402
from scripts.jobs import PairSetup  # noqa: E402
from scripts.label import ANSWERS  # noqa: E402
from scripts.labelers import Pair, Task  # noqa: E402
from scripts.report import percent  # noqa: E402
from terminal import DEMO  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

AUC_PROBLEMS = 300  # of the validation stream, by whose proposals heads are compared


class Judged(NamedTuple):
    """A labelled token that the exact rule rejects, and what is true of it."""

    problem: Problem
    ids: list[int]  # the response up to it, itself included
    right: bool  # by the labeler
    score: float | None
    wrong: bool  # by the grammar


def named_files(pairs: list[str]) -> dict[str, Path]:
    """NAME=FILE, … as a dict; ValueError for another form, FileNotFoundError for no file."""
    found = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals):
            raise ValueError(f"got {pair!r}, expected NAME=FILE")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: got no file, expected one")
        found[name] = Path(path)
    return found


def run_truth(args: argparse.Namespace) -> None:
    """Write the grammar's labels for the draft's proposals, as demo_pair.py's head has them."""
    check_writable(args.output)
    draft = Transformer.from_checkpoint(DEMO / "draft", dtype=torch.float32)
    tokenizer = Tokenizer.from_checkpoint(DEMO / "target")
    lines = [json.dumps(entry) for entry in proposed(
        draft, tokenizer, demo_pair.held_out(args.seed, args.problems))]
    with atomic_write(args.output) as aside:
        aside.write_text("\n".join(lines) + "\n")
    print(f"wrote {len(lines)} answers to {args.output}")


def proposed(draft: Transformer, tokenizer: Tokenizer, problems: list[Problem]) -> list[dict]:
    """The draft's proposals along right texts of all three writers, labelled by the grammar."""
    entries = []
    for index, problem in enumerate(tqdm(problems, desc="draft proposes", unit=" problems")):
        writer = ("draft", "any", "target")[index % 3]
        entries += demo_pair.proposals(draft, tokenizer, problem, writer, random.Random(index))
    return entries


@torch.inference_mode()
def judged_tokens(path: Path, problems: dict[str, Problem], target: Transformer,
                  tokenizer: Tokenizer) -> list[Judged]:
    """The labelled tokens of a file that the target's argmax differs from, with the truth."""
    found = []
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for line in tqdm(lines, desc=path.name, unit=" lines", leave=False):
        problem = problems.get(line["prompt"])
        if problem is None:
            continue
        prompt = tokenizer.encode_prompt(line["prompt"])
        ids = line.get("response_ids") or tokenizer.encode(line["response"])
        hidden = target(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1:-1]
        proposed, _ = greedy(target.logits(hidden))
        for label in line["labels"]:
            i = label["token"]
            if proposed[i] != ids[i]:
                text = tokenizer.decode(ids[:i + 1])
                wrong = problem.first_mistake(text) < len(text)
                found.append(Judged(problem, ids[:i + 1], label["right"], label["score"], wrong))
    return found


def changes_answer(token: Judged, pair: Pair) -> bool:
    """Whether the target, going on from the token, does not end with the right result."""
    task = Task(pair, Prompt(token.problem.prompt, answer=NUMBERS[token.problem.answer]),
                CHECKS["number"], seed=0)
    rest = pair.target_answer([*task.ids, *token.ids], task.room - len(token.ids), keep=True)
    return task.result([*token.ids, *rest]) != task.right


def agreement(said_wrong: list[bool], is_wrong: list[bool]) -> dict:
    """Precision and recall of "wrong", and how many are; None where there is nothing to divide."""
    both = sum(s and t for s, t in zip(said_wrong, is_wrong))
    said, true = sum(said_wrong), sum(is_wrong)
    return {"said_wrong": said, "is_wrong": true, "tokens": len(is_wrong),
            "precision": both / said if said else None, "recall": both / true if true else None}


def area(scores: list[float | None], wrong: list[bool]) -> float | None:
    """ROC-AUC of a score that should be low for wrong tokens; None where it is undefined."""
    if None in scores or len(set(wrong)) < 2:
        return None
    return float(roc_auc_score(wrong, [-score for score in scores]))


def run_labels(args: argparse.Namespace) -> None:
    """Compare label files with the grammar."""
    check_writable(args.json)
    files, cost_files = named_files(args.files), named_files(args.costs)
    setup = PairSetup.from_args(SimpleNamespace(
        checkpoint_path=DEMO / "target", draft_checkpoint_path=DEMO / "draft", device="cpu",
        dtype=args.dtype, compile=args.compile, speculate_k=8, max_new_tokens=160))
    target, draft = setup.load(tp.Shard())
    problems = {p.prompt: p for p in demo_pair.held_out(args.seed, args.problems)}
    pair = Pair(target, draft, setup, setup.length(200))
    report: dict = {"machine": machine(torch.device("cpu")), "problems": args.problems,
                    "seed": args.seed, "labelers": {}}
    for name, path in files.items():
        tokens = judged_tokens(path, problems, target, setup.tokenizer)
        some = random.Random(0).sample(tokens, min(args.sample, len(tokens)))
        changed = [changes_answer(token, pair)
                   for token in tqdm(some, desc=f"{name}: answers", unit=" tokens", leave=False)]
        row = {"grammar": agreement([not t.right for t in tokens], [t.wrong for t in tokens]),
               "answer": agreement([not t.right for t in some], changed),
               "auc_grammar": area([t.score for t in tokens], [t.wrong for t in tokens]),
               "auc_answer": area([t.score for t in some], changed)}
        if name in cost_files:
            cost = json.loads(cost_files[name].read_text())
            parts = cost["labelers"]
            if name in parts:  # of a run of several labelers, its own and the answers
                cost["labelers"] = {key: parts[key] for key in (name, ANSWERS) if key in parts}
            row["cost"] = cost
        report["labelers"][name] = row
    print_labels(report["labelers"])
    write_report(args.json, report)


def print_labels(rows: dict[str, dict]) -> None:
    """Precision and recall of "wrong" for both questions, a row a labeler."""
    print(f"\n{'':<14}{'rejected':>10}{'wrong by the grammar':>30}{'changes the answer':>30}\n"
          f"{'labels':<14}{'tokens':>10}" + f"{'share':>10}{'precision':>10}{'recall':>10}" * 2)
    for name, row in rows.items():
        cells = [percent(value, 1) for part in (row["grammar"], row["answer"]) for value in (
            part["is_wrong"] / max(part["tokens"], 1), part["precision"], part["recall"])]
        print(f"{name:<14}{row['grammar']['tokens']:>10,}" + "".join(f"{c:>10}" for c in cells))


def head_areas(heads: dict[str, Path]) -> dict[str, float | None]:
    """ROC-AUC of each head among rejected tokens, under the grammar's labels."""
    tokenizer = Tokenizer.from_checkpoint(DEMO / "target")
    target, draft = (Transformer.from_checkpoint(DEMO / name, dtype=torch.float32)
                     for name in ("target", "draft"))
    problems = demo_pair.held_out(demo_pair.VALIDATION_SEED, AUC_PROBLEMS)
    answers = [train_head.encode_answer(json.dumps(entry).encode(), tokenizer, context=2048,
                                        negatives="mistake")
               for entry in proposed(draft, tokenizer, problems)]
    parts = [train_head.hidden_states(target, [answer]) for answer in answers]
    hidden, rejected = map(torch.cat, zip(*parts))
    labels = torch.tensor([label for answer in answers for label in answer.labels])
    kept = rejected & (labels != train_head.LEFT_OUT)
    return {name: float(roc_auc_score(labels[kept], JudgeHead.load(path).score(hidden[kept])))
            for name, path in heads.items()}


def run_heads(args: argparse.Namespace) -> None:
    """Accuracy and tokens kept of every head, at its own threshold, on the same problems."""
    check_writable(args.json)
    heads = named_files(args.files)
    areas = head_areas(heads)
    dtype = tp.pick_dtype(args.dtype, demo_pair.MODELS["target"], torch.device("cpu"))
    K = args.speculate_k
    ways = {"target alone": Way("target", K), "exact rule": Way("exact", K),
            "oracle": Way("oracle", K), "token identity": Way("token_identity", K, 0.95)}
    thresholds = {name: JudgeHead.load(path).threshold for name, path in heads.items()}
    ways |= {name: Way("judge", K, thresholds[name], str(path)) for name, path in heads.items()}
    answers = demo_pair.answer_problems(
        DEMO, demo_pair.held_out(args.seed, args.problems), tuple(ways.values()), dtype=dtype,
        workers=args.workers, compile=args.compile)
    report: dict = {"machine": machine(torch.device("cpu")), "problems": args.problems,
                    "seed": args.seed, "speculate_k": K,
                    "dtype": str(dtype).removeprefix("torch."), "rows": {}}
    exact = demo_pair.summary(answers[ways["exact rule"]])["tokens_per_round"]
    first = next(iter(heads))  # the head that the others are compared with
    gain = demo_pair.summary(answers[ways[first]])["tokens_per_round"] - exact
    for name, way in ways.items():
        row = demo_pair.summary(answers[way])
        for other in ("target alone", first):
            row[f"less_{other}"] = demo_pair.paired_difference(answers[way], answers[ways[other]])
        if name in heads:
            row |= {"roc_auc": areas[name], "threshold": thresholds[name],
                    "gain": (row["tokens_per_round"] - exact) / gain}
        report["rows"][name] = row
    report["reference"] = first
    print_heads(report)
    write_report(args.json, report)


def print_heads(report: dict) -> None:
    """A row a way to answer."""
    first = report["reference"]
    print(f"\n{'':<18}{'AUC':>7}{'δ':>7}{'accuracy':>10}{'less ' + first:>24}{'tokens/round':>14}"
          f"{'gain':>7}{'tokens':>8}")
    for name, row in report["rows"].items():
        d = row[f"less_{first}"]
        interval = f"{100 * d['mean']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"
        auc = f"{row['roc_auc']:.3f}" if row.get("roc_auc") is not None else ""
        gain = percent(row["gain"], 1) if "gain" in row else ""
        print(f"{name:<18}{auc:>7}{row.get('threshold', ''):>7}{row['accuracy']:>10.2%}"
              f"{interval:>24}{row['tokens_per_round']:>14.2f}{gain:>7}"
              f"{row['mean_new_tokens']:>8.1f}")


def simulate(record: dict, *, share: float, sample: int, repetitions: int, seed: int) -> dict:
    """Draw `sample` prompts again and again, walk, and compare with the share among all."""
    thresholds = [step["threshold"] for step in record["steps"]]
    worse = np.array([[regressed_at(runs, threshold) for threshold in thresholds]
                      for runs in record["runs"]])  # [prompts, thresholds]
    true, rng = worse.mean(0), np.random.default_rng(seed)
    broken, chosen = 0, []
    for _ in range(repetitions):
        drawn = worse[rng.integers(len(worse), size=sample)]
        index = calibrate.promise(drawn.sum(0).tolist(), sample, share)
        broken += index is not None and true[index] > share
        chosen.append(None if index is None else thresholds[index])
    made = [one for one in chosen if one is not None]
    return {"max_regressions": share, "sample": sample, "repetitions": repetitions, "seed": seed,
            "prompts": len(worse), "broken": int(broken), "promised": len(made),
            "thresholds": [float(q) for q in np.quantile(made, (0, 0.25, 0.5, 0.75, 1))]
            if made else None, "true_share": dict(zip(map(str, thresholds), true.tolist()))}


def regressed_at(runs: list[list], threshold: float) -> bool:
    """Whether the prompt with these runs, [low, high, regressed], regresses at a threshold."""
    exact = float(np.float32(threshold))
    return next(bad for low, high, bad in reversed(runs) if low <= exact < high)


def run_calibration(args: argparse.Namespace) -> None:
    """How often a promise is broken, for several shares."""
    check_writable(args.json)
    record = json.loads(Path(args.record).read_text())
    results = [simulate(record, share=share, sample=args.sample, repetitions=args.repetitions,
                        seed=args.seed) for share in args.shares]
    print(f"{'share':>7}{'prompts drawn':>15}{'promises':>10}{'broken':>8}   thresholds promised "
          "(lowest, quartiles, highest)")
    for result in results:
        spread = ", ".join(f"{t:g}" for t in result["thresholds"] or ())
        print(f"{result['max_regressions']:>7g}{result['sample']:>15}{result['promised']:>10}"
              f"{result['broken']:>8}   {spread}")
    write_report(args.json, {"machine": machine(torch.device("cpu")),
                             "record": Path(args.record).name,
                             "record_command": record.get("command"), "results": results})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run, help: str, *, problems: int | None = None, seed: int = 1):
        made = commands.add_parser(name, help=help)
        made.set_defaults(run=run)
        if problems:
            made.add_argument("--problems", type=int, default=problems, help="(%(default)s)")
        made.add_argument("--seed", type=int, default=seed, help="(%(default)s)")
        if name != "truth":
            made.add_argument("--json", metavar="FILE", help="write the record")
        return made

    truth = command("truth", run_truth, "label by the grammar", problems=400, seed=3)
    truth.add_argument("--output", required=True, metavar="FILE")
    labels = command("labels", run_labels, "label files against the grammar", problems=400, seed=3)
    labels.add_argument("--costs", nargs="*", default=[], metavar="NAME=FILE",
                        help="what label.py --json wrote")
    labels.add_argument("--sample", type=int, default=600, metavar="N",
                        help="tokens a file whose answers are looked at (%(default)s)")
    heads = command("heads", run_heads, "heads on held-out problems", problems=2000)
    heads.add_argument("--speculate_k", type=int, default=16, help="(%(default)s)")
    heads.add_argument("--workers", type=int, default=os.cpu_count(), help="(%(default)s)")
    for each in (labels, heads):
        each.add_argument("files", nargs="+", metavar="NAME=FILE")
        each.add_argument("--dtype", choices=DTYPES, help="default: as generate.py runs the pair")
        each.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    calibration = command("calibration", run_calibration, "how often a promise breaks", seed=0)
    calibration.add_argument("--record", required=True, metavar="FILE",
                             help="of calibrate.py --record")
    calibration.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.05])
    calibration.add_argument("--sample", type=int, default=400, help="prompts (%(default)s)")
    calibration.add_argument("--repetitions", type=int, default=200, help="(%(default)s)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    args.run(args)


if __name__ == "__main__":
    terminal.run_main(lambda: main(parse_args()), "bench_labels.py")
