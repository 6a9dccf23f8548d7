"""Train the judge head: labelled answers in, a linear head on the target's hidden states out.

A good model's state shows a mistake that it has just read, and a linear classifier finds it there
(Bachmann et al., ICLR 2025, arXiv 2501.19309). Each token of a labelled answer is one example: its
own row h of the frozen target's last hidden states, before the final norm, and whether it is right.

    score = sigmoid(w . h + b);  loss = mean of n / (2 n_y) * cross entropy(score, y); AdamW

Answers are JSON lines: `prompt` (one user turn), `response`, `errors` (character spans [start, end)
of its mistakes; empty: none), perhaps `system`. A token that overlaps a span is a negative; those
before the first span are positives. What follows builds on the mistake, but may follow soundly:
`--negatives mistake` leaves it out, as a judge that stops there never sees it; `onward` makes it
negative, for more examples and more noise. Stop tokens get no label: the judge has no say there.
scripts/label.py writes such lines without annotators, with two more fields: `labels` (`token`, an
index into the response, and `right`) replaces `errors` and labels no other token; `response_ids`
are the response's tokens where its text alone would be read as others. Several files of --data add
up, by --weights. `--only rejected` trains on the tokens that the exact rule rejects, the only ones
on which a judge has a say (as AutoJudge does, arXiv 2504.20039).

Hidden states are cached by a hash of weight files, dtype and tokens: a stopped run goes on where it
was. Training standardises them and folds that into w and b. Class weights put the balance at 0.5,
so a score is no probability. The threshold is the lowest from 0.5 (the paper's) that keeps at most
--max_kept_wrong of the validation mistakes that the exact greedy rule rejects. Validation (whole
questions) chooses epoch and threshold: measure a head's worth on yet other questions.

    python train_head.py --checkpoint_path checkpoints/demo/target --data answers.jsonl
    torchrun --standalone --nproc_per_node=8 train_head.py ...   # all ranks compute hidden states

Shapes: S tokens, R response tokens, N labelled tokens, D model dim. It makes no labels.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import tp
from checkpoint import (
    DTYPES,
    Checkpoint,
    ModelConfig,
    SafetensorsFile,
    atomic_write,
    check_writable,
)
from judge import FEATURE, JudgeHead, greedy
from model import Transformer
from tokenizer import Tokenizer

try:
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_auc_score
    from tqdm import tqdm
    MISSING = None
except ImportError as error:
    MISSING = error.name

ROOT = Path(__file__).resolve().parent
CODE = [ROOT / f"{name}.py" for name in ("model", "attention", "quantize")]  # hidden states' key
CORRECT, WRONG, LEFT_OUT = 1, 0, -1
SHARD_ANSWERS = 16  # in one pass and one cache file (0.1 GB for 200 tokens an answer at D = 16384)
PATIENCE = 5  # epochs without a better validation loss before training stops
GRID = [i / 1000 for i in range(1001)]  # thresholds that are weighed, and those that are shown
SHOWN = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
POPULATIONS = {"all": "all validation tokens", "rejected": "tokens that the exact rule rejects"}


class Answer(NamedTuple):
    """Ids of a prompt and its response, and a label for each token of the response."""

    question: str
    ids: list[int]
    prompt_tokens: int
    labels: list[int]
    weight: float = 1.0  # of each token in the loss


def token_labels(pieces: list[bytes], response: str, errors: list[list[int]], negatives: str,
                 start: int = 0) -> list[int]:
    """A label by the bytes that each token spells; the first token begins at byte `start`."""
    spans = [[len(response[:char].encode()) for char in span] for span in errors]
    first = min(spans, default=[math.inf])[0]
    after, labels = LEFT_OUT if negatives == "mistake" else WRONG, []
    for piece in pieces:
        stop = start + len(piece)
        wrong = any(start < end and stop > begin for begin, end in spans)
        labels.append(WRONG if wrong else after if stop > first else CORRECT)
        start = stop
    return labels


def given_labels(raw: dict, tokens: int) -> list[int]:
    """A label a token by the line's own `labels`; LEFT_OUT where it has none."""
    labels = [LEFT_OUT] * tokens
    if not isinstance(raw["labels"], list):
        raise ValueError(f"got labels {json.dumps(raw['labels'])[:40]}, expected a list")
    for each in raw["labels"]:
        token, right = (each.get(key) if isinstance(each, dict) else None
                        for key in ("token", "right"))
        if type(token) is not int or type(right) is not bool or not 0 <= token < tokens:
            raise ValueError(f"got {json.dumps(each)[:60]} in labels, expected token, from 0 to "
                             f"{tokens - 1}, and right, true or false")
        labels[token] = CORRECT if right else WRONG
    return labels


