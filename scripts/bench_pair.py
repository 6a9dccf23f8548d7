"""`bench.py pair`: a draft and a target, every way to answer with them, and transformers on the same weights, side by side.

Ways take turns prompt by prompt in one run, after a warm-up: `draft` and `target` alone, the `exact` rule and the `judge`, and
transformers' generate (`hf_generate`) and its assisted generation (`hf_assisted`), greedy, in the same dtype and threads, from
the same prompt ids to the same stop tokens. `--rule NAME` adds one more rule of judge.RULES. Each way that
drafts runs at its own best K, chosen first on other prompts; a best K at the edge of its grid is said, as a better one may lie
beyond. Seconds are prefill and decode, from ids to the last token, without compilation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import generate
import terminal
from checkpoint import ModelConfig
from generate import SPECULATE_K, Engine, Request
from judge import MAX_K, Judge, Rule, make_rule
from model import Transformer
from scripts import demo_pair
from scripts.bench_tools import finish, machine, quartiles, start
from terminal import DEMO, Setup

WAYS = ("draft", "target", "exact", "judge", "hf_generate", "hf_assisted")
TUNE_K = {"exact": (1, 2, 3, 4, 5, 8), "judge": (12, 16, 20, 24, 32, 40),
          "hf_assisted": (1, 2, 3, 5, 8)}  # the ways that draft; another rule is tuned as exact is
MAX_NEW_TOKENS = demo_pair.MAX_NEW_TOKENS
MARGIN = 1e-4  # top logits closer than this may swap places in float32 for rounding alone


@dataclass(frozen=True)
class Prompt:
    """Token ids to answer, and who says whether a text is right, given whether it came to an end (None: nobody can)."""

    ids: list[int]
    is_right: Callable[[str, bool], bool] | None = None


def read_prompts(path: Path, encode: Callable[[str], list[int]]) -> list[Prompt]:
    """One JSON object a line, {"prompt": text, "answer": text that a right answer contains (optional)}."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text, answer = entry["prompt"], entry.get("answer")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            text = answer = None
        if not isinstance(text, str) or not isinstance(answer, str | None):
            raise ValueError(f'{path}, line {number}: got {line[:60]!r}, expected {{"prompt": text, "answer": text}}; the '
                             "answer is optional")
        prompts.append(Prompt(encode(text), None if answer is None else lambda said, _, answer=answer: answer in said))
    return prompts


def get_prompts(args: argparse.Namespace, encode: Callable[[str], list[int]], tuned: int) -> tuple[list[Prompt], list[Prompt]]:
    """`tuned` prompts to choose K on, and others to measure: of a file its first ones, and those that follow them."""
    if args.prompts:
        prompts = read_prompts(Path(args.prompts), encode)
        if len(prompts) < tuned + args.num_prompts:
            raise ValueError(f"{args.prompts}: got {len(prompts)} prompts, expected {tuned} to choose K and {args.num_prompts} "
                             "to measure; add some, lower --num_prompts or --tune_prompts, or fix every K")
        return prompts[:tuned], prompts[tuned:tuned + args.num_prompts]
    if args.checkpoint_path:
        raise ValueError("got --checkpoint_path without --prompts: the bundled problems are for the bundled pair; give a "
                         'file of lines {"prompt": text}')

    def problems(seed: int, count: int) -> list[Prompt]:
        return [Prompt(encode(problem.prompt), lambda said, ended, problem=problem: ended and problem.is_right(said))
                for problem in demo_pair.held_out(seed, count)]

    return problems(demo_pair.VALIDATION_SEED, tuned) if tuned else [], problems(args.seed, args.num_prompts)


