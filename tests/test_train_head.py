"""train_head.py: labels by characters and by token, rows against prefixes, weights, the cache, the whole command."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import roc_auc_score

import train_head
from judge import JudgeHead
from model import Transformer
from tokenizer import Tokenizer
from train_head import CORRECT, LEFT_OUT, WRONG, Answer, main, parse_args, token_labels

ROOT = Path(__file__).resolve().parent.parent
WORDS = "draft target judge keeps reads writes token apples correct total Tom Ann schön 天気 привет 12 45 54 👋🏽".split()


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Path:
    return tiny_checkpoint(max_shard_size="100KB")


@pytest.fixture(scope="module")
def tokenizer(checkpoint) -> Tokenizer:
    return Tokenizer.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint) -> Transformer:
    return Transformer.from_checkpoint(checkpoint)


def write_answers(path: Path, *, questions: int = 24, seed: int = 0) -> Path:
    """Two answers a question, of one to twelve words; about every other has a mistake, the word 'wrong'."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(2 * questions):
            words = rng.choices(WORDS, k=rng.randint(1, 12))
            if rng.random() < 0.5 or i < 2:
                words[rng.randrange(len(words))] = "wrong"
            text = " ".join(words)
            start = text.find("wrong")
            line = {"prompt": f"question {i // 2}", "response": text, "errors": [[start, start + 5]] if start >= 0 else []}
            file.write(json.dumps(line, ensure_ascii=bool(i % 2)) + "\n")
    return path


@pytest.fixture
def setup(checkpoint, tmp_path):
    """run(*options) -> the report of a quick run of the command in a directory of its own; the JSON file has it."""
    data = write_answers(tmp_path / "answers.jsonl")

    def run(*options: str, data: Path | None = data, checkpoint: Path = checkpoint) -> dict:
        fixed = {"--checkpoint_path": checkpoint, "--data": data, "--cache": tmp_path / "cache", "--lr": 0.01, "--epochs": 20,
                 "--output": tmp_path / "head.safetensors", "--json": tmp_path / "report.json", "--device": "cpu",
                 "--dtype": "float32"}
        if data is None:  # given among the options
            del fixed["--data"]
        main(parse_args([str(part) for pair in fixed.items() for part in pair] + list(options)))
        return json.loads((tmp_path / "report.json").read_text())

    run.path = tmp_path
    return run


# ---- labels

def labels_by_characters(pieces: list[bytes], response: str, errors: list[list[int]], negatives: str) -> list[int]:
    """The rule, byte by byte: mark the bytes of wrong characters, then look at each token's."""
    marks = []
    for i, char in enumerate(response):
        marks += [any(start <= i < end for start, end in errors)] * len(char.encode())
    labels, position = [], 0
    for piece in pieces:
        own, before = marks[position:position + len(piece)], marks[:position]
        labels.append(WRONG if any(own) else CORRECT if not any(before) else LEFT_OUT if negatives == "mistake" else WRONG)
        position += len(piece)
    return labels


@pytest.mark.parametrize("negatives", ["mistake", "onward"])
def test_labels_agree_with_characters(tokenizer, negatives):
    rng, seen = random.Random(1), set()
    text = "Schöne Grüße, 今日は良い天気です 👋🏽🎉 in München: 123456 apples."
    ids = tokenizer.encode(text)
    pieces = [tokenizer.token_bytes(i) for i in ids]
    assert any(len(piece) > 1 for piece in pieces) and any(piece[0] & 0xC0 == 0x80 for piece in pieces)  # ends inside characters
    for _ in range(300):
        errors = []
        for _ in range(rng.randint(0, 3)):  # unsorted, overlapping
            start = rng.randrange(len(text))
            errors.append([start, rng.randint(start + 1, min(start + 8, len(text)))])
        labels = token_labels(pieces, text, errors, negatives)
        assert labels == labels_by_characters(pieces, text, errors, negatives)
        seen |= set(labels)
    assert seen == ({CORRECT, WRONG, LEFT_OUT} if negatives == "mistake" else {CORRECT, WRONG})


def test_labels_at_the_borders_of_a_span():
    pieces = [b" a", b" 1", b"2 ", b"\xc3", b"\xbc", b" z"]  # " a 12 ü z"
    def label(start: int, end: int, mode: str = "mistake") -> list[int]:
        return token_labels(pieces, " a 12 ü z", [[start, end]], mode)

    assert label(4, 5) == [CORRECT, CORRECT, WRONG, LEFT_OUT, LEFT_OUT, LEFT_OUT]  # "2" alone, inside "2 "
    assert label(6, 7) == [CORRECT, CORRECT, CORRECT, WRONG, WRONG, LEFT_OUT]  # both halves of ü, not its neighbours
    assert label(1, 4) == [WRONG, WRONG, *[LEFT_OUT] * 4]  # straddles two tokens; what begins at its end is not in it
    assert label(6, 7, "onward") == [CORRECT, CORRECT, CORRECT, WRONG, WRONG, WRONG]
    assert token_labels([b" ", b"ab", b"c"], "abc", [[0, 1]], "mistake", -1) == [CORRECT, WRONG, LEFT_OUT]  # a dummy space