def spelled_labels(raw: dict, ids: list[int], tokenizer: Tokenizer, negatives: str) -> list[int]:
    """A label a token by the spans of `errors`."""
    text, errors = raw["response"], raw.get("errors")
    for span in errors if isinstance(errors, list) else [errors]:
        pair = isinstance(span, list) and [type(n) for n in span] == [int, int]
        if not pair or not 0 <= span[0] < span[1] <= len(text):
            raise ValueError(f"got {json.dumps(span)[:40]} in errors, expected [start, end) with 0 "
                             f"<= start < end <= {len(text)}")
    pieces, space = [tokenizer.token_bytes(i) for i in ids], int(tokenizer.adds_space)
    if b"".join(pieces) != b" " * space + text.encode():
        raise ValueError("got a response that its tokens spell otherwise, so spans have no place; "
                         "leave it out")
    return token_labels(pieces, text, errors, negatives, -space)


def response_ids(raw: dict, tokenizer: Tokenizer) -> list[int]:
    """The response's tokens: its `response_ids`, which must spell it, or those of its text."""
    ids = raw.get("response_ids")
    if ids is None:
        return tokenizer.encode(raw["response"])
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise ValueError(f"got response_ids {json.dumps(ids)[:40]}, expected token ids")
    if (spelled := tokenizer.decode(ids)) != raw["response"]:
        raise ValueError(f"got response_ids that spell {spelled[:40]!r}, expected the response")
    return ids


def encode_answer(line: bytes, tokenizer: Tokenizer, *, context: int, negatives: str,
                  weight: float = 1.0) -> Answer:
    """Check one line, encode and label it; ValueError says what is wrong."""
    raw = json.loads(line)
    if not isinstance(raw, dict):
        raise ValueError(f"got a JSON {type(raw).__name__}")
    system = raw.get("system") or None
    for key, value in (("prompt", raw.get("prompt")), ("response", raw.get("response")),
                       ("system", system or "none")):
        if not isinstance(value, str) or not value:
            raise ValueError(f"got {key} {json.dumps(value)[:40]}, expected text that is not empty")
    ids = tokenizer.encode_prompt(raw["prompt"], system=system)
    response = response_ids(raw, tokenizer)
    labels = (spelled_labels(raw, response, tokenizer, negatives) if "labels" not in raw else
              given_labels(raw, len(response)))
    if len(ids) + len(response) > context:
        raise ValueError(f"got {len(ids)} + {len(response)} tokens, prompt and response, beyond "
                         f"the context of {context}")
    return Answer(raw["prompt"], [*ids, *response], len(ids), labels, weight)


def read_answers(path: str | Path, tokenizer: Tokenizer, *, context: int, negatives: str,
                 weight: float = 1.0) -> list[Answer]:
    """All answers of a file, the longest first (neighbours share a pass); ValueError by line."""
    answers = []
    for number, line in enumerate(Path(path).read_bytes().rstrip().splitlines(), 1):
        try:
            answers.append(encode_answer(line, tokenizer, context=context, negatives=negatives,
                                         weight=weight))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; expected JSON with prompt, response "
                             "and errors (spans) or labels") from None
    return by_length(answers)


def by_length(answers: list[Answer]) -> list[Answer]:
    return sorted(answers, key=lambda answer: -len(answer.ids))


def split_questions(questions: set[str], *, share: float, seed: int) -> set[str]:
    """The questions whose answers, all of them, are for validation."""
    if len(questions) < 2:
        raise ValueError(f"got {len(questions)} questions with answers, expected 2 or more: to "
                         "train on some, validate on others")
    count = min(max(round(share * len(questions)), 1), len(questions) - 1)
    return set(random.Random(seed).sample(sorted(questions), count))


