"""Label a pair's own answers for train_head.py: no annotators, only prompts and the two models.

Each labeler (scripts/labelers.py) finds out in its own way which tokens the target can live with:
`swap` by what becomes of the answer, `likelihood` by the target's own probabilities, `bisect` by
sampled rollouts, `corrupt` by planting mistakes. Several add up: --labeler swap,corrupt. All but
`likelihood` compare results, so they need prompts with one (--check number, choice or exact).

    python scripts/label.py --checkpoint_path TARGET --draft_checkpoint_path DRAFT \\
        --prompts train.jsonl --labeler swap --check number --output labels.jsonl
    python scripts/label.py ... --dry_run              # what it would cost, from a few prompts
    torchrun --standalone --nproc_per_node=8 scripts/label.py ...
    python train_head.py --checkpoint_path TARGET --data labels.jsonl --only rejected

Output: JSON lines: `prompt`, `system`, `response` (cut after the token in question), `errors`
(spans of wrong tokens), `labels` (token: its index in the response, right, labeler, score,
rollouts), and `response_ids` where the text alone would be read as other tokens. A killed run goes
on from OUTPUT.partial when it is started again; OUTPUT appears when all prompts are done.

likelihood's τ: --tau, or with swap in the same run the --tau_quantile of the scores of the tokens
that swap found wrong. Labels keep their score, so another τ needs no other run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import terminal  # noqa: E402
import tp  # noqa: E402
from checkpoint import atomic_write  # noqa: E402
from scripts.answers import CHECKS, Prompt, read_prompts  # noqa: E402
from scripts.jobs import Journal, PairSetup, check_paths, file_hash, pair_options  # noqa: E402
from scripts.labelers import LABELERS, NEED_CHECK, Example, Label, Pair, Task  # noqa: E402
from terminal import say  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

DRY_RUN_PROMPTS = 4
TAU_LABELS = 20  # wrong tokens, at least, that a quantile of their scores may rest on
TAU = -5.0  # where swap gives none (docs/train-a-judge.md says how well it does)
ANSWERS = "answers"  # what target and draft write before any labeler looks


def label_prompt(pair: Pair, prompt: Prompt, args: argparse.Namespace, makers: dict,
                 index: int) -> dict:
    """All labels of one prompt: a journal line."""
    task = Task(pair, prompt, CHECKS.get(args.check), seed=args.seed * 1_000_003 + index,
                score_swaps="likelihood" in makers)
    line: dict = {"index": index, "examples": [], "notes": [], "cost": {}}
    if task.room < 2:
        return line | {"notes": ["the prompt leaves no room for an answer"]}
    for name, labeler in makers.items():
        before, shared = (pair.decoded, pair.read), list(task.answers_cost)
        began = time.perf_counter()
        line["examples"] += [example for example in labeler(task) if example.labels]
        shared = [now - then for now, then in zip(task.answers_cost, shared)]
        line["cost"][name] = {
            "decoded": pair.decoded - before[0] - shared[0],
            "read": pair.read - before[1] - shared[1], "seconds": time.perf_counter() - began}
    line["cost"][ANSWERS] = {"decoded": task.answers_cost[0],
                             "read": task.answers_cost[1], "seconds": 0.0}
    return line | {"notes": task.notes}


def examples(line: dict) -> list[Example]:
    """The examples of a journal line."""
    return [Example(response, [Label(*label) for label in labels])
            for response, labels in line["examples"]]


def find_tau(lines: list[dict], args: argparse.Namespace) -> tuple[float, str, int]:
    """likelihood's threshold, where it is from, and how many of swap's tokens it rests on."""
    if args.tau is not None:
        return args.tau, "as given", 0
    right, wrong = ([label.score for line in lines for example in examples(line)
                     for label in example.labels if label.labeler == "swap"
                     and label.score is not None and label.right is kind] for kind in (True, False))
    if len(wrong) < TAU_LABELS:
        return TAU, f"the default; {len(wrong)} tokens that swap found wrong had a score", 0
    tau = torch.tensor(wrong, dtype=torch.float64).quantile(args.tau_quantile).item()
    source = (f"the {args.tau_quantile:g} quantile over {len(wrong)} tokens that swap found wrong; "
              f"a share of {sum(s > tau for s in right) / max(len(right), 1):.0%} of the "
              f"{len(right)} that it found right exceed it")
    return tau, source, len(wrong)


def read_tau(given: str | None, horizon: int) -> float | None:
    """--tau as a number, or what a run with --json found; ValueError for neither."""
    if given is None:
        return None
    with contextlib.suppress(ValueError):
        if math.isfinite(tau := float(given)):
            return tau
    try:
        report = json.loads(Path(given).read_text())
        tau, other = float(report["tau"]), report["horizon"]
        if not report["tau_labels"] or not math.isfinite(tau):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"got --tau {given}, expected a number, or what --json FILE wrote of a "
                         f"run in which swap found {TAU_LABELS} wrong tokens or more") from None
    if other != horizon:
        raise ValueError(f"got --tau {given}, found at horizon {other}, with --horizon {horizon}; "
                         "expected the same")
    return tau


def record(prompt: Prompt, example: Example, tokenizer: Tokenizer, tau: float,
           seen: set[tuple[int, ...]]) -> dict | None:
    """One line of the output; None where all its labels are in `seen`, which it adds to.

    A token that two labelers label, after the same text, counts for the first of them alone.
    """
    verdicts = [label.score > tau if label.right is None else label.right
                for label in example.labels]
    first = verdicts.index(False) if False in verdicts else len(verdicts)
    ids, labels, errors = example.response, [], []
    if first < len(verdicts):  # what follows a wrong token is not known
        ids = ids[:example.labels[first].token + 1]
    text = tokenizer.decode(ids)
    for label, right in list(zip(example.labels, verdicts))[:first + 1]:
        if (key := tuple(ids[:label.token + 1])) in seen:
            continue
        seen.add(key)
        labels.append({"token": label.token, "right": right, "labeler": label.labeler,
                       "score": label.score, "rollouts": label.rollouts})
        if not right:
            begin, end = (len(tokenizer.decode(ids[:stop])) for stop in (label.token,
                                                                         label.token + 1))
            errors.append([min(begin, max(end - 1, 0)), max(end, 1)])
    if not labels:
        return None
    line = {"prompt": prompt.text, "response": text, "errors": errors, "labels": labels}
    if prompt.system:
        line["system"] = prompt.system
    if tokenizer.encode(text) != ids:
        line["response_ids"] = ids
    return line


def finish(lines: list[dict], prompts: list[Prompt], args: argparse.Namespace,
           tokenizer: Tokenizer) -> None:
    """Write OUTPUT from all journal lines, then say what there is."""
    tau, source, tau_labels = find_tau(lines, args)
    counts: Counter = Counter()
    with atomic_write(args.output) as aside, aside.open("w", encoding="utf-8") as file:
        for line in lines:
            seen: set[tuple[int, ...]] = set()
            for example in examples(line):
                made = record(prompts[line["index"]], example, tokenizer, tau, seen)
                if made and made["response"]:
                    counts.update((label["labeler"], label["right"]) for label in made["labels"])
                    file.write(json.dumps(made) + "\n")
    if "likelihood" in args.labeler:
        print(f"likelihood: right where the score exceeds {tau:.2f} ({source})")
    print_costs(lines, counts)
    if args.json:
        report = {"command": shlex.join(["python", *sys.argv]), "prompts": len(lines), "tau": tau,
                  "tau_from": source, "tau_labels": tau_labels, "horizon": args.horizon,
                  "labelers": {name: {
                      **cost, "right": counts[name, True], "wrong": counts[name, False]}
                      for name, cost in costs(lines).items()}}
        with atomic_write(args.json) as aside:
            aside.write_text(json.dumps(report, indent=1) + "\n")
    notes = Counter(note for line in lines for note in line["notes"])
    for note, count in notes.most_common(8):
        print(f"{count} prompts: {note}")
    print(f"wrote {args.output}\nnext: python train_head.py --checkpoint_path "
          f"{args.checkpoint_path} --data {args.output} --only rejected")


def costs(lines: list[dict]) -> dict[str, Counter]:
    """Sums over prompts, by labeler."""
    total: dict[str, Counter] = {}
    for line in lines:
        for name, cost in line["cost"].items():
            total.setdefault(name, Counter()).update(cost)
    return total


def print_costs(lines: list[dict], counts: Counter) -> None:
    """A row a labeler: labels and target tokens, written and read."""
    print(f"\n{'labeler':<12}{'right':>9}{'wrong':>9}{'target tokens':>15}{'a label':>9}"
          f"{'read':>12}{'a label':>9}{'seconds':>9}")
    for name, cost in costs(lines).items():
        labels = max(counts[name, True] + counts[name, False], 1)
        each = [f"{cost[key] / labels:.1f}" if name != ANSWERS else "" for key in ("decoded",
                                                                                   "read")]
        print(f"{name:<12}{counts[name, True]:>9,}{counts[name, False]:>9,}{cost['decoded']:>15,}"
              f"{each[0]:>9}{cost['read']:>12,}{each[1]:>9}{cost['seconds']:>9.0f}")


def dry_run(pair: Pair, prompts: list[Prompt], left: list[int], args: argparse.Namespace,
            makers: dict) -> None:
    """Label a few prompts, spread over what is left, throw the labels away, and extrapolate."""
    if not left:
        return print("nothing is left to do: the next run without --dry_run writes the output")
    count = min(DRY_RUN_PROMPTS + 1, len(left))
    some = [left[i * len(left) // count] for i in range(count)]
    lines, seconds = [], []
    for index in tqdm(some, desc="trying", unit=" prompts"):
        start = time.perf_counter()
        lines.append(label_prompt(pair, prompts[index], args, makers, index))
        seconds.append(time.perf_counter() - start)
    if count > 1:  # the first prompt compiles
        lines, seconds = lines[1:], seconds[1:]
    decoded, read = (sum(cost[key] for line in lines for cost in line["cost"].values())
                     for key in ("decoded", "read"))
    labels = sum(len(example.labels) for line in lines for example in line["examples"])
    each = len(left) / len(lines)
    print(f"{len(left)} prompts; from {len(lines)} of them: about {labels * each:,.0f} labels, "
          f"{decoded * each:,.0f} target tokens written and {read * each:,.0f} read, "
          f"{sum(seconds) * each / 3600:.2f} hours at {decoded / sum(seconds):.0f} target tokens/s "
          "(prompts differ: take it as a rough figure)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompts", required=True, metavar="FILE",
        help="JSON lines: prompt (perhaps system, answer), or GSM8K's question and answer")
    add("--labeler", required=True, metavar="NAME,...", help=f"of {', '.join(LABELERS)}")
    add("--check", choices=CHECKS, help="what makes two answers the same")
    add("--output", required=True, metavar="FILE", help="the labels, JSON lines")
    add("--json", metavar="FILE", help="write what the labels took, by labeler, and τ")
    add("--max_prompt_tokens", type=int, default=4096, metavar="N",
        help="a longer prompt is left out; caches are made for the longest (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="the first N prompts alone")
    add("--dry_run", action="store_true", help="say what it would cost, and end")
    add("--seed", type=int, default=0, help="of rollouts and corruptions (default: %(default)s)")
    add("--rollouts", type=int, default=8, help="bisect: in one batch (default: %(default)s)")
    add("--rollout_temperature", type=float, default=0.7, help="bisect (default: %(default)s)")
    add("--corruptions", type=int, default=2, help="corrupt: an answer (default: %(default)s)")
    add("--horizon", type=int, default=20, metavar="N",
        help="likelihood: tokens after the one in question that count, 0: none but its own "
             "probability (default: %(default)s)")
    add("--along", choices=("target", "draft", "both"), default="target",
        help="likelihood: whose answer the draft's tokens stand in; the draft's needs --horizon 0 "
             "and no target tokens (default: %(default)s)")
    add("--tau", metavar="τ", help="likelihood's threshold: a number, or the file that --json of "
        f"a run with swap wrote (default: from swap in this run, else {TAU:g})")
    add("--tau_quantile", type=float, default=0.9,
        help="of the scores of what swap found wrong: at 0.9 a tenth of it would still pass as "
             "right (default: %(default)s)")
    return pair_options(parser, speculate_k=8).parse_args(argv)


def check_options(args: argparse.Namespace) -> None:
    """ValueError for options out of range, FileNotFoundError for places that cannot be written."""
    for name in (wanted := args.labeler.split(",")):
        if name not in LABELERS:
            raise ValueError(f"got labeler {name!r}, expected some of {', '.join(LABELERS)}")
    args.labeler = [name for name in LABELERS if name in wanted]  # swap first: it gives τ
    if args.along != "target" and args.horizon:
        raise ValueError(f"got --along {args.along} with --horizon {args.horizon}, expected "
                         "--horizon 0: the draft's answer has no other continuation to compare")
    if needing := NEED_CHECK.intersection(args.labeler) if args.check is None else ():
        raise ValueError(f"got --labeler {','.join(sorted(needing))} without --check, expected "
                         f"one of {', '.join(CHECKS)}: it compares results")
    for name, low, high in (
            ("limit", 1, 1e12), ("max_prompt_tokens", 1, 1e9), ("seed", 0, 2**31),
            ("rollouts", 2, 1024), ("rollout_temperature", 1e-3, 100), ("corruptions", 1, 1000),
            ("horizon", 0, 1000), ("tau_quantile", 0, 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"got --{name} {value}, expected a number from {low:g} to {high:g}")
    args.tau = read_tau(args.tau, args.horizon)
    check_paths(inputs=[args.prompts], outputs=[args.output, args.json])
    if Path(args.output).exists() and not args.dry_run and not partial(args).exists():
        raise ValueError(f"{args.output}: is there already; remove it or give another --output")


def partial(args: argparse.Namespace) -> Path:
    return Path(f"{args.output}.partial")


def job_key(args: argparse.Namespace, setup: PairSetup) -> dict:
    """What the labels depend on, but for τ, which is applied at the end."""
    names = ("labeler", "check", "limit", "seed", "rollouts", "rollout_temperature", "corruptions",
             "horizon", "along", "max_prompt_tokens")
    return {"prompts": file_hash(args.prompts), **{name: getattr(args, name) for name in names},
            **setup.key()}


def done_before(args: argparse.Namespace, setup: PairSetup, shard: tp.Shard) -> int:
    """How many prompts a killed run has labelled already."""
    if not shard.from_first(partial(args).exists()):
        return 0
    with Journal(partial(args), job_key(args, setup), shard, share=False) as journal:
        return journal.done


def main(args: argparse.Namespace) -> None:
    """Run the command line; ValueError and OSError are a user's mistakes."""
    check_options(args)
    setup = PairSetup.from_args(args)
    prompts = read_prompts(args.prompts, limit=args.limit)
    longest = min(max(len(setup.tokenizer.encode_prompt(prompt.text, system=prompt.system))
                      for prompt in prompts), args.max_prompt_tokens)
    shard = tp.start(setup.device)
    terminal.only_first_rank_speaks(shard)
    models = setup.load(shard)
    pair = Pair(*models, setup, setup.length(longest), horizon=args.horizon,
                rollouts=args.rollouts if "bisect" in args.labeler else 1,
                temperature=args.rollout_temperature)
    makers = {name: LABELERS[name](args) for name in args.labeler}
    if args.dry_run:
        dry_run(pair, prompts, list(range(done_before(args, setup, shard), len(prompts))), args,
                makers)
        return tp.stop()
    with Journal(partial(args), job_key(args, setup), shard, share=False) as journal:
        run(pair, prompts, journal, args, makers)
    if shard.rank == 0:
        finish(journal.lines, prompts, args, setup.tokenizer)
        partial(args).unlink()
    tp.stop()


def run(pair: Pair, prompts: list[Prompt], journal: Journal, args: argparse.Namespace,
        makers: dict) -> None:
    """Label what the journal lacks, a prompt at a time."""
    done = journal.done
    if done:
        say(f"going on after {done} of {len(prompts)} prompts")
    tally, target_tokens = Counter(), 0
    with tqdm(total=len(prompts), initial=done, desc="labels", unit=" prompts",
              disable=pair.target.shard.rank > 0) as bar:
        for index in range(done, len(prompts)):
            line = label_prompt(pair, prompts[index], args, makers, index)
            journal.append(line)
            tally.update(label.right for _, labels in line["examples"] for label in labels)
            target_tokens += sum(cost["decoded"] for cost in line["cost"].values())
            bar.set_postfix({"right": tally[True], "wrong": tally[False], "open": tally[None],
                             "target tokens": target_tokens}, refresh=False)
            bar.update()


if __name__ == "__main__":
    terminal.run_main(lambda: main(parse_args()), "label.py")