class HuggingFace:
    """transformers on the same weights: greedy, scaled-dot-product attention, its default growing cache."""

    def __init__(self, setup: Setup, stop_tokens: tuple[int, ...]):
        import transformers  # a dependency of this benchmark alone

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.device, self.stop_tokens = setup.device, stop_tokens
        load = transformers.LlamaForCausalLM.from_pretrained
        self.target, self.draft = (load(path, dtype=setup.dtype, attn_implementation="sdpa").to(setup.device).eval()
                                   for path in (setup.target_path, setup.draft_path))

    @torch.no_grad()
    def answer(self, ids: list[int], max_new_tokens: int, speculate_k: int | None) -> dict:
        """One answer; with K assisted. transformers drafts before its first pass over the target: every pass is a round."""
        options = {}
        if speculate_k:
            settings = self.draft.generation_config
            settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = speculate_k, "constant"
            settings.assistant_confidence_threshold = 0.0
            options["assistant_model"] = self.draft
        streamer = Streamer()
        begin = time.perf_counter()
        prompt = torch.tensor([ids], device=self.device)
        output = self.target.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_new_tokens,
            eos_token_id=list(self.stop_tokens) or None, pad_token_id=self.stop_tokens[0] if self.stop_tokens else 0,
            streamer=streamer, **options)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, tokens = time.perf_counter() - begin, output[0, len(ids):].tolist()
        rounds = len(streamer.times) - 1 if speculate_k else 0
        return {"tokens": tokens, "seconds": seconds, "seconds_to_first_token": streamer.times[1] - begin, "rounds": rounds,
                "round_tokens": len(tokens) if rounds else 0, "accepted": len(tokens) - rounds if rounds else 0}


class Streamer:
    """Notes when transformers hands over tokens: the prompt, then one step's or one assisted round's at a time.

    It costs no wait on a GPU that generate does not make anyway, to see after each step whether to stop.
    """

    def __init__(self):
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Contest:
    """The pair, loaded once for gavel and once for transformers, and every way to answer with it."""

    def __init__(self, setup: Setup, rules: dict[str, Rule], *, max_seq_length: int,
                 max_new_tokens: int, max_k: int, hf: bool):
        self.setup, self.rules, self.max_new_tokens = setup, rules, max_new_tokens
        self.tokenizer, self.max_k = setup.tokenizer, max_k
        self.target, self.draft = (Transformer.from_checkpoint(path, device=setup.device, dtype=setup.dtype)
                                   for path in (setup.target_path, setup.draft_path))
        self.options = {"max_seq_length": max_seq_length, "compile": setup.compile}
        self.engines: dict[tuple[bool, int], Engine] = {}
        for alone in (False, True):  # the largest K first: an engine that made longer caches would recompile the others
            self.engine(alone, max_k)
        self.stop_tokens = self.target.config.eos_token_ids
        self.hf = HuggingFace(setup, self.stop_tokens) if hf else None

    def engine(self, alone: bool, speculate_k: int) -> Engine:
        """The draft alone, or the pair: made when first asked for, one for each K."""
        if (alone, speculate_k) not in self.engines:
            models = (self.draft,) if alone else (self.target, self.draft)
            self.engines[alone, speculate_k] = Engine(
                *models, speculate_k=speculate_k, stop_tokens=self.target.config.eos_token_ids,
                **self.options)
        return self.engines[alone, speculate_k]

    def pick(self, way: str, speculate_k: int | None) -> tuple[Engine, str | Rule]:
        """Engine and rule of one of gavel's ways; those that do not draft take an engine that is there."""
        return self.engine(way == "draft", speculate_k or self.max_k), self.rules.get(way, "none")

    def warm_up(self, way: str, speculate_k: int | None, prompt: Prompt) -> None:
        """Compile what the way needs, and answer once."""
        if not way.startswith("hf_"):
            engine, rule = self.pick(way, speculate_k)
            engine.warmup(rules=(rule,))
        self.answer(way, speculate_k, prompt)

    def answer(self, way: str, speculate_k: int | None, prompt: Prompt) -> dict:
        """Answer greedily; what the rows need of it."""
        if way.startswith("hf_"):
            answer = self.hf.answer(prompt.ids, self.max_new_tokens, speculate_k)
        else:
            engine, rule = self.pick(way, speculate_k)
            for _ in engine.generate(prompt.ids, max_new_tokens=self.max_new_tokens, rule=rule):
                pass
            stats = engine.stats
            answer = {key: stats[key] for key in ("tokens", "seconds", "seconds_to_first_token")} | {
                "rounds": stats["rounds"] if speculate_k else 0, "round_tokens": stats["new_tokens"] - 1,
                "accepted": stats["accepted_exact"] + stats["accepted_judge"]}
        right = None
        if prompt.is_right:
            right = prompt.is_right(self.tokenizer.decode(answer["tokens"], skip_special=True),
                                    answer["tokens"][-1] in self.stop_tokens)
        return answer | {"new_tokens": len(answer["tokens"]), "right": right}


