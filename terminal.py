"""What people type and see: options and what is checked of them, progress, colours, table, chat.

The answer and its table go to stdout, all else to stderr. A mistake is named before weights load,
in one line, with exit status 2. Of several ranks the first speaks. Callers hand in an engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import cpu
import tp
from checkpoint import DTYPES, ModelConfig, atomic_write, check_writable
from judge import RULES, JudgeHead, Rule, available_rules, check_fit, make_rule
from tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parent / "checkpoints" / "demo"
DEMO_PROMPT = ("Mia has nine shells. First, Mia finds six shells. Second, Mia loses seven shells. "
               "Third, Mia doubles the shells. Fourth, Mia wins three shells. "
               "How many shells does Mia have?")
DEMO_PROMPTS = re.compile(r"(\w+) has \w+ (\w+)\. First, .*Third, .*How many \2 does \1 have\?")
DEMO_HINT = ("The bundled pair has learnt nothing but stories of three or four events like this "
             f"one, so do not expect sense of others: {DEMO_PROMPT!r}")
DEFAULT_PROMPT = "Explain in a few sentences why the sky is blue."
STYLES = {"exact": "", "lossy": "\033[4;38;5;214m", "target": "\033[38;5;75m"}  # for all eyes


def say(text: str, end: str = "\n") -> None:
    """To stderr, by the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(text, end=end, file=sys.stderr, flush=True)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def parse_args(argv: list[str] | None, description: str, speculate_k: int,
               drafters: tuple[str, ...]) -> argparse.Namespace:
    """generate.py's command line."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("models").add_argument
    add("--checkpoint_path", metavar="DIR", help="target: a Hugging Face directory (default: ours)")
    add("--draft_checkpoint_path", metavar="DIR", help="a smaller model with the same tokenizer")
    add("--draft", choices=drafters,
        help="draft without a model; lookup: what followed the last tokens earlier in the text")
    add("--judge", nargs="?", const="", metavar="HEAD",
        help="keep what this head finds correct (default: judge.safetensors by the target)")
    add("--rule", choices=("none", *RULES),
        help="which draft tokens stay (default: judge with --judge, exact with a draft, else none)")
    add("--rule_args", metavar="K=V,...", help="arguments of the rule, as in tau=0.1")
    add("--threshold", type=float, metavar="δ",
        help="score a token must exceed, 0..1 (default: the head's own; 1: lossless)")
    add("--speculate_k", type=int, default=speculate_k, metavar="K",
        help="tokens drafted a round (default: %(default)s)")
    add = parser.add_argument_group("prompt").add_argument
    add("--prompt", help="one user turn in the chat format, where the tokenizer has it")
    add("--system", metavar="TEXT", help="a system turn before it")
    add("--raw", action="store_true", help="no chat format: plain text after begin-of-text")
    add("--interactive", action="store_true", help="chat; the cache is kept between turns")
    add = parser.add_argument_group("sampling").add_argument
    add("--max_new_tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s (greedy)")
    add("--top_k", type=int, metavar="N", help="sample among the N likeliest tokens (default: all)")
    add("--seed", type=int, default=0, help="of the first sample; the next count on (default: 0)")
    add("--num_samples", type=int, default=1, metavar="N", help="answers (default: %(default)s)")
    add = parser.add_argument_group("running").add_argument
    add("--compare", action=argparse.BooleanOptionalAction,
        help="time the target alone, the exact rule and this one (default: for the bundled pair)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", choices=DTYPES,
        help="default: the checkpoint's on CUDA; bfloat16 on a CPU with units for it, else float32")
    add("--compile", action=argparse.BooleanOptionalAction, default=True,
        help="torch.compile the steps (default: on)")
    add("--check_ranks", action="store_true", help="compare all ranks' tokens in every round")
    add("--json", metavar="FILE", help="write one object per sample: text, speed, acceptance")
    add("--profile", metavar="FILE", help="write a Chrome trace (open it in ui.perfetto.dev)")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Setup:
    """All that the command line asks for, checked before weights load."""

    target_path: Path
    draft_path: Path | None
    drafter: str | None
    rule: Rule | None
    speculate_k: int
    request: object  # generate.Request
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    context: int
    compile: bool
    compare: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace, request: object) -> Setup:
        """ValueError or FileNotFoundError for all that can be known without reading a weight."""
        if args.num_samples < 1:
            raise ValueError(f"got num_samples {args.num_samples}, expected 1 or more")
        check_writable(args.json)
        check_writable(args.profile)
        device = tp.pick_device(args.device)
        target, draft = find_models(args)
        configs = {path: ModelConfig.from_checkpoint(path) for path in (target, draft) if path}
        for path, config in configs.items():
            tp.check_world(config, tp.world_size(), str(path))
        rule = find_rule(args, target, drafts=bool(draft or args.draft))
        check_fit(configs[target], configs.get(draft), rule, args.speculate_k)
        tokenizer = find_tokenizer(args, target, draft, configs[target])
        if args.checkpoint_path is None and not DEMO_PROMPTS.match(prompt_of(args)):
            say(DEMO_HINT)
        missing = cpu.can_compile(device) if args.compile else None
        if missing:
            say(f"{missing}: running uncompiled, several times slower")
        compare, comparable = args.compare, rule is not None and not args.interactive
        if compare and not comparable:
            raise ValueError("got --compare with one rule or a chat; give a draft and one prompt")
        if compare is None:
            compare = comparable and args.checkpoint_path is None
        return cls(target, draft, args.draft, rule, args.speculate_k, request, tokenizer, device,
                   tp.pick_dtype(args.dtype, configs[target], device),
                   min(config.max_position_embeddings for config in configs.values()),
                   args.compile and missing is None, compare)


def prompt_of(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    return DEMO_PROMPT if args.checkpoint_path is None else DEFAULT_PROMPT


def find_models(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Directories of target and draft; without paths those of the bundled pair."""
    if args.draft and args.draft_checkpoint_path:
        raise ValueError(f"got --draft {args.draft} and --draft_checkpoint_path, expected one")
    if args.checkpoint_path is not None:
        draft = args.draft_checkpoint_path
        if args.judge is not None and not (draft or args.draft):
            raise ValueError("got --judge without a draft: there is nothing to judge; give "
                             "--draft_checkpoint_path DIR or --draft lookup")
        return Path(args.checkpoint_path), Path(draft) if draft else None
    if args.draft_checkpoint_path is not None:
        raise ValueError("got --draft_checkpoint_path without --checkpoint_path; give both, or "
                         "neither for the bundled pair")
    drafts = not args.draft and (args.judge is not None or args.rule not in (None, "none"))
    return DEMO / "target", DEMO / "draft" if drafts else None