@torch.inference_mode()
def hidden_states(model: Transformer, answers: list[Answer]) -> tuple[Tensor, Tensor]:
    """hidden [R, D] of all response tokens, and bool [R]: the exact greedy rule rejects it."""
    width = max(len(answer.ids) for answer in answers)  # padded where causal attention never looks
    tokens = torch.tensor([answer.ids + [0] * (width - len(answer.ids)) for answer in answers],
                          device=model.device)
    parts = []
    for states, ids, answer in zip(model(tokens), tokens, answers):  # [S, D], [S]
        start, stop = answer.prompt_tokens, len(answer.ids)
        logits = model.logits(states[start - 1:stop - 1])  # of the row before each token
        proposed, _ = greedy(logits, model.shard, model.first_token)
        parts.append((states[start:stop].cpu(), (proposed != ids[start:stop]).cpu()))
    return tuple(map(torch.cat, zip(*parts)))


def load_features(answers: list[Answer], path: Path, *, cache: Path, device: torch.device,
                  dtype: torch.dtype, shard: tp.Shard) -> list[Tensor]:
    """hidden [N, D] and rejected bool [N] of all labelled tokens, on the CPU, through `cache`.

    Over ranks all compute, and the first alone reads and writes the cache; the others get nothing.
    """
    stats = [(name, file.path.stat()) for name, file in Checkpoint(path).files.items()]
    key = f"{FEATURE} {dtype} {[(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]}"
    key += "".join(part.read_text("utf-8") for part in (path / "config.json", *CODE))
    model, parts = None, []
    for i in tqdm(range(0, len(answers), SHARD_ANSWERS), desc="hidden states", unit=" shards",
                  disable=shard.rank > 0):
        some = answers[i:i + SHARD_ANSWERS]
        tokens = json.dumps([key, [(answer.prompt_tokens, answer.ids) for answer in some]])
        file = cache / f"{hashlib.sha256(tokens.encode()).hexdigest()}.safetensors"
        if not shard.from_first(file.is_file()):
            if model is None:
                model = Transformer.from_checkpoint(path, device=device, dtype=dtype, shard=shard)
            hidden, rejected = hidden_states(model, some)
            if shard.rank == 0:
                with atomic_write(file) as aside:
                    save_file({"hidden": hidden, "rejected": rejected}, aside)
        if shard.rank == 0:
            kept = torch.tensor([label != LEFT_OUT for answer in some for label in answer.labels])
            read = SafetensorsFile(file).read
            parts.append([read(name)[kept] for name in ("hidden", "rejected")])
    return list(map(torch.cat, zip(*parts)))


def fit(hidden: Tensor, labels: Tensor, weights: Tensor, train: Tensor, validation: Tensor, *,
        lr: float, weight_decay: float, batch_size: int, epochs: int, seed: int,
        device: torch.device) -> tuple[Tensor, Tensor, int, float]:
    """Train on rows `train` of hidden [N, D], labels and weights [N]; ValueError: loss diverges.

    Weights count in the loss, relative to each other, and not in the standardisation.

    Returns weight float32 [1, D] and bias [1] for raw hidden states, best epoch and its loss.
    """
    x, y = hidden.to(device, torch.float32, copy=True), labels.to(device, torch.float32)
    std, mean = torch.std_mean(x[train], 0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)  # a dimension that never changes stays 0
    x.sub_(mean).div_(std)
    weights = weights / weights[train].mean()
    counts = labels[train].bincount(weights[train], minlength=2)
    class_weight = (weights * (counts.sum() / (2 * counts))[labels]).to(device, torch.float32)
    weight, bias = (torch.zeros(n, device=device, requires_grad=True) for n in (x.shape[1], 1))
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=weight_decay)
    generator, best = torch.Generator().manual_seed(seed), (None, None, 0, math.inf)
    for epoch in (bar := tqdm(range(1, epochs + 1), desc="training", unit=" epochs")):
        for rows in train[torch.randperm(len(train), generator=generator)].split(batch_size):
            optimizer.zero_grad()
            cross_entropy(x[rows] @ weight + bias, y[rows], class_weight[rows]).backward()
            optimizer.step()
        loss = cross_entropy(x[validation] @ weight.detach() + bias.detach(), y[validation],
                             class_weight[validation]).item()
        bar.set_postfix(validation_loss=f"{loss:.4f}")
        if not math.isfinite(loss):
            raise ValueError(f"got validation loss {loss} with --lr {lr}, expected a number; lower "
                             "it, or try another --dtype")
        if loss < best[3] * (1 - 1e-4):
            raw = weight.detach().double() / std
            shift = (bias.detach() - raw @ mean.double()).float().cpu()
            best = raw.float()[None].cpu(), shift, epoch, loss
        elif epoch - best[2] >= PATIENCE:
            break
    return best