def test_answer_is_chat_then_response(tokenizer):
    line = json.dumps({"prompt": "Hi <|eot_id|>", "response": "It is 12.<|eot_id|>", "errors": [[6, 8]], "system": "Be brief."})
    answer = train_head.encode_answer(line.encode(), tokenizer, context=512, negatives="mistake")
    prompt = tokenizer.encode_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|eot_id|>"}])
    assert answer.ids == [*prompt, *tokenizer.encode("It is 12.<|eot_id|>")] and answer.prompt_tokens == len(prompt)
    assert len(answer.labels) == len(answer.ids) - len(prompt)
    assert not set(answer.ids[len(prompt):]) & set(tokenizer.special_tokens.values())  # no label on a stop token


def encode(line: dict, tokenizer: Tokenizer) -> Answer:
    return train_head.encode_answer(json.dumps(line).encode(), tokenizer, context=512,
                                    negatives="onward")


def test_given_labels_label_those_tokens_only(tokenizer):
    text = "Tom has 12 apples."
    count = len(tokenizer.encode(text))
    line = {"prompt": "q", "response": text, "errors": [[0, 3]],
            "labels": [{"token": 4, "right": False, "labeler": "swap", "score": None},
                       {"token": 1, "right": True}, {"token": count - 1, "right": True}]}
    answer = encode(line, tokenizer)
    expected = [LEFT_OUT] * count
    expected[4], expected[1], expected[-1] = WRONG, CORRECT, CORRECT
    assert answer.labels == expected  # `errors` has no say, and nothing follows from a mistake
    assert answer.ids[answer.prompt_tokens:] == tokenizer.encode(text)
    assert encode(line | {"labels": []}, tokenizer).labels == [LEFT_OUT] * count


@pytest.mark.parametrize("each", [
    {"token": -1, "right": True}, {"token": True, "right": True}, {"token": 1.0, "right": True},
    {"token": "1", "right": True}, {"right": True}, {"token": 1}, {"token": 1, "right": 1},
    {"token": 1, "right": None}, {"token": 1, "right": "true"}, 1, [1, True], None,
])
def test_bad_labels_are_refused(tokenizer, each):
    line = {"prompt": "q", "response": "Tom has 12 apples.", "labels": [each]}
    with pytest.raises(ValueError, match="in labels, expected token, from 0 to"):
        encode(line, tokenizer)


def test_labels_end_with_the_response(tokenizer):
    count = len(tokenizer.encode("Tom has 12 apples."))
    line = {"prompt": "q", "response": "Tom has 12 apples."}
    last = encode(line | {"labels": [{"token": count - 1, "right": False}]}, tokenizer)
    assert last.labels == [LEFT_OUT] * (count - 1) + [WRONG]
    with pytest.raises(ValueError, match=f"from 0 to {count - 1}, and right"):
        encode(line | {"labels": [{"token": count, "right": False}]}, tokenizer)
    for labels in ({"token": 1, "right": True}, "none", 1, None, True):
        with pytest.raises(ValueError, match="got labels .*, expected a list"):
            encode(line | {"labels": labels}, tokenizer)


def test_response_ids_may_end_inside_a_character(tokenizer):
    """A token that is half a character: its text alone would be read as other tokens."""
    ids = tokenizer.encode("Tom 👋🏽")
    cut = next(end for end in range(1, len(ids)) if "\ufffd" in tokenizer.decode(ids[:end]))
    text = tokenizer.decode(ids[:cut])
    assert tokenizer.encode(text) != ids[:cut]
    line = {"prompt": "q", "response": text, "response_ids": ids[:cut],
            "labels": [{"token": cut - 1, "right": False}]}
    answer = encode(line, tokenizer)
    assert answer.ids[answer.prompt_tokens:] == ids[:cut] and answer.labels[-1] == WRONG
    with pytest.raises(ValueError, match="spell otherwise"):  # spans have no place in it
        encode({key: line[key] for key in ("prompt", "response", "response_ids")}
               | {"errors": [[0, 1]]}, tokenizer)


def test_response_ids_are_used_as_they_are(tokenizer):
    """A draft's tokens are seldom those that encoding merges."""
    text = "Tom has 12 apples."
    merged, split = tokenizer.encode(text), [tokenizer.encode(char)[0] for char in text]
    assert len(split) > len(merged) and tokenizer.decode(split) == text
    labels = [{"token": len(split) - 1, "right": True}]
    answer = encode({"prompt": "q", "response": text, "response_ids": split, "labels": labels},
                    tokenizer)
    assert answer.ids[answer.prompt_tokens:] == split
    assert answer.labels == [LEFT_OUT] * (len(split) - 1) + [CORRECT]
    spans = encode({"prompt": "q", "response": text, "response_ids": split, "errors": [[4, 7]]},
                   tokenizer)
    assert spans.labels == [CORRECT] * 4 + [WRONG] * (len(split) - 4)
    with pytest.raises(ValueError, match="beyond the context"):  # counted by those ids
        train_head.encode_answer(json.dumps({"prompt": "q", "response": text, "errors": [],
                                             "response_ids": split}).encode(), tokenizer,
                                 context=answer.prompt_tokens + len(merged), negatives="mistake")


