"""Draw a judged answer as an SVG: every token in the style of who let it stand.

It reads a file that `generate.py --json` wrote. Plain text was accepted by the exact rule, orange
underlined text was kept by the lossy rule alone, bold blue text was written by the target. Colours
are never the only sign, and the panel brings its own background, so the picture reads on light and
dark pages. A token is one span, with its source as class and its score as a tooltip. Characters
wider than a letter (Chinese, say) overlap.

    python generate.py --judge --no-compare --no-compile --json build/answer.json
    python scripts/picture.py build/answer.json docs/judged_answer.svg
"""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import atomic_write  # noqa: E402
from terminal import DEMO  # noqa: E402
from tokenizer import StreamDecoder, Tokenizer  # noqa: E402

SVG = "http://www.w3.org/2000/svg"
COLUMNS, FONT, LINE, MARGIN = 84, 15, 25, 24  # characters a line; pixels
ADVANCE = 0.602 * FONT  # of Menlo and DejaVu Sans Mono; each span says where it begins
STYLE = f"""
text {{ font: {FONT}px Menlo, 'DejaVu Sans Mono', 'Liberation Mono', 'Courier New', monospace;
  fill: #24292f; white-space: pre }}
.prompt, .note {{ fill: #59636e }}
.lossy {{ fill: #a94400 }}
.target {{ fill: #0550ae; font-weight: bold }}
line {{ stroke: #d9730d; stroke-width: 2 }}
rect {{ fill: #fffefa; stroke: #d0d7de }}"""


def token_texts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """What each token adds to the text, special ones by name; half a character comes with its end."""
    decoder = StreamDecoder(tokenizer, skip_special=False)
    texts = [decoder.push([token]) for token in tokens]
    if texts:
        texts[-1] += decoder.flush()
    return texts


def visible(text: str) -> str:
    """Control characters, which XML forbids, as pictures of themselves."""
    pictures = {code: 0x2400 + code for code in range(32)} | {0x0A: "↵", 0x09: "→", 0x7F: "␡"}
    pictures |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\ufffd")
    return text.translate(pictures)


def layout(texts: list[str]) -> list[list[tuple[int, int, str]]]:
    """Where each text goes: per text its pieces (line, column, characters).

    A text that does not fit moves to the next line as a whole, where its first space hangs in the
    margin; one that is longer than a line is cut. A line break is shown, and followed.
    """
    line, column, placed = 0, 0, []
    for text in texts:
        pieces = []
        shown = text.rstrip()
        if column + len(shown.split("\n")[0]) > COLUMNS and column > 0:
            line, column = line + 1, -1 if text.startswith(" ") else 0
        for part in text.splitlines(keepends=True) or [""]:
            while len(part) > COLUMNS - column > 0:
                cut = COLUMNS - column
                pieces.append((line, column, part[:cut]))
                part, line, column = part[cut:], line + 1, 0
            pieces.append((line, column, part))
            column += len(part)
            if part.endswith("\n"):
                line, column = line + 1, 0
        placed.append(pieces)
    return placed


def words(text: str) -> list[str]:
    """A text in pieces that may begin a line, each with the space before it."""
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)]


def add(parent: ET.Element, name: str, text: str = "", **attributes) -> ET.Element:
    element = ET.SubElement(parent, name, {key.rstrip("_"): f"{value:g}" if isinstance(value, float)
                                           else str(value) for key, value in attributes.items()})
    element.text = text or None
    return element


def spans(svg: ET.Element, texts: list[str], classes: list[str], titles: list[str],
          top: float) -> float:
    """Draw texts from `top` on, one span each; returns the y below them."""
    block, last = add(svg, "text"), 0
    block.set("xml:space", "preserve")
    for pieces, kind, title in zip(layout(texts), classes, titles, strict=True):
        span = None
        for line, column, characters in pieces:
            x, y, last = MARGIN + column * ADVANCE, top + line * LINE, line
            inside = {"class_": kind} if span is None else {}
            piece = add(block if span is None else span, "tspan", visible(characters), x=x, y=y,
                        **inside)
            span = piece if span is None else span
            word = characters.strip()
            if kind == "lossy" and word:
                indent = len(characters) - len(characters.lstrip())
                underline(svg, x + indent * ADVANCE, y, len(word))
        if title:
            add(span, "title", title)
    return top + (last + 1) * LINE