def find_head(given: str, target: Path) -> Path:
    """--judge's file: as given, or judge.safetensors in the target's directory or its parent."""
    if given:
        return Path(given)
    for path in (target, target.resolve().parent):
        if (path / "judge.safetensors").is_file():
            return path / "judge.safetensors"
    raise FileNotFoundError(f"no judge.safetensors in {target} or above it; name one: --judge HEAD,"
                            " or train it: python train_head.py --data answers.jsonl "
                            f"--checkpoint_path {target}")


def find_rule(args: argparse.Namespace, target: Path, *, drafts: bool) -> Rule | None:
    """The rule of --rule, --rule_args, --judge and --threshold."""
    head = JudgeHead.load(find_head(args.judge, target)) if args.judge is not None else None
    rule, arguments = args.rule, parse_rule_args(args.rule_args)
    if rule not in (None, "none", "exact"):
        rule = make_rule(rule, head=head, threshold=args.threshold, rule_args=arguments)
    elif arguments:
        raise ValueError(f"got --rule_args {args.rule_args} without their rule; add --rule NAME")
    threshold = None if isinstance(rule, Rule) else args.threshold
    return next(reversed(available_rules(rule, head, drafts=drafts, threshold=threshold).values()))


def parse_rule_args(text: str | None) -> dict[str, float | int | str]:
    """name=value,… as a dict, numbers as numbers."""
    arguments: dict = {}
    for part in text.split(",") if text else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not value:
            raise ValueError(f"got --rule_args {part!r}, expected name=value, as in k=3,ratio=0.3")
        for number in (int, float, str):
            with contextlib.suppress(ValueError):
                arguments[key] = number(value)
                break
    return arguments


def find_tokenizer(args: argparse.Namespace, target: Path, draft: Path | None,
                   config: ModelConfig) -> Tokenizer:
    """The target's tokenizer; ValueError where it does not fit model, draft or options."""
    tokenizer = Tokenizer.from_checkpoint(target)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{target}: got a tokenizer of {tokenizer.vocab_size} tokens, expected at "
                         f"most the model's {config.vocab_size}; download the directory again")
    if args.interactive and not tokenizer.has_chat:
        raise ValueError("--interactive needs a chat model; this one has no <|start_header_id|>")
    if args.interactive and (args.raw or args.prompt is not None or args.num_samples > 1):
        raise ValueError("got --interactive with --raw, --prompt or --num_samples; a chat takes "
                         "its prompts from the terminal")
    if draft:
        tokenizer.check_same(Tokenizer.from_checkpoint(draft))
    return tokenizer


def load_models(setup: Setup, load: Callable, shard: tp.Shard) -> list:
    """load(path, progress) for target and draft, with bars; each rank says what it read."""
    from tqdm import tqdm  # here: only the command line needs it

    begin, models = time.perf_counter(), []
    paths = [path for path in (setup.target_path, setup.draft_path) if path]
    for path in paths:
        start = time.perf_counter()
        with tqdm(desc=f"read {path.name}", unit="B", unit_scale=True, delay=1, leave=False,
                  disable=shard.rank > 0) as bar:
            def progress(done: int, total: int, bar=bar) -> None:
                bar.total = total
                bar.update(done - bar.n)
            models.append(load(path, progress))
        if shard.world > 1:
            import resource  # here: Unix alone has it

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            text = (f"rank {shard.rank}: {models[-1].bytes_read / 1e6:,.1f} MB of {path.name} read "
                    f"in {time.perf_counter() - start:.1f} s, {peak:.2f} GB of host memory at most")
            if setup.device.type == "cuda":
                text += f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the GPU's"
            say("\n".join(shard.everyone(text)))
    names, dtype = " and ".join(path.name for path in paths), str(setup.dtype)[len("torch."):]
    ranks = f", {shard.world} ranks" if shard.world > 1 else ""
    say(f"loaded {names} in {time.perf_counter() - begin:.1f} s, {dtype} on "
        f"{device_name(setup.device)}{ranks}")
    return models