def evaluate(scores: Tensor, labels: Tensor, thresholds: list[float]) -> dict:
    """Counts, ROC-AUC and shares of scores above each threshold (float32); None for no tokens."""
    auc = float(roc_auc_score(labels, scores)) if len(labels.unique()) == 2 else None
    curve = {"thresholds": thresholds, "roc_auc": auc}
    for kind, label in (("correct", CORRECT), ("wrong", WRONG)):
        found = scores[labels == label].sort().values
        below = torch.searchsorted(found, torch.tensor(thresholds), right=True)
        shares = ((len(found) - below).double() / max(len(found), 1)).tolist()
        curve |= {kind: len(found), f"kept_{kind}": shares if len(found) else [None] * len(shares)}
    return curve


def choose_threshold(curve: dict, max_kept_wrong: float) -> float:
    """The lowest threshold from 0.5 on that keeps at most this share of mistakes; 0.5 for none."""
    return next(t for t, share in zip(curve["thresholds"], curve["kept_wrong"])
                if t >= 0.5 and (share or 0) <= max_kept_wrong)


def table(curves: dict[str, dict], threshold: float) -> str:
    """What each population is, then shares kept at the thresholds SHOWN and the chosen one (*)."""
    lines = []
    for name, curve in curves.items():
        auc = "undefined" if curve["roc_auc"] is None else f"{curve['roc_auc']:.4f}"
        lines.append(f"{name}: {POPULATIONS[name]}, {curve['correct']} correct and "
                     f"{curve['wrong']} wrong, ROC-AUC {auc}")
    titles = (f"{name} {kind}" for name in curves for kind in ("correct", "wrong"))
    lines.append("threshold " + "".join(f"{title:>18}" for title in titles))
    shares = [curve[kind] for curve in curves.values() for kind in ("kept_correct", "kept_wrong")]
    for t, *row in zip(curves["all"]["thresholds"], *shares):
        if t in SHOWN or t == threshold:
            cells = "".join(f"{'-':>18}" if share is None else f"{share:18.2%}" for share in row)
            lines.append(f"{t:<9g}{'*' if t == threshold else ' '}{cells}")
    return "\n".join(lines)