@pytest.mark.parametrize(("ids", "message"), [
    ("other", "response_ids that spell 'Tom has 13 apples.', expected the response"),
    ("shorter", "response_ids that spell"), ([], "response_ids that spell ''"),
    ("12", "expected token ids"), ([True, 1], "expected token ids"), ([1.0], "expected token ids"),
    ({"a": 1}, "expected token ids"), ([1 << 40], "got token id 1099511627776"),
    ([-1], "got token id -1"),
])
def test_bad_response_ids_are_refused(tokenizer, ids, message):
    text = "Tom has 12 apples."
    ids = {"other": tokenizer.encode("Tom has 13 apples."),
           "shorter": tokenizer.encode(text)[:-1]}.get(ids, ids) if isinstance(ids, str) else ids
    line = {"prompt": "q", "response": text, "response_ids": ids, "labels": []}
    with pytest.raises(ValueError, match=message):
        encode(line, tokenizer)


# ---- rows

def random_answers(count: int, seed: int = 0) -> list[Answer]:
    """Tokens drawn from 40 ids; those below 20 are correct: only the row of the token itself can know."""
    rng = random.Random(seed)
    answers = []
    for i in range(count):
        ids = [rng.randrange(40) for _ in range(rng.randint(10, 25))]
        answers.append(Answer(f"question {i}", [456, 7, 8, *ids], 3, [int(token < 20) for token in ids]))
    return answers


def test_rows_are_the_states_after_each_token(model):
    answers = random_answers(3)  # of different lengths: padding must not show
    hidden, rejected = train_head.hidden_states(model, answers)
    row = 0
    for answer in answers:
        for i in range(answer.prompt_tokens, len(answer.ids)):
            prefix = torch.tensor([answer.ids[:i + 1]])
            torch.testing.assert_close(hidden[row], model(prefix)[0, -1], rtol=1e-4, atol=1e-4)
            assert rejected[row] == (model.logits(model(prefix[:, :-1])[0, -1]).argmax() != answer.ids[i])
            row += 1
    assert row == len(hidden) == len(rejected)


def test_exact_rule_keeps_what_the_target_writes(model):
    ids = [456, 7, 8]
    for _ in range(8):
        ids.append(int(model.logits(model(torch.tensor([ids]))[0, -1]).argmax()))
    wrong = [*ids[:6], (ids[6] + 1) % 300, *ids[7:]]
    _, rejected = train_head.hidden_states(model, [Answer("a", ids, 3, [1] * 8), Answer("b", wrong, 3, [1] * 8)])
    assert not rejected[:8].any()
    assert rejected[8:].tolist()[:4] == [False, False, False, True]


def ones(count: int) -> torch.Tensor:
    """The weights of rows that all count alike."""
    return torch.ones(count, dtype=torch.float64)


def train_on(model: Transformer, answers: list[Answer], **options) -> tuple[float, float, torch.Tensor, torch.Tensor, tuple]:
    """Validation ROC-AUC of a head on every fifth row."""
    hidden, _ = train_head.hidden_states(model, answers)
    labels = torch.tensor([label for answer in answers for label in answer.labels])
    rows = torch.arange(len(labels))
    train, validation = rows[rows % 5 > 0], rows[rows % 5 == 0]
    settings = dict(lr=0.01, weight_decay=0.1, batch_size=32, epochs=40, seed=0, device=torch.device("cpu")) | options
    fitted = train_head.fit(hidden, labels, ones(len(labels)), train, validation, **settings)
    scores = JudgeHead(fitted[0], fitted[1], {"threshold": "0.5"}).score(hidden[validation])
    return float(roc_auc_score(labels[validation], scores)), fitted[3], scores, labels[train], labels[validation]


@pytest.fixture(scope="module")
def calm_model(tiny_checkpoint) -> Transformer:
    """Layers that add little to the embedding: a row tells its own token."""
    return Transformer.from_checkpoint(tiny_checkpoint(initializer_range=0.01))


def test_head_learns_from_the_right_row_only(calm_model):
    model, answers = calm_model, random_answers(40)
    right, *_ = train_on(model, answers)
    shifted, *_ = train_on(model, [answer._replace(ids=[1, *answer.ids[:-1]]) for answer in answers])  # the row before
    assert right > 0.97
    assert shifted < 0.7


# ---- training

def test_folded_head_says_what_the_standardised_one_says(calm_model):
    """The loss comes from standardised features, these scores from raw ones and the folded weights: they must be one model."""
    _, loss, scores, train, validation = train_on(calm_model, random_answers(20))
    weight = len(train) / (2 * torch.bincount(train))[validation]
    entropy = torch.nn.functional.binary_cross_entropy(scores.double(), validation.double(), weight.double())
    assert abs(entropy.item() - loss) < 1e-5