def only_first_rank_speaks(shard: tp.Shard) -> None:
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    if shard.rank:
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")


@contextlib.contextmanager
def profile(path: str | None, shard: tp.Shard):
    """Write a Chrome trace of what runs within, if a path is given."""
    if not path:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    if not shard.rank:
        with atomic_write(path) as file:
            profiler.export_chrome_trace(str(file))


def use_colour() -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def show(engine, blocks) -> dict:
    """Print blocks as they come, on a terminal in the colours of their sources; the statistics."""
    decoder, colour = engine.tokenizer.stream(), use_colour() and engine.drafter is not None
    for block in blocks:
        for token, source in zip(block.tokens, block.sources):
            text, style = decoder.push([token]), colour and STYLES.get(source, STYLES["lossy"])
            print(f"{style}{text}\033[0m" if style and text else text, end="", flush=True)
    print(decoder.flush(), flush=True)
    if engine.stats["finish_reason"] == "length":
        say(f"(cut off at {engine.stats['new_tokens']} tokens, the length limit)")
    return engine.stats


def show_answers(engine, ids: list[int], options: dict, prompt: str, count: int) -> list[dict]:
    """Answer `count` times, with seeds that count on; a list of statistics."""
    if use_colour() and engine.drafter is not None and engine.rule != "none":
        names = ("accepted by the exact rule", f"kept by the {engine.rule} alone",
                 "written by the target")
        print("   ".join(f"{style}{text}\033[0m" for style, text in zip(STYLES.values(), names)))
    print(f"{prompt}\n", flush=True)
    seeds = range(options["seed"], options["seed"] + count)
    return [show(engine, engine.generate(ids, **options | {"seed": seed})) | {"prompt": prompt}
            for seed in seeds]


def read_line() -> str:
    """A line from the terminal, empty at its end."""
    try:
        return input("\n> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def chat(engine, options: dict, system: str | None) -> list[dict]:
    """Read turns from the terminal until end of input; the caches keep what was said."""
    tokenizer, shard, samples = engine.tokenizer, engine.shard, []
    opening = [{"role": "system", "content": system}] if system else []
    fresh = history = tokenizer.encode_chat(opening, add_generation_prompt=False)
    end_of_turn = tokenizer.special_tokens["<|eot_id|>"]
    say("One line is one turn; an empty line or Ctrl-D ends the chat, Ctrl-C stops an answer.")
    while True:
        try:
            line = shard.from_first(shard.rank == 0 and read_line())
        except KeyboardInterrupt:
            return samples
        if not line.strip():
            return samples
        turn = [*tokenizer.encode_turn("user", line), *tokenizer.encode_turn("assistant")]
        if len(history) + len(turn) >= engine.max_seq_length:
            say(f"The context of {engine.max_seq_length} tokens is full: starting anew.")
            history = fresh
            if len(fresh) + len(turn) >= engine.max_seq_length:
                continue  # this turn alone does not fit
        ids, seed = [*history, *turn], options["seed"] + len(samples)
        try:
            show(engine, engine.generate(ids, **options | {"seed": seed}, keep_cache=True))
        except KeyboardInterrupt:
            if shard.world > 1:  # it ends all ranks
                raise
        said = engine.stats.get("tokens", [])
        ended = said and said[-1] in engine.stop_tokens
        history = [*ids, *said] if ended else [*ids, *said, end_of_turn]
        samples += [engine.stats | {"prompt": line}] if said else []


def write_json(path: str | None, samples: list[dict], shard: tp.Shard) -> None:
    if path and not shard.rank:
        text = json.dumps(samples, indent=1, ensure_ascii=False) + "\n"
        with atomic_write(path) as file:
            file.write_text(text, encoding="utf-8")


def print_table(samples: list[dict]) -> None:
    """One row per answer: how long and how it ended, speed, tokens a round, who kept how many."""
    rows = ["rule tokens ended tok/s ms/tok speed rounds tokens/round exact lossy".split()]
    for s in samples:
        speed, base = s["tokens_per_second"], samples[0]["tokens_per_second"]
        rows.append([s["rule"].replace("none", "target alone"), str(s["new_tokens"]),
                     s["finish_reason"], f"{speed:.1f}", f"{1000 / speed:.2f}",
                     f"{speed / base:.2f}x", str(s["rounds"]), f"{s['tokens_per_round']:.2f}",
                     str(s["accepted_exact"]), str(s["accepted_judge"])])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [" ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
             for row in rows]
    if samples:
        print("\n" + "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]))


def run_main(main: Callable[[], None], name: str) -> None:
    """A command line's way out: a user's mistake is one line and exit status 2."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        say(f"{name}: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