def plot(path: Path, curves: dict[str, dict], threshold: float) -> None:
    """Share kept against the threshold, a panel for each population, as PNG."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, 2, sharey=True), curves.items()):
        for kind in ("correct", "wrong"):  # blue, orange
            label = f"{curve[kind]:,} {kind}"
            axes.plot(curve["thresholds"], curve[f"kept_{kind}"], label=label)
        axes.axvline(threshold, color="black", linestyle=":", label=f"chosen: {threshold:g}")
        axes.set(title=POPULATIONS[name], xlabel="threshold", ylabel="share kept", xlim=(0, 1),
                 ylim=(-0.01, 1.02))
        axes.legend()
    with atomic_write(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint_path", required=True, metavar="DIR", help="target: a Hugging Face directory")
    add("--data", required=True, metavar="FILE", nargs="+", help="labelled answers, JSON lines")
    add("--weights", type=float, metavar="W", nargs="+",
        help="of the files' tokens in the loss, one a file (default: 1)")
    add("--only", choices=("all", "rejected"), default="all",
        help="labelled tokens to train on: all, or those that the exact rule rejects "
             "(default: %(default)s)")
    add("--output", metavar="FILE", help="the head (default: judge.safetensors beside the target)")
    add("--negatives", choices=("mistake", "onward"), default="mistake",
        help="what counts as wrong, see above (default: %(default)s)")
    add("--threshold", type=float, metavar="δ", help="store this, 0..1, instead of choosing it")
    add("--max_kept_wrong", type=float, default=0.1, help="share, at most (default: %(default)s)")
    add("--lr", type=float, default=1e-4, help="learning rate (default: %(default)s)")
    add("--weight_decay", type=float, default=0.1, help="of AdamW (default: %(default)s)")
    add("--batch_size", type=int, default=128, help="tokens a step (default: %(default)s)")
    add("--epochs", type=int, default=100, help="at most; stops early (default: %(default)s)")
    add("--validation", type=float, default=0.2, help="share of questions (default: %(default)s)")
    add("--cache", default=str(ROOT / "build" / "head-cache"), metavar="DIR",
        help="hidden states (default: %(default)s)")
    add("--plot", metavar="FILE.png", help="the curves (default: beside the head)")
    add("--json", metavar="FILE", help="settings, loss, ROC-AUC and curves")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, help="default: as generate.py runs the target")
    add("--seed", type=int, default=0, help="of split and training order (default: %(default)s)")
    return parser.parse_args(argv)


def check_options(args: argparse.Namespace) -> None:
    """ValueError for options out of range, FileNotFoundError for places that cannot be written."""
    if MISSING:
        raise ValueError(f"got no {MISSING}, expected it; pip install -r requirements-train.txt")
    for name, low, high in (("lr", 1e-12, 1e3), ("weight_decay", 0, 1e3), ("batch_size", 1, 1e9),
                            ("epochs", 1, 1e9), ("validation", 1e-9, 1 - 1e-9),
                            ("max_kept_wrong", 0, 1), ("threshold", 0, 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"got --{name} {value}, expected a number from {low:g} to {high:g}")
    args.output = Path(args.output or Path(args.checkpoint_path) / "judge.safetensors")
    args.plot = Path(args.plot or args.output.with_suffix(".png"))
    for path in (args.output, args.plot, args.json):
        check_writable(path)
    args.weights = args.weights or [1.0] * len(args.data)
    if len(args.weights) != len(args.data) or not all(0 < w < math.inf for w in args.weights):
        raise ValueError(f"got --weights {args.weights} for {len(args.data)} files, expected a "
                         "positive number for each")


class Rows(NamedTuple):
    """All labelled tokens, N of them: label, loss weight, and whether it is for validation."""

    labels: Tensor  # int64 [N]
    weights: Tensor  # float64 [N]
    held_out: Tensor  # bool [N]

    def split(self, kept: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Which of the rows `kept` (bool [N]) train and which validate; ValueError: one kind."""
        sides = tuple((kept & (self.held_out == side)).nonzero()[:, 0] for side in (False, True))
        for name, rows in zip(("training", "validation"), sides):
            wrong, right = self.labels[rows].bincount(minlength=2).tolist()
            if not (wrong and right):
                raise ValueError(f"{what}: got {right} correct and {wrong} mistaken tokens in "
                                 f"{name}, expected some of both; give more answers, with errors "
                                 "and without, or another --seed")
        return sides


def label_rows(answers: list[Answer], args: argparse.Namespace) -> Rows:
    """The labelled tokens of all answers, whole questions for validation."""
    questions = {answer.question for answer in answers}
    held = split_questions(questions, share=args.validation, seed=args.seed)
    rows = [(label, answer.weight, answer.question in held) for answer in answers
            for label in answer.labels if label != LEFT_OUT]
    labels, weights, held_out = torch.tensor(rows, dtype=torch.float64).view(-1, 3).T
    return Rows(labels.long(), weights, held_out.bool())


def advice(curves: dict[str, dict], threshold: float, args: argparse.Namespace) -> str:
    """What the head can do, in a paragraph, and the next command."""
    curve = curves["rejected"]
    if curve["roc_auc"] is None:
        return ("Validation has no rejected tokens of both kinds, so what this head can do is not "
                "known: label more answers.")
    best = max((right for right, wrong in zip(curve["kept_correct"], curve["kept_wrong"])
                if wrong <= 0.1), default=0.0)
    at = curve["thresholds"].index(threshold)
    return (f"Of the tokens that the exact rule rejects, this head tells right from wrong with an "
            f"AUC of {curve['roc_auc']:.3f}: it can keep {best:.0%} of the right ones "
            f"while it keeps 10% of the wrong ones. At its threshold {threshold:g} it keeps "
            f"{curve['kept_correct'][at]:.0%} of the right and {curve['kept_wrong'][at]:.0%} of "
            "the wrong, by the labels it was given. What that does to answers only answers can "
            f"tell:\n    python scripts/calibrate.py --checkpoint_path {args.checkpoint_path} "
            f"--draft_checkpoint_path DRAFT --judge {args.output} --prompts UNSEEN.jsonl "
            "--check number --max_regressions 0.02")


