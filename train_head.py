"""Train the judge head: labelled answers in, a linear head on the frozen target's hidden states out.

A mistake shows in the state of a good model that has just read it, and a linear classifier finds it there (Bachmann et al.,
ICLR 2025, arXiv 2501.19309). Each token of a labelled answer is one example: its own row h of the target's last hidden states,
after the target has read it and before the final norm, and whether it is right.

    score = sigmoid(w . h + b);  loss = mean of n / (2 n_y) * cross entropy(score, y), y = 1: correct, 0: mistake; AdamW

Answers are JSON lines: `prompt` (one user turn), `response`, `errors` (character spans [start, end) of its mistakes; empty: it is
correct), perhaps `system`. A token that overlaps a span is a negative, those before the first span are positives, and on the rest
sources disagree. `--negatives mistake` leaves it out: it builds on the mistake but may follow soundly, and a judge that stops
there never sees it. `onward` makes it negative: more examples, and a second chance where a mistake slipped through, for more
noise. Stop tokens get no label: the judge has no say there.

Hidden states are cached in shards named by a hash of weight files, dtype and tokens: a stopped run goes on where it was, another
--lr or --negatives computes none. Training standardises them and folds that into w and b: the file is a plain head on raw states.
Class weights put the balance at 0.5 however rare mistakes are, so the threshold is a score, no probability: the lowest from 0.5
(the paper's) that keeps at most --max_kept_wrong of the validation mistakes that the exact greedy rule rejects, since what it
accepts stays anyway. Validation (whole questions) chooses epoch and threshold: measure a head's worth on yet other questions.

    python train_head.py --checkpoint_path Llama-3.1-70B-Instruct --data answers.jsonl
    python train_head.py --checkpoint_path checkpoints/demo/target --data answers.jsonl --negatives onward --json report.json
    torchrun --standalone --nproc_per_node=8 train_head.py …     # hidden states by all ranks, the head by the first

Shapes: S tokens, R response tokens, N labelled tokens (in memory as float32), D model dim. It makes no labels.
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
from generate import check_writable, encode_prompt, pick_device, pick_dtype, say
from judge import FEATURE, JudgeHead, greedy, written_aside
from model import DTYPES, WHOLE, Checkpoint, ModelConfig, SafetensorsFile, Transformer, Whole
from tokenizer import Tokenizer

try:
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_auc_score
    from tqdm import tqdm
    MISSING = None
except ImportError as error:
    MISSING = error.name

ROOT = Path(__file__).resolve().parent
CORRECT, WRONG, LEFT_OUT = 1, 0, -1
SHARD_ANSWERS = 16  # in one pass and one cache file (0.1 GB for 200 tokens an answer at D = 16384)
PATIENCE = 5  # epochs without a better validation loss before training stops
GRID = [i / 1000 for i in range(1001)]  # thresholds that are weighed
SHOWN = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # and shown in the table
POPULATIONS = {"all": "all validation tokens", "rejected": "tokens that the exact rule rejects"}


class Answer(NamedTuple):
    """One labelled answer: ids of prompt and response, and a label for each token of the response."""
    question: str
    ids: list[int]
    prompt_tokens: int
    labels: list[int]


def token_labels(pieces: list[bytes], response: str, errors: list[list[int]], negatives: str, start: int = 0) -> list[int]:
    """CORRECT, WRONG or LEFT_OUT by the bytes that each token spells; the first begins at byte `start` of the response."""
    spans = [[len(response[:char].encode()) for char in span] for span in errors]
    first, after, labels = min(spans, default=[math.inf])[0], LEFT_OUT if negatives == "mistake" else WRONG, []
    for piece in pieces:
        stop = start + len(piece)
        wrong = any(start < end and stop > begin for begin, end in spans)
        labels.append(WRONG if wrong else after if stop > first else CORRECT)
        start = stop
    return labels


def encode_answer(line: bytes, tokenizer: Tokenizer, *, context: int, negatives: str) -> Answer:
    """Check one line, encode and label it; ValueError says what is wrong."""
    raw = json.loads(line)
    if not isinstance(raw, dict):
        raise ValueError(f"got a JSON {type(raw).__name__}")
    text, errors, system = raw.get("response"), raw.get("errors"), raw.get("system") or ""
    for key, value in {"prompt": raw.get("prompt"), "response": text, "system": system or "none"}.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"got {key} {json.dumps(value)[:40]}, expected text that is not empty")
    for span in errors if isinstance(errors, list) else [errors]:
        pair = isinstance(span, list) and [type(n) for n in span] == [int, int]
        if not pair or not 0 <= span[0] < span[1] <= len(text):
            raise ValueError(f"got {json.dumps(span)[:40]} in errors, expected [start, end) with 0 <= start < end <= {len(text)}")
    prompt, response = encode_prompt(tokenizer, raw["prompt"], raw=False, system=system), tokenizer.encode(text)
    pieces, space = [tokenizer.token_bytes(i) for i in response], int(tokenizer.adds_space)
    if b"".join(pieces) != b" " * space + text.encode():
        raise ValueError("got a response that its tokens spell otherwise, so spans have no place; leave it out")
    if len(prompt) + len(response) > context:
        raise ValueError(f"got {len(prompt)} + {len(response)} tokens, prompt and response, beyond the context of {context}")
    return Answer(raw["prompt"], [*prompt, *response], len(prompt), token_labels(pieces, text, errors, negatives, -space))


def read_answers(path: str | Path, tokenizer: Tokenizer, *, context: int, negatives: str) -> list[Answer]:
    """All answers of a file, the longest first. ValueError names the line."""
    answers = []
    for number, line in enumerate(Path(path).read_bytes().rstrip().splitlines(), 1):
        try:
            answers.append(encode_answer(line, tokenizer, context=context, negatives=negatives))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; expected JSON with prompt, response and errors (spans)") from None
    return sorted(answers, key=lambda answer: -len(answer.ids))  # neighbours share a pass: little padding


def split_questions(questions: set[str], *, share: float, seed: int) -> set[str]:
    """The questions whose answers, all of them, are for validation."""
    if len(questions) < 2:
        raise ValueError(f"got {len(questions)} questions with answers, expected 2 or more: to train on some, validate on others")
    return set(random.Random(seed).sample(sorted(questions), min(max(round(share * len(questions)), 1), len(questions) - 1)))


@torch.inference_mode()
def hidden_states(model: Transformer, answers: list[Answer]) -> tuple[Tensor, Tensor]:
    """hidden [R, D] of all response tokens in their order, and bool [R]: the exact greedy rule rejects the token."""
    width = max(len(answer.ids) for answer in answers)  # padded on the right, where causal attention never looks
    tokens = torch.tensor([answer.ids + [0] * (width - len(answer.ids)) for answer in answers], device=model.device)
    parts = []
    for states, ids, answer in zip(model(tokens), tokens, answers):  # [S, D], [S]
        start, stop = answer.prompt_tokens, len(answer.ids)
        logits = model.logits(states[start - 1:stop - 1])  # of the row before each token
        proposed, _ = greedy(logits, model.shard, model.first_token)
        parts.append((states[start:stop].cpu(), (proposed != ids[start:stop]).cpu()))
    return tuple(map(torch.cat, zip(*parts)))


def load_features(answers: list[Answer], path: Path, *, cache: Path, device: torch.device, dtype: torch.dtype,
                  shard: Whole = WHOLE) -> list[Tensor]:
    """hidden [N, D] and rejected bool [N] of all labelled tokens, on the CPU; computes the shards that `cache` lacks.

    Over ranks (tp.Shard) all compute, and the first alone reads and writes the cache; the others get nothing.
    """
    stats = {name: file.path.stat() for name, file in Checkpoint(path).files.items()}
    key = f"{FEATURE} {dtype} {[(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]}"
    key += "".join(part.read_text("utf-8") for part in (path / "config.json", ROOT / "model.py", ROOT / "quantize.py"))
    model, parts = None, []
    for i in tqdm(range(0, len(answers), SHARD_ANSWERS), desc="hidden states", unit=" shards", disable=shard.rank > 0):
        some = answers[i:i + SHARD_ANSWERS]
        tokens = json.dumps([key, [(answer.prompt_tokens, answer.ids) for answer in some]])
        file = cache / f"{hashlib.sha256(tokens.encode()).hexdigest()}.safetensors"
        if not shard.from_first(file.is_file()):
            model = model or Transformer.from_checkpoint(path, device=device, dtype=dtype, shard=shard)
            hidden, rejected = hidden_states(model, some)
            if shard.rank == 0:
                with written_aside(file) as aside:
                    save_file({"hidden": hidden, "rejected": rejected}, aside)
        if shard.rank:
            continue
        labelled = torch.tensor([label != LEFT_OUT for answer in some for label in answer.labels])
        parts.append([SafetensorsFile(file).read(name)[labelled] for name in ("hidden", "rejected")])
    return list(map(torch.cat, zip(*parts)))


def fit(hidden: Tensor, labels: Tensor, train: Tensor, validation: Tensor, *, lr: float, weight_decay: float, batch_size: int,
        epochs: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, int, float]:
    """Train on rows `train` of hidden [N, D] and labels [N]; weight and bias for raw hidden states, best epoch and its loss."""
    x, y = hidden.to(device, torch.float32, copy=True), labels.to(device, torch.float32)
    std, mean = torch.std_mean(x[train], 0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)  # a dimension that never changes stays 0
    x.sub_(mean).div_(std)
    class_weight = (len(train) / (2 * labels[train].bincount(minlength=2)))[labels].to(device)  # [N], mean 1 over train
    weight, bias = (torch.zeros(n, device=device, requires_grad=True) for n in (x.shape[1], 1))
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=weight_decay)
    generator, best = torch.Generator().manual_seed(seed), (None, None, 0, math.inf)
    for epoch in (bar := tqdm(range(1, epochs + 1), desc="training", unit=" epochs")):
        for rows in train[torch.randperm(len(train), generator=generator)].split(batch_size):
            optimizer.zero_grad()
            cross_entropy(x[rows] @ weight + bias, y[rows], class_weight[rows]).backward()
            optimizer.step()
        loss = cross_entropy(x[validation] @ weight.detach() + bias.detach(), y[validation], class_weight[validation]).item()
        bar.set_postfix(validation_loss=f"{loss:.4f}")
        if not math.isfinite(loss):
            raise ValueError(f"got validation loss {loss} with --lr {lr}, expected a number; lower it, or try another --dtype")
        if loss < best[3] * (1 - 1e-4):
            raw = weight.detach().double() / std
            best = raw.float()[None].cpu(), (bias.detach() - raw @ mean.double()).float().cpu(), epoch, loss
        elif epoch - best[2] >= PATIENCE:
            break
    return best


def evaluate(scores: Tensor, labels: Tensor, thresholds: list[float]) -> dict:
    """Counts, ROC-AUC and the share of scores above each threshold, in float32 as in the engine; None for no tokens."""
    curve = {"thresholds": thresholds, "roc_auc": float(roc_auc_score(labels, scores)) if len(labels.unique()) == 2 else None}
    for kind, label in (("correct", CORRECT), ("wrong", WRONG)):
        found = scores[labels == label].sort().values
        share = (len(found) - torch.searchsorted(found, torch.tensor(thresholds), right=True)).double() / max(len(found), 1)
        curve |= {kind: len(found), f"kept_{kind}": share.tolist() if len(found) else [None] * len(thresholds)}
    return curve


def choose_threshold(curve: dict, max_kept_wrong: float) -> float:
    """The lowest threshold from 0.5 on that keeps at most this share of mistakes; 0.5 if there are none."""
    return next(t for t, share in zip(curve["thresholds"], curve["kept_wrong"]) if t >= 0.5 and (share or 0) <= max_kept_wrong)


def table(curves: dict[str, dict], threshold: float) -> str:
    """What each population is, then the shares kept at the thresholds SHOWN and at the chosen one, which is marked."""
    lines = [f"{name}: {POPULATIONS[name]}, {curve['correct']} correct and {curve['wrong']} wrong, ROC-AUC "
             + ("undefined" if curve["roc_auc"] is None else f"{curve['roc_auc']:.4f}") for name, curve in curves.items()]
    lines.append("threshold " + "".join(f"{name + ' ' + kind:>18}" for name in curves for kind in ("correct", "wrong")))
    shares = [curve[kind] for curve in curves.values() for kind in ("kept_correct", "kept_wrong")]
    for t, *row in zip(curves["all"]["thresholds"], *shares):
        if t in SHOWN or t == threshold:
            cells = "".join("-".rjust(18) if share is None else f"{share:18.2%}" for share in row)
            lines.append(f"{t:<9g}{'*' if t == threshold else ' '}{cells}")
    return "\n".join(lines)


def plot(path: Path, curves: dict[str, dict], threshold: float) -> None:
    """Share kept against the threshold, a panel for each population, as PNG."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, 2, sharey=True), curves.items()):
        for kind, colour in (("correct", "tab:blue"), ("wrong", "tab:orange")):
            axes.plot(curve["thresholds"], curve[f"kept_{kind}"], color=colour, label=f"{curve[kind]:,} {kind}")
        axes.axvline(threshold, color="black", linestyle=":", label=f"chosen: {threshold:g}")
        axes.set(title=POPULATIONS[name], xlabel="threshold", ylabel="share kept", xlim=(0, 1), ylim=(-0.01, 1.02))
        axes.legend()
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint_path", required=True, metavar="DIR", help="target: a Hugging Face directory")
    add("--data", required=True, metavar="FILE", help="labelled answers, JSON lines")
    add("--output", metavar="FILE", help="the head (default: judge.safetensors in the target's directory)")
    add("--negatives", choices=("mistake", "onward"), default="mistake", help="default: %(default)s")
    add("--threshold", type=float, metavar="δ", help="store this one, 0..1, instead of choosing it")
    add("--max_kept_wrong", type=float, default=0.1, metavar="SHARE", help="of mistakes, at most (default: %(default)s)")
    add("--lr", type=float, default=1e-4, help="learning rate (default: %(default)s)")
    add("--weight_decay", type=float, default=0.1, help="of AdamW (default: %(default)s)")
    add("--batch_size", type=int, default=128, metavar="N", help="tokens a step (default: %(default)s)")
    add("--epochs", type=int, default=100, metavar="N", help="at most; stops early (default: %(default)s)")
    add("--validation", type=float, default=0.2, metavar="SHARE", help="of the questions (default: %(default)s)")
    add("--cache", default=str(ROOT / "build" / "head-cache"), metavar="DIR", help="hidden states (default: %(default)s)")
    add("--plot", metavar="FILE.png", help="the curves (default: beside the head)")
    add("--json", metavar="FILE", help="settings, loss, ROC-AUC and curves")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, help="default: as generate.py runs the target")
    add("--seed", type=int, default=0, help="of the split and of the order in training (default: %(default)s)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run the command line; ValueError and OSError are a user's mistakes."""
    if MISSING:
        raise ValueError(f"got no {MISSING}, which training needs; pip install -r requirements-train.txt")
    for name, low, high in (("lr", 1e-12, 1e3), ("weight_decay", 0, 1e3), ("batch_size", 1, 1e9), ("epochs", 1, 1e9),
                            ("validation", 1e-9, 1 - 1e-9), ("max_kept_wrong", 0, 1), ("threshold", 0, 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"got --{name} {value}, expected a number from {low:g} to {high:g}")
    checkpoint = Path(args.checkpoint_path)
    config, tokenizer = ModelConfig.from_checkpoint(checkpoint), Tokenizer.from_checkpoint(checkpoint)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{checkpoint}: got {tokenizer.vocab_size} tokens for a model of {config.vocab_size}; download it again")
    output = Path(args.output or checkpoint / "judge.safetensors")
    picture = Path(args.plot or output.with_suffix(".png"))
    for path in (output, picture, args.json):
        check_writable(path)
    Path(args.cache).mkdir(parents=True, exist_ok=True)
    ranks = tp.under_torchrun()
    dtype = pick_dtype(args.dtype, config, device := tp.rank_device(args.device) if ranks else pick_device(args.device))
    if ranks:
        tp.check_world(config, int(os.environ["WORLD_SIZE"]), str(checkpoint))
    answers = read_answers(args.data, tokenizer, context=config.max_position_embeddings, negatives=args.negatives)
    held = split_questions({answer.question for answer in answers}, share=args.validation, seed=args.seed)
    rows = [(label, answer.question in held) for answer in answers for label in answer.labels if label != LEFT_OUT]
    labels, held_out = torch.tensor(rows, dtype=torch.int64).view(-1, 2).T.contiguous()
    train, validation = (held_out == 0).nonzero()[:, 0], held_out.nonzero()[:, 0]
    for name, part in (("training", labels[train]), ("validation", labels[validation])):
        if len(part.unique()) < 2:
            raise ValueError(f"{args.data}: got {(part == CORRECT).sum()} correct and {(part == WRONG).sum()} mistaken tokens in "
                             f"{name}, expected some of both; give more answers, with errors and without, or another --seed")
    shard = tp.start(device) if ranks else WHOLE
    features = load_features(answers, checkpoint, cache=Path(args.cache), device=device, dtype=dtype, shard=shard)
    tp.stop()
    if shard.rank:
        return  # the head is one rank's work
    hidden, rejected = features
    weight, bias, epoch, loss = fit(hidden, labels, train, validation, lr=args.lr, weight_decay=args.weight_decay, seed=args.seed,
                                    batch_size=args.batch_size, epochs=args.epochs, device=device)
    scores, seen, among = torch.sigmoid(hidden[validation].float() @ weight[0] + bias), labels[validation], rejected[validation]
    thresholds = sorted({*GRID, args.threshold or 0.0})
    curves = {"all": evaluate(scores, seen, thresholds), "rejected": evaluate(scores[among], seen[among], thresholds)}
    threshold = choose_threshold(curves["rejected"], args.max_kept_wrong) if args.threshold is None else args.threshold
    plot(picture, curves, threshold)
    data = f"{Path(args.data).name}: {len(answers)} answers, {len(labels)} labelled tokens, negatives: {args.negatives}"
    metadata = {"target": checkpoint.resolve().name, "data": data, "threshold": str(threshold)}
    JudgeHead(weight, bias, metadata).save(output)
    report = vars(args) | metadata | {"threshold": threshold, "epoch": epoch, "validation_loss": loss, **curves}
    if args.json:
        with written_aside(args.json) as aside:
            aside.write_text(json.dumps(report) + "\n")
    print(f"{data}\nvalidation loss {loss:.4f} after epoch {epoch}\n{table(curves, threshold)}")
    print(f"wrote {output} (threshold {threshold:g}) and {picture}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        say(f"train_head.py: {error}")
        sys.exit(2)
