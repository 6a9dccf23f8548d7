"""scripts/answers.py: what each check reads out of an answer, and what a prompt file may hold."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

from scripts.answers import CHECKS, Prompt, read_prompts
from scripts.demo_pair import NUMBERS, problem_at


@pytest.mark.parametrize("text, expected", [
    ("So 48 + 24 = 72 clips.", 72),
    ("It falls to -3 degrees.", -3), ("It falls to \u22123 degrees.", -3), ("-5", -5),
    ("She has 9-4 left", 4), ("She has 9 - 4 left", 4), ("f(2)-3", 3),  # minus, not a sign
    ("In all 1,234,567 people", 1234567), ("about 12,345.67 km", "12345.67"),
    ("either 3, 4 or 5,6", 6),  # these commas part numbers
    ("pi is 3.14.", "3.14"), ("7.50", "7.5"), ("He has 18.", 18), ("100.00", 100), ("0.00", 0),
    ("It costs $1,200.50", "1200.5"), ("It costs €40", 40), ("£7", 7), ("a loss of -$20", -20),
    ("Half, or 50%", 50), ("take 2nd place", 2), ("x2 is no number but 6 is", 6),
    ("1 of 2. The answer is 3, as 4 and 5 are odd.", 3),
    ("The answer is 3. No, the answer is 4. See page 9", 4),  # the last that it states
    ("work 12 + 3\n#### 15", 15), ("work\n####  -1,000\n", -1000), ("Answer: 8 (of 10)", 8),
    ("ANSWER IS\n\n41", 41), ("So the answer is clear: 5 of 6", 5), ("9 it is. Answer: none", 9),
    ("The answer is twelve.", 12), ("twenty-one", 21), ("Twenty One apples", 21), ("thirty", 30),
    ("sixteen plus seven is twenty-three", 23), ("zero", 0), ("ninety-nine", 99),
    ("nineteen", 19), ("twenty-eleven", 11),
    ("The answer is 5, not six", 5), ("Of 7 apples four are left", 7),  # digits win over words
    ("3 more. The answer is four.", 4),  # but not from before the marker
    ("", None), ("Who knows?", None), ("someone, tenth, weight", None), ("abc123", None)])
def test_number_reads_the_number_that_an_answer_ends_with(text, expected):
    found = CHECKS["number"](text)
    assert found == (None if expected is None else Decimal(expected))
    assert found is None or hash(found) == hash(Decimal(expected))  # 7.50 and 7.5 are one result


@pytest.mark.parametrize("value", range(100))
def test_number_reads_every_word_up_to_ninety_nine(value):
    units = "zero one two three four five six seven eight nine ten eleven twelve thirteen".split()
    units += [f"{stem}teen" for stem in ("four", "fif", "six", "seven", "eigh", "nine")]
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
    word = units[value] if value < 20 else tens[value // 10 - 2] + (
        f"-{units[value % 10]}" if value % 10 else "")
    assert CHECKS["number"](f"Answer: {word}.") == CHECKS["number"](f"{word} it is") == value


def test_number_agrees_with_the_bundled_pairs_grammar():
    for index in range(50):
        problem = problem_at(5, index)
        assert CHECKS["number"](f"Answer: {NUMBERS[problem.answer]}.") == problem.answer


@pytest.mark.parametrize("text, expected", [
    ("The answer is (B).", "B"), ("The answer is B", "B"), ("Answer: C, not D", "C"),
    ("A is wrong and so is C, leaving D.", "D"), ("#### J", "J"), ("(A)", "A"),
    ("I'd say E", "E"), ("It isn't A's turn, so F", "F"),
    ("K, L and Z are no choices", None), ("Because Dogs bark", None), ("answer is b", None),
    ("G it is. The answer is plain.", "G"), ("", None)])
def test_choice_reads_the_letter_that_an_answer_names(text, expected):
    assert CHECKS["choice"](text) == expected


def test_exact_takes_the_whole_text_but_for_its_spaces():
    assert CHECKS["exact"]("  to be\n\tor not ") == "to be or not"
    assert CHECKS["exact"]("a b") != CHECKS["exact"]("ab") and CHECKS["exact"]("A") == "A"
    assert CHECKS["exact"](" \n") is CHECKS["exact"]("") is None


def write(path: Path, *lines: object) -> Path:
    """A file of these lines: objects as JSON, text and bytes as they are."""
    raw = [line if isinstance(line, bytes) else line.encode() if isinstance(line, str)
           else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def test_prompt_lines_and_gsm8k_lines_are_read(tmp_path):
    path = write(tmp_path / "prompts.jsonl", {"prompt": "Why?"}, "", "   ",
                 {"prompt": "How many?", "system": "Be brief.", "answer": "12", "domain": "maths"},
                 {"question": "Clips?", "answer": "48 / 2 = <<48/2=24>>24\n#### 1,072"},
                 {"prompt": "n", "answer": 7}, {"prompt": "x", "answer": 2.5},
                 {"prompt": "quoted", "answer": "see #### 3"}, {"question": "q", "answer": "plain"},
                 {"prompt": "né 日", "answer": None, "more": [1]})
    assert read_prompts(path) == [
        Prompt("Why?"), Prompt("How many?", "Be brief.", "12", "maths"),
        Prompt("Clips?", answer="1,072"), Prompt("n", answer="7"), Prompt("x", answer="2.5"),
        Prompt("quoted", answer="see #### 3"), Prompt("q", answer="plain"), Prompt("né 日")]
    assert CHECKS["number"](read_prompts(path)[2].answer) == 1072


def test_limit_takes_the_first_and_reads_no_further(tmp_path):
    path = write(tmp_path / "prompts.jsonl", {"prompt": "a"}, "", {"prompt": "b"}, "{broken")
    assert read_prompts(path, limit=2) == [Prompt("a"), Prompt("b")]
    assert read_prompts(path, limit=1) == [Prompt("a")]
    with pytest.raises(ValueError, match="line 4"):
        read_prompts(path, limit=3)


BAD = {
    "not JSON": "{broken", "cut short": '{"prompt": "a"', "no UTF-8": b'{"prompt": "\xff"}',
    "a list": [1, 2], "a number": 5, "null": "null", "text": '"prompt"',
    "no prompt": {"answer": "5"}, "empty prompt": {"prompt": ""}, "empty question":
    {"question": ""}, "prompt of numbers": {"prompt": [1]}, "prompt is a number": {"prompt": 3},
    "system is a list": {"prompt": "a", "system": ["b"]}, "answer is a list":
    {"prompt": "a", "answer": [5]}, "answer is true": {"prompt": "a", "answer": True},
    "domain is a number": {"prompt": "a", "domain": 1}, "deep": "[" * 100_000,
    "deep and closed": '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "endless number": '{"prompt": "a", "answer": ' + "9" * 5000 + "}"}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_bad_lines_are_named_by_file_and_line(line, tmp_path):
    path = write(tmp_path / "prompts.jsonl", {"prompt": "fine"}, "", line)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 3: ") as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got no prompts"):
        read_prompts(write(tmp_path / "empty.jsonl", "", "  "))
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none.jsonl")
