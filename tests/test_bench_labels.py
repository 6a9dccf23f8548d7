"""bench_labels.py: labels beside the grammar, promises drawn from a record."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scripts import bench_labels, demo_pair, report
from scripts.bench_labels import agreement, main, parse_args, simulate
from scripts.demo_pair import NUMBERS, WEIGHTS, write
from terminal import DEMO
from tokenizer import Tokenizer


def test_agreement_counts_wrong_as_found():
    found = agreement([True, True, False, False, True], [True, False, True, False, True])
    assert found == {"said_wrong": 3, "is_wrong": 3, "tokens": 5, "precision": 2 / 3,
                     "recall": 2 / 3}
    assert agreement([], [])["precision"] is None


def test_labels_are_compared_with_the_grammar(tmp_path, monkeypatch, capsys):
    """A right wording that the target would not have chosen, and a wrong number in its place."""
    monkeypatch.setattr(demo_pair, "training_prompts", frozenset)
    problems = demo_pair.held_out(7, 3)
    tokenizer, lines, wrong = Tokenizer.from_checkpoint(DEMO / "target"), [], 0
    monkeypatch.setitem(WEIGHTS, "other", {2: (0.0, 1.0), 3: (0.0, 0.0, 1.0)})
    for problem in problems:
        text = write(problem.solution, demo_pair.random.Random(0), "other")
        ids = tokenizer.encode(text)
        labels = [{"token": i, "right": True, "labeler": "x", "score": -1.0}
                  for i in range(len(ids))]
        lines.append({"prompt": problem.prompt, "response": text, "labels": labels})
        place = next(i for i, token in enumerate(ids)
                     if tokenizer.decode([token]).strip() in NUMBERS and i > 12)
        for other in (" twenty", " so"):
            said = other == " twenty"  # the second is a mistake of the labeler's
            some = [*ids[:place], tokenizer.encode(other)[0]]
            lines.append({"prompt": problem.prompt, "response": tokenizer.decode(some), "labels": [
                {"token": place, "right": not said, "labeler": "x", "score": -9.0}]})
            wrong += 1
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    main(parse_args(["labels", f"x={tmp_path / 'x.jsonl'}", "--seed", "7", "--problems", "3",
                     "--sample", "4", "--no-compile", "--dtype", "float32",
                     "--json", str(tmp_path / "r.json")]))
    row = json.loads((tmp_path / "r.json").read_text())["labelers"]["x"]
    assert row["grammar"]["is_wrong"] == wrong == 2 * row["grammar"]["said_wrong"]
    assert row["grammar"]["precision"] == 1.0 and row["grammar"]["recall"] == 0.5
    assert row["grammar"]["tokens"] > wrong + 6 and row["auc_grammar"] == 1.0
    assert row["answer"]["tokens"] == 4 and "precision" in capsys.readouterr().out


def record(prompts: int, share: float) -> dict:
    """From δ = 0.5 down a share of the prompts regresses."""
    bad = round(share * prompts)
    runs = [[[0.5, 2.0, False], [0.0, 0.5, i < bad]] for i in range(prompts)]
    return {"runs": runs, "steps": [{"threshold": t} for t in (1.0, 0.7, 0.4, 0.1)]}


def test_promises_hold_and_a_walk_without_a_bound_breaks_them(monkeypatch):
    """At a true share just above what is asked for; planted: the raw share instead of its bound."""
    options = dict(share=0.02, sample=400, repetitions=200, seed=1)
    found = simulate(record(1000, 0.021), **options)
    most = 200 * 0.05 + 3 * np.sqrt(200 * 0.05 * 0.95)
    assert found["promised"] == 200 and found["broken"] <= most
    assert found["true_share"] == {"1.0": 0.0, "0.7": 0.0, "0.4": 0.021, "0.1": 0.021}
    safe = simulate(record(1000, 0.001), **options)
    assert safe["broken"] == 0 and safe["thresholds"][2] == 0.1
    monkeypatch.setattr(bench_labels.calibrate, "upper_bound", lambda k, n, *_: k / n)
    assert simulate(record(1000, 0.021), **options)["broken"] > most


@pytest.mark.parametrize("given, message", [
    (["labels", "nothing"], "expected NAME=FILE"), (["heads", "a=/nowhere"], "/nowhere")])
def test_bad_files_are_named(given, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(parse_args(given))


def test_tables_are_made_of_what_is_written():
    part = {"tokens": 10, "is_wrong": 2, "said_wrong": 1, "precision": 1.0, "recall": None}
    cost = {"labelers": {"x": {"right": 3, "wrong": 2, "decoded": 50, "read": 5, "seconds": 2.0}}}
    book = report.Record.__new__(report.Record)
    book.name, book.data = "labels", {"problems": 3, "labelers": {
        "x": {"grammar": part, "answer": part, "auc_grammar": 0.5, "auc_answer": None,
              "cost": cost}}}
    assert "| x | 10 | 20.0% | 100.0% | – | 20.0% | 100.0% | – | 10.0 | 1.0 | 2 |" in (
        report.labels(book))
