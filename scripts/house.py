"""How easy the code is to enter: lines, density, longest functions, and imports against the floors.

A module may import those on floors below its own, and its neighbours where no circle arises. Code
tokens are Python's, without comments, docstrings and line ends. One table; --json for programs.

    python scripts/house.py                # this tree
    python scripts/house.py ../gavel-old   # another one
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"checkpoint": 1, "tokenizer": 1, "judge": 1, "attention": 1, "tp": 2, "quantize": 2, "model": 3,
          "cpu": 4, "train_head": 4, "drafter": 5, "terminal": 5, "generate": 6}


def code_tokens(source: str, tree: ast.Module) -> int:
    """Tokens that a reader of the code reads; a docstring is none."""
    docs = {node.body[0].lineno for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)}
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER}
    return sum(token.type not in skipped and not (token.type == tokenize.STRING and token.start[0] in docs)
               for token in tokenize.generate_tokens(io.StringIO(source).readline))


def functions(tree: ast.Module) -> list[tuple[int, str]]:
    """(lines, name) of every function, Triton kernels with them."""
    return [(node.end_lineno - node.lineno + 1, node.name) for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)]


def imports(tree: ast.Module, names: set[str]) -> set[str]:
    """Those of `names` that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found & names


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that reach themselves by imports."""
    def reach(name: str, seen: set[str]) -> set[str]:
        for other in arrows[name] - seen:
            seen.add(other)
            reach(other, seen)
        return seen
    return sorted(name for name in arrows if name in reach(name, set()))


def survey(root: Path) -> dict:
    """Everything that the table shows, for the top-level modules of a tree."""
    sources = {path.stem: path.read_text() for path in sorted(root.glob("*.py"))}
    trees = {name: ast.parse(source) for name, source in sources.items()}
    arrows = {name: imports(tree, set(sources)) for name, tree in trees.items()}
    modules = {}
    for name, source in sources.items():
        lines = source.count("\n")
        longest, function = max((f for f in functions(trees[name]) if not f[1].endswith("_kernel")),
                                default=(0, "-"))
        modules[name] = {
            "lines": lines, "at_100_columns": sum(max(1, -(-len(line) // 100)) for line in source.splitlines()),
            "code_tokens": code_tokens(source, trees[name]), "longest": longest, "function": function,
            "widest": max(map(len, source.splitlines())),
            "up": sorted(other for other in arrows[name] if FLOORS.get(other, 0) > FLOORS.get(name, 9))}
    return {"modules": modules, "lines": sum(m["lines"] for m in modules.values()), "circles": circles(arrows)}


def main(args: argparse.Namespace) -> None:
    report = survey(args.root)
    if args.json:
        print(json.dumps(report))
        return
    print(f"{'module':<12}{'lines':>7}{'code tokens':>13}{'per line':>10}{'widest':>8}  longest function")
    for name, m in report["modules"].items():
        print(f"{name:<12}{m['lines']:>7}{m['code_tokens']:>13}{m['code_tokens'] / m['lines']:>10.1f}"
              f"{m['widest']:>8}  {m['longest']} {m['function']}"
              + (f"  imports upwards: {', '.join(m['up'])}" if m["up"] else ""))
    wrapped = sum(m["at_100_columns"] for m in report["modules"].values())
    print(f"{'all':<12}{report['lines']:>7}  ({wrapped} with wider lines wrapped at 100 columns)")
    print(f"in a circle of imports: {', '.join(report['circles']) or 'none'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="a tree (default: this one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    main(parser.parse_args())