def test_standardisation_survives_outliers_and_constants():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    hidden = torch.randn(400, 5, generator=generator) + 0.0
    hidden[:, 0] = 3000 + labels * 5 + torch.randn(400, generator=generator)  # a massive activation that knows the answer
    hidden[:, 1], hidden[:, 2] = 700.25, 0.0
    rows = torch.arange(400)
    before = hidden.clone()
    weight, bias, epoch, loss = train_head.fit(hidden, labels, ones(400), rows[:300], rows[300:], lr=0.05, weight_decay=0.0,
                                               batch_size=32, epochs=30, seed=0, device=torch.device("cpu"))
    assert torch.equal(hidden, before)
    assert loss < 0.2 and epoch >= 1
    scores = torch.sigmoid(hidden[300:] @ weight[0] + bias)
    assert ((scores > 0.5).long() == labels[300:]).float().mean() > 0.95


def test_class_weights_put_the_balance_at_a_half():
    labels = (torch.arange(2000) % 10 > 0).long()  # 90% correct, and features that know nothing
    hidden = torch.randn(2000, 3, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(2000)
    weight, bias, *_ = train_head.fit(hidden, labels, ones(2000), rows[:1600], rows[1600:], lr=0.01, weight_decay=0.1,
                                      batch_size=128, epochs=20, seed=0, device=torch.device("cpu"))
    assert abs(torch.sigmoid(hidden @ weight[0] + bias).mean() - 0.5) < 0.05


def test_divergence_is_an_error():
    with pytest.raises(ValueError, match="validation loss nan"):
        train_head.fit(torch.full((8, 2), float("nan")), torch.arange(8) % 2, ones(8), torch.arange(4), torch.arange(4, 8),
                       lr=1.0, weight_decay=0.0, batch_size=4, epochs=2, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_split_is_by_question(share):
    questions = {f"q{i}" for i in range(37)}
    held = train_head.split_questions(questions, share=share, seed=3)
    assert len(held) == min(max(round(37 * share), 1), 36) and held < questions
    assert held == train_head.split_questions(set(sorted(questions, reverse=True)), share=share, seed=3)
    assert share != 0.5 or held != train_head.split_questions(questions, share=share, seed=4)


def test_no_question_is_on_both_sides(setup, tokenizer, monkeypatch):
    seen, fit = [], train_head.fit
    monkeypatch.setattr(train_head, "fit", lambda *args, **options: seen.append(args) or fit(*args, **options))
    setup("--epochs", "1", "--negatives", "onward")
    _, labels, _, train, validation = seen[0]
    answers = train_head.read_answers(setup.path / "answers.jsonl", tokenizer, context=512, negatives="onward")
    questions = [answer.question for answer in answers for _ in answer.labels]
    assert len(questions) == len(labels) and not set(train.tolist()) & set(validation.tolist())
    sides = [{questions[i] for i in rows} for rows in (train.tolist(), validation.tolist())]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 24 and len(sides[1]) == 5


# ---- several files, and which tokens train

def write_labels(path: Path, flip: float, *, seed: int, questions: int = 24) -> Path:
    """Answers that are the same for every seed; of their labels, by token, a share is flipped."""
    texts, rng = random.Random(0), random.Random(seed)
    with path.open("w") as file:
        for i in range(questions):
            words = texts.choices(["draft", "target", "12", "45", "keeps", "apples"], k=8)
            labels = [{"token": j, "right": (j % 2 == 0) != (rng.random() < flip)}
                      for j in range(8)]
            file.write(json.dumps({"prompt": f"question {i}", "response": " ".join(words),
                                   "labels": labels}) + "\n")
    return path


def apart(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """How far two heads are apart: their weights, as a share, and their biases."""
    return ((one - other)[:-1].norm() / one[:-1].norm()).item(), (one - other)[-1].abs().item()


def head_of(setup, *options: str) -> tuple[torch.Tensor, dict]:
    """Weight and bias [D + 1] in float64, and the report, of a run in whole batches.

    Whole, as neither the order of rows nor how many share a batch may count.
    """
    report = setup(*options, "--batch_size", "100000", "--epochs", "30", data=None)
    head = JudgeHead.load(setup.path / "head.safetensors")
    return torch.cat((head.weight[0], head.bias)).double(), report


@pytest.fixture
def two_files(setup) -> tuple[str, str]:
    """The same tokens with other labels: a file given twice shifts no mean and no deviation."""
    return (str(write_labels(setup.path / "a.jsonl", 0.1, seed=1)),
            str(write_labels(setup.path / "b.jsonl", 0.6, seed=2)))


def test_weight_two_is_the_file_twice(setup, two_files):
    """The gradients differ by a factor alone, to which Adam is blind but for its ε.

    Only a gradient as small as ε = 1e-8 leaves a step open, up to lr = 0.01: the bias's first one,
    which class weights bring to 0, so that rounding gives its sign. Weights came 6e-5 apart.
    """
    a, b = two_files
    twice, _ = head_of(setup, "--data", a, a, b)
    plain, _ = head_of(setup, "--data", a, b)
    weighted, report = head_of(setup, "--data", a, b, "--weights", "2", "1")
    (weights, bias), (others, _) = apart(twice, weighted), apart(twice, plain)
    assert weights < 1e-3 and bias < 0.01
    assert others > 0.1
    assert report["weights"] == [2.0, 1.0]
    assert JudgeHead.load(setup.path / "head.safetensors").metadata["data"].startswith(
        "a.jsonl x 2, b.jsonl: 48 answers, ")


def test_weights_are_relative(setup, two_files):
    a, b = two_files
    once, first = head_of(setup, "--data", a, b, "--weights", "1", "0.5")
    again, second = head_of(setup, "--data", a, b, "--weights", "20", "10")
    weights, bias = apart(once, again)
    assert weights < 1e-3 and bias < 0.01
    assert first["epoch"] == second["epoch"]


def test_weights_do_not_scale_the_loss(setup, two_files):
    """A loss is one to compare with others only as a mean over weights, too."""
    a, b = two_files
    _, once = head_of(setup, "--data", a, b)
    _, again = head_of(setup, "--data", a, b, "--weights", "10", "10")
    assert once["validation_loss"] == pytest.approx(again["validation_loss"], rel=1e-3)


@pytest.mark.parametrize("weights", [["1"], ["1", "1", "1"], ["1", "0"], ["-1", "1"],
                                     ["inf", "1"], ["nan", "1"]])
def test_bad_weights(setup, two_files, passes, weights):
    with pytest.raises(ValueError, match="got --weights .* for 2 files, expected a positive"):
        setup("--data", *two_files, "--weights", *weights, data=None)
    assert not passes


def planted(monkeypatch, right: tuple[bool, ...] = (True, False)) -> None:
    """Hidden states of which one number is the label where the exact rule rejects.

    It is the label's opposite where the rule keeps: two tokens of three, by their place. `right`:
    the kinds of rejected tokens that there are.
    """
    def hidden_states(model: Transformer, answers: list[Answer]) -> tuple:
        hidden, rejected = [], []
        for answer in answers:
            for i, label in enumerate(answer.labels):
                out = (i * 7 + len(answer.question) + answer.ids[-1]) % 3 == 0
                rejected.append(out and (label == CORRECT) in right)
                sign = 1.0 if (label == CORRECT) == rejected[-1] else -1.0
                hidden.append([sign, *[0.0] * 63])
        noise = torch.randn(len(hidden), 64, generator=torch.Generator().manual_seed(len(hidden)))
        noise[:, 4:] = 0  # few, or they would be learned by heart
        return torch.tensor(hidden) + 0.3 * noise, torch.tensor(rejected)

    monkeypatch.setattr(train_head, "hidden_states", hidden_states)


def test_only_rejected_trains_on_what_the_exact_rule_rejects(setup, monkeypatch):
    """Two thirds of the rows say the opposite of the rest, and all together lead astray."""
    planted(monkeypatch)
    data = str(write_labels(setup.path / "labels.jsonl", 0.5, seed=3, questions=40))
    seen, fit = [], train_head.fit
    monkeypatch.setattr(train_head, "fit", lambda *a, **k: seen.append(a) or fit(*a, **k))
    whole, with_all = head_of(setup, "--data", data)
    part, with_part = head_of(setup, "--data", data, "--only", "rejected")
    assert whole[0] < 0 < part[0]
    assert with_all["rejected"]["roc_auc"] < 0.2 and with_part["rejected"]["roc_auc"] > 0.8
    for name in ("all", "rejected"):  # the curves are of the same tokens
        assert [with_all[name][kind] for kind in ("correct", "wrong")] == [
            with_part[name][kind] for kind in ("correct", "wrong")]
    assert with_part["data"].endswith(", only rejected") and "only" not in with_all["data"]

    # exactly those rows: worked out anew from the answers
    tokenizer = Tokenizer.from_checkpoint(Path(with_part["checkpoint_path"]))
    answers = train_head.read_answers(data, tokenizer, context=512, negatives="mistake")
    held = train_head.split_questions({each.question for each in answers}, share=0.2, seed=0)
    rejected = torch.cat([train_head.hidden_states(None, answers[i:i + 16])[1]
                          for i in range(0, len(answers), 16)])
    kept = torch.tensor([label != LEFT_OUT for each in answers for label in each.labels])
    side = torch.tensor([each.question in held for each in answers for _ in each.labels])[kept]
    rejected = rejected[kept]
    (*_, every, _), (*_, train, validation) = seen
    assert every.tolist() == (~side).nonzero()[:, 0].tolist()
    assert train.tolist() == (~side & rejected).nonzero()[:, 0].tolist()
    assert validation.tolist() == (side & rejected).nonzero()[:, 0].tolist()
    assert 0 < len(train) < 0.5 * len(every)


@pytest.mark.parametrize("right", [(True,), (False,), ()])
def test_too_few_rejected_tokens_name_the_option(setup, monkeypatch, right):
    planted(monkeypatch, right)
    data = str(write_labels(setup.path / "labels.jsonl", 0.5, seed=3))
    with pytest.raises(ValueError, match="labels.jsonl.*--only rejected: got .* tokens in training"):
        head_of(setup, "--data", data, "--only", "rejected")
    assert not (setup.path / "head.safetensors").exists()


# ---- report

@pytest.mark.parametrize("seed", range(5))
def test_paragraph_agrees_with_a_direct_count(seed):
    """Scores lie between the thresholds that are weighed, so both sides count the same tokens."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(400, generator=generator) < 0.6).long()
    raw = torch.rand(400, generator=generator) + 0.4 * labels * torch.rand(400, generator=generator)
    scores = (raw * 700).floor() / 1000 + 0.0005
    curves = {"rejected": train_head.evaluate(scores, labels, train_head.GRID)}
    args = parse_args(["--checkpoint_path", "TARGET", "--data", "labels.jsonl"])
    args.output = Path("head.safetensors")
    said = train_head.advice(curves, 0.6, args)
    auc, best, right, wrong = re.search(
        r"AUC of ([\d.]+): it can keep (\d+)% of the right ones while it keeps 10% of the wrong "
        r"ones\. At its threshold 0\.6 it keeps (\d+)% of the right and (\d+)% of the wrong",
        said).groups()
    assert float(auc) == pytest.approx(roc_auc_score(labels, scores), abs=6e-4)
    rights, wrongs = scores[labels == CORRECT], scores[labels == WRONG]
    borders = [score for score in [0.0, *scores.tolist()]
               if (wrongs > score).float().mean() <= 0.1]
    direct = max((rights > score).float().mean().item() for score in borders)
    assert 0.05 < direct < 0.95 and abs(int(best) / 100 - direct) <= 0.00501
    assert abs(int(right) / 100 - (rights > 0.6).float().mean()) <= 0.00501
    assert abs(int(wrong) / 100 - (wrongs > 0.6).float().mean()) <= 0.00501
    assert "\n    python scripts/calibrate.py --checkpoint_path TARGET " in said
    assert "--judge head.safetensors --prompts UNSEEN.jsonl" in said


@pytest.mark.parametrize("labels", [[CORRECT] * 4, [WRONG] * 4, []])
def test_paragraph_without_rejected_tokens_of_both_kinds(labels):
    scores, seen = torch.rand(len(labels)), torch.tensor(labels, dtype=torch.int64)
    curves = {"rejected": train_head.evaluate(scores, seen, train_head.GRID)}
    args = parse_args(["--checkpoint_path", "TARGET", "--data", "labels.jsonl"])
    said = train_head.advice(curves, 0.5, args)
    assert "no rejected tokens of both kinds" in said and "label more answers" in said
    assert "AUC" not in said and "calibrate.py" not in said


def test_a_run_ends_with_the_paragraph(setup, monkeypatch, capsys):
    report = setup()
    said = capsys.readouterr().out.split("\n\n")[-1]
    assert f"AUC of {report['rejected']['roc_auc']:.3f}" in said
    command = said.splitlines()[-1].split()
    assert command[:2] == ["python", "scripts/calibrate.py"] and (ROOT / command[1]).exists()
    assert command[command.index("--judge") + 1] == str(setup.path / "head.safetensors")
    planted(monkeypatch, ())  # the exact rule rejects nothing
    setup("--cache", str(setup.path / "other"))
    assert "no rejected tokens of both kinds" in capsys.readouterr().out.split("\n\n")[-1]


def test_shares_and_threshold():
    scores = torch.tensor([0.2, 0.5, 0.55, 0.6, 0.7, 0.7, 0.8, 0.9, 0.95, 1.0])
    curve = train_head.evaluate(torch.cat([scores, scores]), torch.tensor([WRONG] * 10 + [CORRECT] * 10), train_head.GRID)
    assert (curve["wrong"], curve["correct"], curve["roc_auc"]) == (10, 10, 0.5)
    for threshold, share in zip(curve["thresholds"], curve["kept_wrong"]):
        assert share == sum(score > torch.tensor(threshold) for score in scores) / 10
    assert train_head.choose_threshold(curve, 1.0) == 0.5  # never below the paper's
    assert train_head.choose_threshold(curve, 0.4) == 0.7  # a score equal to the threshold is not kept
    assert train_head.choose_threshold(curve, 0.1) == 0.95
    assert train_head.choose_threshold(curve, 0.0) == 1.0
    empty = train_head.evaluate(torch.rand(4), torch.ones(4, dtype=torch.int64), train_head.GRID)
    assert empty["roc_auc"] is None and empty["kept_wrong"][0] is None
    assert train_head.choose_threshold(empty, 0.1) == 0.5
    train_head.table({"all": empty, "rejected": empty}, 0.5)


def test_given_threshold_is_stored_and_shown(setup, capsys):
    report = setup("--threshold", "0.1234")
    assert report["threshold"] == 0.1234 and JudgeHead.load(setup.path / "head.safetensors").threshold == 0.1234
    assert "0.1234   *" in capsys.readouterr().out


# ---- cache

@pytest.fixture
def passes(monkeypatch):
    """The number of answers of each pass of the target."""
    counts, original = [], train_head.hidden_states

    def counted(model: Transformer, answers: list[Answer]) -> tuple:
        counts.append(len(answers))
        return original(model, answers)

    monkeypatch.setattr(train_head, "hidden_states", counted)
    return counts


def test_cache_is_reused_and_resumed(setup, passes, monkeypatch):
    setup()
    assert passes == [16, 16, 16]
    first = JudgeHead.load(setup.path / "head.safetensors")
    monkeypatch.setattr(Transformer, "from_checkpoint", lambda *_, **__: pytest.fail("loaded weights for nothing"))
    setup()
    again = JudgeHead.load(setup.path / "head.safetensors")
    assert len(passes) == 3 and again.metadata == first.metadata
    assert torch.equal(again.weight, first.weight) and torch.equal(again.bias, first.bias)
    setup("--negatives", "onward", "--lr", "0.001")
    assert len(passes) == 3
    monkeypatch.undo()
    files = sorted((setup.path / "cache").iterdir())
    assert len(files) == 3 and all(file.suffix == ".safetensors" for file in files)


def test_interrupted_run_goes_on_and_leaves_the_old_head(setup, passes, monkeypatch):
    (setup.path / "head.safetensors").write_bytes(b"old")
    counting = train_head.hidden_states

    def interrupted(model, answers):
        if len(passes) == 2:
            raise KeyboardInterrupt
        return counting(model, answers)

    monkeypatch.setattr(train_head, "hidden_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup()
    assert passes == [16, 16] and (setup.path / "head.safetensors").read_bytes() == b"old"
    monkeypatch.setattr(train_head, "hidden_states", counting)
    setup()
    assert passes == [16, 16, 16]


def test_cache_is_not_reused_for_other_tokens_dtype_or_weights(setup, passes, tiny_checkpoint):
    setup("--epochs", "1")
    setup("--epochs", "1", "--dtype", "bfloat16")
    assert len(passes) == 6
    other = write_answers(setup.path / "other.jsonl", seed=1)
    setup("--epochs", "1", data=other)
    assert len(passes) == 9
    setup("--epochs", "1", checkpoint=tiny_checkpoint(seed=1, max_shard_size="100KB"))
    assert len(passes) == 12
    spans = [json.loads(line) for line in other.read_text().splitlines()]
    other.write_text("\n".join(json.dumps(line | {"errors": [[0, 1]] if i % 3 else []}) for i, line in enumerate(spans)))
    setup("--epochs", "1", data=other)  # other labels on the same text need no pass
    assert len(passes) == 12


def test_broken_cache_file_is_named(setup):
    setup("--epochs", "1")
    file = next((setup.path / "cache").iterdir())
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=file.name):
        setup("--epochs", "1")


# ---- errors

GOOD = {"prompt": "q", "response": "wörd two", "errors": [[0, 4]]}


@pytest.mark.parametrize(("line", "message"), [
    ("{not json", "line 2: Expecting property name"),
    ("[1]", "line 2: got a JSON list"),
    ({"response": "a", "errors": []}, "line 2: got prompt null"),
    ({"prompt": "q", "errors": []}, "line 2: got response null"),
    (GOOD | {"response": ""}, 'line 2: got response "", expected text'),
    (GOOD | {"system": 5}, "line 2: got system 5"),
    ({"prompt": "q", "response": "a"}, "line 2: got null in errors"),
    (GOOD | {"errors": [[0, 9]]}, r"line 2: got \[0, 9\] in errors, expected .* <= 8"),
    (GOOD | {"errors": [[3, 3]]}, r"line 2: got \[3, 3\] in errors"),
    (GOOD | {"errors": [[-1, 3]]}, r"line 2: got \[-1, 3\] in errors"),
    (GOOD | {"errors": [[0, 1.5]]}, r"line 2: got \[0, 1.5\] in errors"),
    (GOOD | {"errors": [0, 4]}, "line 2: got 0 in errors"),
    (GOOD | {"response": "a \ud800 b"}, "line 2: .*surrogates not allowed"),
    (GOOD | {"response": "word " * 600}, "line 2: got .* beyond the context of 512"),
])
def test_bad_line_is_named(setup, line, message):
    data = setup.path / "bad.jsonl"
    data.write_text(json.dumps(GOOD) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(ValueError, match=message):
        setup(data=data)


def test_data_that_cannot_be_trained_on(setup):
    data = setup.path / "bad.jsonl"
    with pytest.raises(FileNotFoundError, match="bad.jsonl"):
        setup(data=data)
    data.write_text("")
    with pytest.raises(ValueError, match="got 0 questions"):
        setup(data=data)
    data.write_text("\n".join(json.dumps(GOOD) for _ in range(3)))
    with pytest.raises(ValueError, match="got 1 questions"):
        setup(data=data)
    data.write_text("\n".join(json.dumps(GOOD | {"prompt": f"q{i}", "errors": []}) for i in range(6)))
    with pytest.raises(ValueError, match="got [0-9]+ correct and 0 mistaken tokens in training"):
        setup(data=data)
    data.write_text("\n".join(json.dumps(GOOD | {"prompt": f"q{i}", "errors": [[0, 8]]}) for i in range(6)))
    with pytest.raises(ValueError, match="got 0 correct and [0-9]+ mistaken tokens in training"):
        setup(data=data)


@pytest.mark.parametrize(("options", "message"), [
    (("--validation", "1"), "--validation 1.0"), (("--validation", "0"), "--validation 0.0"), (("--lr", "0"), "--lr 0.0"),
    (("--lr", "nan"), "--lr nan"), (("--epochs", "0"), "--epochs 0"), (("--batch_size", "0"), "--batch_size 0"),
    (("--weight_decay", "-1"), "--weight_decay -1.0"), (("--threshold", "1.5"), "--threshold 1.5"),
    (("--max_kept_wrong", "2"), "--max_kept_wrong 2.0"), (("--output", "/nowhere/head.safetensors"), "/nowhere"),
    (("--plot", "/nowhere/head.png"), "/nowhere"), (("--device", "tpu"), "got device 'tpu'"),
    (("--checkpoint_path", "/nowhere"), "expected a Hugging Face checkpoint"),
])
def test_bad_options(setup, passes, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        setup(*options)
    assert not passes


def test_missing_package_names_the_requirements(setup, monkeypatch):
    monkeypatch.setattr(train_head, "MISSING", "sklearn")
    with pytest.raises(ValueError, match="no sklearn.*requirements-train.txt"):
        setup()


# ---- the command

def test_command_line(checkpoint, tmp_path):
    """One run as a user makes it, and one that fails."""
    data = write_answers(tmp_path / "answers.jsonl")
    command = [sys.executable, str(ROOT / "train_head.py"), "--checkpoint_path", str(checkpoint), "--data", str(data), "--lr",
               "0.01", "--epochs", "50", "--device", "cpu", "--cache", str(tmp_path / "cache"),
               "--output", str(tmp_path / "head.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rejected: tokens that the exact rule rejects" in done.stdout and "ROC-AUC" in done.stdout
    head = JudgeHead.load(tmp_path / "head.safetensors")
    assert head.hidden_size == 64 and head.metadata["target"] == checkpoint.name and 0.5 <= head.threshold <= 1
    assert head.metadata["data"].startswith("answers.jsonl: 48 answers, ")
    assert head.metadata["data"].endswith("labelled tokens, negatives: mistake")
    with safe_open(tmp_path / "head.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "feature", "hidden_size", "threshold", "target", "data"}
    assert (tmp_path / "head.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "cache", "head.png", "head.safetensors"]
    failed = subprocess.run([*command, "--validation", "2"], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.startswith("train_head.py: got --validation 2.0")
    assert failed.stderr.count("\n") == 1


def test_report_agrees_with_the_saved_head(setup, model, tokenizer, monkeypatch):
    """Everything in the JSON is worked out again from the saved file and the answers.

    A random target would have written none of these tokens; so the exact rule is said to reject about every other.
    """
    original = train_head.hidden_states
    monkeypatch.setattr(train_head, "hidden_states", lambda *args: (hidden := original(*args)[0], hidden[:, 0] > 0))
    report = setup("--epochs", "40", "--max_kept_wrong", "0.3")
    head = JudgeHead.load(setup.path / "head.safetensors")
    answers = train_head.read_answers(setup.path / "answers.jsonl", tokenizer, context=512, negatives="mistake")
    held = train_head.split_questions({answer.question for answer in answers}, share=0.2, seed=0)
    hidden, rejected = train_head.hidden_states(model, [answer for answer in answers if answer.question in held])
    labels = torch.tensor([label for answer in answers if answer.question in held for label in answer.labels])
    scores = head.score(hidden)
    assert 0.2 < rejected.float().mean() < 0.8
    for name, among in (("all", labels != LEFT_OUT), ("rejected", (labels != LEFT_OUT) & rejected)):
        curve = report[name]
        assert curve["correct"] == (labels[among] == CORRECT).sum() and curve["wrong"] == (labels[among] == WRONG).sum()
        assert curve["roc_auc"] == pytest.approx(roc_auc_score(labels[among], scores[among]), abs=1e-3)
        kept = (scores[among & (labels == WRONG)] > head.threshold).float().mean().item()
        assert curve["kept_wrong"][curve["thresholds"].index(head.threshold)] == pytest.approx(kept, abs=1e-6)
    assert kept <= 0.3 and report["threshold"] == head.threshold and report["negatives"] == "mistake"