def underline(svg: ET.Element, x: float, y: float, characters: int) -> None:
    add(svg, "line", x1=x, x2=x + characters * ADVANCE, y1=y + 4.5, y2=y + 4.5)


def draw(sample: dict, texts: list[str]) -> ET.Element:
    """The SVG of one object of a --json file, with its tokens' texts."""
    rule = sample["rule"]
    classes = [source if source in ("exact", "target") else "lossy" for source in sample["sources"]]
    titles = [source if score is None else f"{source}, score {score:.2f}"
              for source, score in zip(sample["sources"], sample["scores"], strict=True)]
    svg = ET.Element("svg", {"xmlns": SVG, "role": "img"})
    add(svg, "title", f"An answer under the rule {rule}: who let each token stand")
    add(svg, "style", STYLE)
    panel = add(svg, "rect", x=0.5, y=0.5, rx=8)
    prompt = words(sample["prompt"])
    y = spans(svg, prompt, ["prompt"] * len(prompt), [""] * len(prompt), MARGIN + FONT)
    y = spans(svg, texts, classes, titles, y + LINE / 2)

    lossy = rule not in ("none", "exact")
    legend = [("exact", "accepted by the exact rule"), ("lossy", f"kept by the {rule} alone"),
              ("target", "written by the target")]
    legend = [(kind, text) for kind, text in legend if lossy or kind != "lossy"]
    y, x = y + LINE / 2, float(MARGIN)
    for kind, text in legend:
        add(svg, "text", text, class_=kind, x=x, y=y)
        if kind == "lossy":
            underline(svg, x, y, len(text))
        x += (len(text) + 3) * ADVANCE
    note = (f"{sample['new_tokens']} tokens in {sample['rounds']} rounds, "
            f"{sample['tokens_per_round']:.1f} tokens a round")
    if lossy:
        note += f": {sample['accepted_exact']} exact, {sample['accepted_judge']} by the {rule}"
    add(svg, "text", note, class_="note", x=float(MARGIN), y=y + LINE)

    width, height = 2 * MARGIN + COLUMNS * ADVANCE, y + LINE + MARGIN
    svg.set("viewBox", f"0 0 {width:.0f} {height:.0f}")
    svg.set("width", f"{width:.0f}")
    panel.set("width", f"{width - 1:.0f}")
    panel.set("height", f"{height - 1:.0f}")
    return svg


def main(args: argparse.Namespace) -> None:
    samples = json.loads(Path(args.json).read_text(encoding="utf-8"))
    if not isinstance(samples, list) or not 0 <= args.sample < len(samples):
        raise ValueError(f"{args.json}: got no sample {args.sample}, expected a list that "
                         "generate.py --json wrote, and a number of it")
    tokenizer = Tokenizer.from_checkpoint(args.checkpoint_path)
    sample = samples[args.sample]
    svg = draw(sample, token_texts(tokenizer, sample["tokens"]))
    Path(args.svg).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.svg) as aside:
        aside.write_bytes(ET.tostring(svg, encoding="utf-8") + b"\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", metavar="ANSWER.json", help="what generate.py --json wrote")
    parser.add_argument("svg", metavar="PICTURE.svg", help="where the picture goes")
    parser.add_argument("--checkpoint_path", metavar="DIR", default=DEMO / "target",
                        help="whose tokenizer spells the tokens (default: the bundled target)")
    parser.add_argument("--sample", type=int, default=0, metavar="N",
                        help="which of the file's answers (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, KeyError) as error:
        print(f"picture.py: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