def interleave(contest: Contest, ways: list[tuple[str, int | None]], prompts: list[Prompt],
               desc: str) -> dict[tuple, list[dict]]:
    """Every way answers every prompt; they take turns prompt by prompt, each time another one first."""
    for way in tqdm(ways, desc=f"{desc}: warm up", unit=" ways"):
        contest.warm_up(*way, prompts[0])
    answers: dict[tuple, list[dict]] = {way: [] for way in ways}
    for index, prompt in enumerate(tqdm(prompts, desc=desc, unit=" prompts")):
        for shift in range(len(ways)):
            way = ways[(index + shift) % len(ways)]
            answers[way].append(contest.answer(*way, prompt))
    return answers


def speeds(answers: list[dict]) -> list[float]:
    return [a["new_tokens"] / a["seconds"] for a in answers]


def best_k(answers: dict[int, list[dict]]) -> int:
    """The K with the highest median tokens/s; the smallest of equals."""
    return max(sorted(answers), key=lambda k: statistics.median(speeds(answers[k])))


def at_edge(best: int, ks: list[int]) -> bool:
    """Whether a better K may lie beyond the grid."""
    return best == max(ks) < MAX_K or best == min(ks) > 1


def choose_k(contest: Contest, candidates: dict[str, list[int]],
             prompts: list[Prompt]) -> tuple[dict[str, int], dict]:
    """Each drafting way's own best K, and what it was chosen by: {"tokens_per_second" by K, "best",
    "edge"}.

    A single candidate is taken unmeasured.
    """
    trials = [(way, k) for way, ks in candidates.items() if len(ks) > 1 for k in ks]
    answers = interleave(contest, trials, prompts, "choose K") if trials else {}
    chosen, tuning = {}, {}
    for way, ks in candidates.items():
        runs = {k: answers[way, k] for k in ks if (way, k) in answers}
        chosen[way] = best_k(runs) if runs else ks[0]
        if runs:
            tuning[way] = {
                "tokens_per_second": {str(k): statistics.median(speeds(run))
                                      for k, run in runs.items()},
                "best": chosen[way], "edge": at_edge(chosen[way], ks)}
            if tuning[way]["edge"]:
                print(f"{way}: the best K, {chosen[way]}, lies at the edge of {ks}; a better one "
                      "may lie beyond it: widen --tune_k", file=sys.stderr)
    return chosen, tuning