def main(args: argparse.Namespace) -> None:
    """Run the command line; ValueError and OSError are a user's mistakes."""
    path = Path(args.checkpoint_path)
    config, tokenizer = ModelConfig.from_checkpoint(path), Tokenizer.from_checkpoint(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path}: got {tokenizer.vocab_size} tokens, expected at most the model's "
                         f"{config.vocab_size}; download it again")
    check_options(args)
    device = tp.pick_device(args.device)
    dtype = tp.pick_dtype(args.dtype, config, device)
    tp.check_world(config, tp.world_size(), str(path))
    context = config.max_position_embeddings
    answers = by_length([
        answer for data, weight in zip(args.data, args.weights)
        for answer in read_answers(data, tokenizer, context=context, negatives=args.negatives,
                                   weight=weight)])
    rows, name = label_rows(answers, args), ", ".join(map(str, args.data))
    rows.split(torch.ones_like(rows.held_out), name)  # before a weight is read
    Path(args.cache).mkdir(parents=True, exist_ok=True)
    shard = tp.start(device)
    parts = load_features(answers, path, cache=Path(args.cache), device=device, dtype=dtype,
                          shard=shard)
    tp.stop()
    if shard.rank == 0:  # the head is one rank's work
        train_and_write(*parts, rows, answers, args, device)


def train_and_write(hidden: Tensor, rejected: Tensor, rows: Rows, answers: list[Answer],
                    args: argparse.Namespace, device: torch.device) -> None:
    """Train on the rows asked for, choose the threshold, write and say what came of it."""
    only = args.only == "rejected"
    train, validation = rows.split(rejected if only else torch.ones_like(rejected),
                                   f"{', '.join(map(str, args.data))}, --only {args.only}")
    names = ("lr", "weight_decay", "batch_size", "epochs", "seed")
    weight, bias, epoch, loss = fit(hidden, rows.labels, rows.weights, train, validation,
                                    device=device, **{name: getattr(args, name) for name in names})
    validation = rows.held_out.nonzero()[:, 0]  # the curves are of all labelled tokens
    scores = torch.sigmoid(hidden[validation].float() @ weight[0] + bias)
    seen, among = rows.labels[validation], rejected[validation]
    thresholds = sorted({*GRID, args.threshold or 0.0})
    curves = {"all": evaluate(scores, seen, thresholds),
              "rejected": evaluate(scores[among], seen[among], thresholds)}
    threshold = args.threshold
    if threshold is None:
        threshold = choose_threshold(curves["rejected"], args.max_kept_wrong)
    plot(args.plot, curves, threshold)
    files = ", ".join(Path(data).name + (f" x {weight:g}" if weight != 1 else "")
                      for data, weight in zip(args.data, args.weights))
    data = (f"{files}: {len(answers)} answers, {len(rows.labels)} labelled tokens, "
            f"negatives: {args.negatives}" + (f", only {args.only}" if only else ""))
    metadata = {"target": Path(args.checkpoint_path).resolve().name, "data": data,
                "threshold": str(threshold)}
    JudgeHead(weight, bias, metadata).save(args.output)
    if args.json:
        report = vars(args) | metadata | {"threshold": threshold, "epoch": epoch,
                                          "validation_loss": loss, **curves}
        with atomic_write(args.json) as aside:
            aside.write_text(json.dumps(report, default=str) + "\n")
    print(f"{data}\nvalidation loss {loss:.4f} after epoch {epoch}\n{table(curves, threshold)}")
    print(f"wrote {args.output} (threshold {threshold:g}) and {args.plot}\n")
    print(advice(curves, threshold, args))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train_head.py: {error}", file=sys.stderr)
        sys.exit(2)
