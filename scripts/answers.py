"""Prompts from a file, and what it means that two answers are the same.

Prompts are JSON lines: `prompt` (one user turn), perhaps `system`, `answer` (the right one) and
`domain`. GSM8K's own lines, `question` and an `answer` that ends with `#### n`, are read as well. A
check reads an answer's text and returns what is compared, or None where it finds nothing: `number`
takes the last number (or the one after "answer is" or "####"), in digits or, without any, in
English words up to ninety-nine; `choice` a letter from A to J; `exact` the whole text but for its
spaces. Nothing that a model wrote is executed.

    prompts = read_prompts("train.jsonl")
    CHECKS["number"]("So 48 + 24 = 72 clips.") == Decimal(72)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable
from decimal import Decimal, localcontext
from pathlib import Path
from typing import NamedTuple

MARKER = re.compile(r".*(?:####|\banswer\s*(?:is|:))", re.IGNORECASE | re.DOTALL)
DIGITS = re.compile(r"(?<![\w.])(?:(?<![)\d])[-\u2212])?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
         "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = re.compile(rf"\b(?:({'|'.join(TENS)})(?:[- ]({'|'.join(UNITS[1:10])}))?|"
                   rf"({'|'.join(sorted(UNITS, key=len, reverse=True))}))\b", re.IGNORECASE)
NAMED = re.compile(r"\W*(?:option |choice )?\W*([A-J])(?![\w'])")  # right after the marker
BRACKETED = re.compile(r"\(([A-J])\)")
ALONE = re.compile(r"^\W*([A-J])(?:[).:]|\W*$)", re.MULTILINE)  # "B", "B) because", not "I am"
LETTER = re.compile(r"(?<![\w'])([B-HJ])(?![\w'])")  # A and I are words, too
MAX_DIGITS = 60  # a longer number is no result


class Prompt(NamedTuple):
    """One line of a prompt file."""

    text: str
    system: str | None = None
    answer: str | None = None
    domain: str | None = None


def number(text: str) -> Decimal | None:
    """The number that an answer ends with."""
    after = MARKER.match(text)
    named = text[after.end():] if after else ""
    if "=" in (line := named.partition("\n")[0]):  # "the answer is 48 + 24 = 72"
        named = line.rpartition("=")[2]
    for part, which in ((named, 0), (text, -1)):
        found = [Decimal(re.sub("[$€£,]", "", one).replace("\u2212", "-"))
                 for one in DIGITS.findall(part) if len(one) <= MAX_DIGITS]
        found = found or [spelled(one) for one in WORDS.finditer(part)]
        if found:
            with localcontext() as context:
                context.prec = 2 * MAX_DIGITS
                return (found[which] + 0).normalize()  # -0 is 0
    return None


def spelled(match: re.Match) -> Decimal:
    """A match of WORDS as a number."""
    tens, unit, small = (group and group.lower() for group in match.groups())
    if small:
        return Decimal(UNITS.index(small))
    return Decimal(20 + 10 * TENS.index(tens) + (UNITS.index(unit) if unit else 0))


def choice(text: str) -> str | None:
    """The letter after "answer is", else the last in brackets, by itself on a line, in a text."""
    after = MARKER.match(text)
    if after and (named := NAMED.match(text, after.end())):
        return named[1]
    for pattern in (BRACKETED, ALONE, LETTER):
        if found := pattern.findall(text):
            return found[-1]
    return None


def exact(text: str) -> str | None:
    """The whole text, each run of spaces as one."""
    return " ".join(text.split()) or None


CHECKS: dict[str, Callable[[str], Hashable | None]] = {
    "number": number, "choice": choice, "exact": exact}


def read_prompts(path: str | Path, *, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, `limit` at most; ValueError by line for what is none."""
    prompts = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip() or len(prompts) == limit:
            continue
        try:
            prompts.append(read_prompt(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {str(error)[:200]}; expected a JSON object "
                             "with prompt (perhaps system, answer, domain), or GSM8K's question "
                             "and answer") from None
    if not prompts:
        raise ValueError(f"{path}: got no prompts, expected one JSON object a line")
    return prompts


def read_prompt(raw: object) -> Prompt:
    """One line's object; ValueError says what is wrong."""
    if not isinstance(raw, dict):
        raise ValueError(f"got a JSON {type(raw).__name__}")
    fields = {"text": raw.get("prompt", raw.get("question")), "system": raw.get("system"),
              "answer": raw.get("answer"), "domain": raw.get("domain")}
    for name, value in fields.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name == "answer":
            fields[name] = value = str(value)
        if value is not None and not isinstance(value, str) or name == "text" and not value:
            raise ValueError(f"got {'prompt' if name == 'text' else name} "
                             f"{json.dumps(value)[:40]}, expected text")
    if "prompt" not in raw and fields["answer"] and "####" in fields["answer"]:
        fields["answer"] = fields["answer"].rpartition("####")[2].strip()
    return Prompt(**fields)