def summarise(answers: dict[str, list[dict]], chosen: dict[str, int]) -> dict[str, dict]:
    """One row a way, over its prompts: medians and quartiles of the times, shares of the counts. Ratios are of medians."""
    rows = {}
    for way, runs in answers.items():
        low, median, high = quartiles(speeds(runs))
        rounds = sum(run["rounds"] for run in runs)
        graded = [run["right"] for run in runs if run["right"] is not None]
        agreeing = [run["tokens"] == other["tokens"] for run, other in zip(runs, answers["target"])]
        rows[way] = {
            "tokens_per_second": median, "tokens_per_second_quartiles": [low, high],
            "milliseconds_per_token": quartiles([1e3 / speed for speed in speeds(runs)])[1],
            "seconds_to_first_token": statistics.median(run["seconds_to_first_token"] for run in runs),
            "tokens_per_round": sum(run["round_tokens"] for run in runs) / rounds if rounds else 1.0,
            "accepted_per_round": sum(run["accepted"] for run in runs) / rounds if rounds else 0.0,
            "accuracy": sum(graded) / len(graded) if graded else None, "speculate_k": chosen.get(way),
            "agrees_with_target": sum(agreeing) / len(agreeing), "new_tokens": sum(run["new_tokens"] for run in runs)}
    for other in ("target", "hf_generate"):
        for row in rows.values():
            row[f"ratio_to_{other}"] = row["tokens_per_second"] / rows[other]["tokens_per_second"] if other in rows else None
    return rows


def print_rows(rows: dict[str, dict]) -> None:
    def cell(value: float | None, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    print(f"\n{'':<13}{'K':>4}{'tokens/s':>10}{'quartiles':>18}{'ms/token':>10}{'first ms':>10}{'tokens/round':>14}"
          f"{'accepted':>10}{'right':>7}{'as target':>11}{'x target':>10}{'x hf':>7}")
    for way, row in rows.items():
        low, high = row["tokens_per_second_quartiles"]
        print(f"{way:<13}{cell(row['speculate_k'], '', 4)}{row['tokens_per_second']:10.1f}{f'{low:.1f} to {high:.1f}':>18}"
              f"{row['milliseconds_per_token']:10.2f}{1e3 * row['seconds_to_first_token']:10.1f}{row['tokens_per_round']:14.2f}"
              f"{row['accepted_per_round']:10.2f}{cell(row['accuracy'], '.0%', 7)}{row['agrees_with_target']:11.0%}"
              f"{row['ratio_to_target']:10.2f}{cell(row['ratio_to_hf_generate'], '.2f', 7)}")


def prepare(args: argparse.Namespace, ways: list[str], max_k: int) -> tuple[Setup, dict[str, Rule]]:
    """What generate.py checks before it reads a weight, for these models; and the rules by way."""
    options = generate.parse_args([])
    options.checkpoint_path = args.checkpoint_path or str(DEMO / "target")
    options.draft_checkpoint_path = args.draft_checkpoint_path or str(DEMO / "draft")
    if "judge" in ways or args.judge is not None:
        options.judge, options.threshold = args.judge or "", args.threshold
    options.speculate_k, options.compile = max_k, args.compile
    options.device, options.dtype, options.json = args.device, args.dtype, args.json
    setup = Setup.from_args(options, Request(args.max_new_tokens))
    rules = {"exact": make_rule("exact")}
    if isinstance(setup.rule, Judge):
        rules["judge"] = setup.rule
    if args.rule:
        rules[args.rule] = make_rule(args.rule, head=getattr(setup.rule, "head", None),
                                     rule_args=terminal.parse_rule_args(args.rule_args))
        rules[args.rule].check(ModelConfig.from_checkpoint(setup.target_path).hidden_size)
    if any(way.startswith("hf_") for way in ways):
        check_transformers(setup)
    return setup, rules


def check_transformers(setup: Setup) -> None:
    """ValueError where transformers is not there or cannot run these models."""
    for path in (setup.target_path, setup.draft_path):
        if ModelConfig.from_checkpoint(path).int8:
            raise ValueError(f"{path} is int8, which transformers runs through other packages; use "
                             "--no_hf")
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ValueError("transformers is not installed; pip install -r requirements-dev.txt, or "
                         "use --no_hf") from None


def check_args(args: argparse.Namespace) -> tuple[list[str], dict[str, list[int]]]:
    """The ways to measure, and the K to choose among of those that draft; ValueError for what does
    not fit."""
    ways = [way for way in args.ways if args.hf or not way.startswith("hf_")]
    if "target" not in ways:
        raise ValueError("got --ways without target, which the others are compared with; add it")
    if args.rule in WAYS:
        raise ValueError(f"got --rule {args.rule}, which is one of --ways; expected another rule")
    if args.rule_args and not args.rule:
        raise ValueError("got --rule_args without --rule; add --rule NAME")
    if args.num_prompts < 1 or args.tune_prompts < 1:
        raise ValueError("got --num_prompts or --tune_prompts below 1, expected 1 or more")
    if args.seed == demo_pair.VALIDATION_SEED:
        raise ValueError(f"got --seed {args.seed}, the stream that K is chosen on; expected "
                         "another one")
    if (args.checkpoint_path is None) != (args.draft_checkpoint_path is None):
        raise ValueError("got one of --checkpoint_path and --draft_checkpoint_path; give both, or "
                         "neither for the bundled pair")
    grids = TUNE_K | ({args.rule: TUNE_K["exact"]} if args.rule else {})
    ways += [args.rule] if args.rule else []
    fixed = {"exact": args.exact_k, "judge": args.speculate_k, "hf_assisted": args.assisted_k}
    candidates = {way: [fixed[way]] if fixed.get(way) is not None
                  else sorted(set(args.tune_k or grids[way])) for way in ways if way in grids}
    smallest = min((k for ks in candidates.values() for k in ks), default=1)
    if smallest < 1:
        raise ValueError(f"got a K of {smallest}, expected 1 or more")
    return ways, candidates


def run_pair(args: argparse.Namespace) -> None:
    ways, candidates = check_args(args)
    own = [k for way, ks in candidates.items() if way != "hf_assisted" for k in ks]
    max_k = max(own, default=SPECULATE_K)
    device = start(args)
    setup, rules = prepare(args, ways, max_k)
    tuned = args.tune_prompts if any(len(ks) > 1 for ks in candidates.values()) else 0
    print("reading prompts ...", file=sys.stderr)
    validation, prompts = get_prompts(
        args, lambda text: setup.tokenizer.encode_prompt(text, raw=args.raw), tuned)
    longest = max(len(prompt.ids) for prompt in (*validation, *prompts))
    max_new_tokens = setup.request.room(longest, setup.context)
    length = min(setup.context, -(-(longest + max_new_tokens) // 128) * 128)
    contest = Contest(setup, rules, max_new_tokens=max_new_tokens, max_k=max_k,
                      max_seq_length=length, hf=any(way.startswith("hf_") for way in ways))
    chosen, tuning = choose_k(contest, candidates, validation)
    answers = interleave(contest, [(way, chosen.get(way)) for way in ways], prompts, "measure")
    rows = summarise({way: runs for (way, _), runs in answers.items()}, chosen)
    about = machine(device)
    if args.hf:
        import transformers

        about["transformers"] = transformers.__version__
    print(f"{about['device']}, {about['threads']} threads, {setup.dtype}, {len(prompts)} prompts, greedy".replace("torch.", ""))
    print_rows(rows)
    agreeing = rows["hf_generate"]["agrees_with_target"] if "hf_generate" in rows else 1
    if setup.dtype is torch.float32 and agreeing < 1:
        print(f"\nIn float32 transformers and gavel wrote different tokens for {1 - agreeing:.0%} of the prompts: expected "
              f"only where two logits lie within {MARGIN} of each other.", file=sys.stderr)
    finish({"machine": about, "dtype": str(setup.dtype).removeprefix("torch."), "compiled": setup.compile,
            "target": args.checkpoint_path or "bundled target", "draft": args.draft_checkpoint_path or "bundled draft",
            "prompts": args.prompts or f"held-out problems of seed {args.seed}", "num_prompts": len(prompts),
            "prompt_tokens": statistics.median(len(prompt.ids) for prompt in prompts), "max_new_tokens": max_new_tokens,
            "threshold": rules["judge"].threshold if "judge" in rules else None, "temperature": 0.0,
            "rule_args": args.rule_args, "tuning": tuning, "rows": rows}, args.json)
