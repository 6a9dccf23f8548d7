"""What long jobs over a pair of models share: their options, loading, and a journal to resume from.

    parser = pair_options(argparse.ArgumentParser(description=__doc__))
    setup = PairSetup.from_args(parser.parse_args())     # ValueError before a weight is read
    shard = tp.start(setup.device)
    target, draft = setup.load(shard)
    with Journal(path, key, shard) as journal:           # lines of an earlier run: journal.lines
        journal.append({...})                            # on disk when this returns
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # not on Windows: two runs at once go unnoticed
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cpu  # noqa: E402
import terminal  # noqa: E402
import tp  # noqa: E402
from checkpoint import DTYPES, Checkpoint, ModelConfig, check_writable  # noqa: E402
from generate import setup_compiler  # noqa: E402
from judge import check_fit  # noqa: E402
from model import Transformer  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


def pair_options(parser: argparse.ArgumentParser, *, speculate_k: int) -> argparse.ArgumentParser:
    """The options that say which pair runs, and how."""
    add = parser.add_argument_group("pair").add_argument
    add("--checkpoint_path", required=True, metavar="DIR", help="target: a Hugging Face directory")
    add("--draft_checkpoint_path", required=True, metavar="DIR",
        help="a smaller model with the same tokenizer")
    add("--speculate_k", type=int, default=speculate_k, metavar="K",
        help="tokens drafted a round (default: %(default)s)")
    add("--max_new_tokens", type=int, default=1024,
        help="of an answer; one that is longer has no result (default: %(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, help="default: as generate.py runs the target")
    add("--compile", action=argparse.BooleanOptionalAction, default=True,
        help="torch.compile, worth its minute from some dozens of prompts on (default: on)")
    return parser


@dataclass(frozen=True)
class PairSetup:
    """A checked pair: where it lies and how it runs."""

    target_path: Path
    draft_path: Path
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    context: int  # tokens of prompt and answer
    compile: bool
    speculate_k: int
    max_new_tokens: int

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> PairSetup:
        """ValueError or FileNotFoundError for what does not fit, before a weight is read."""
        paths = [Path(path) for path in (args.checkpoint_path, args.draft_checkpoint_path)]
        configs = [ModelConfig.from_checkpoint(path) for path in paths]
        if args.max_new_tokens < 1:
            raise ValueError(f"got max_new_tokens {args.max_new_tokens}, expected 1 or more")
        device = tp.pick_device(args.device)
        for path, config in zip(paths, configs):
            tp.check_world(config, tp.world_size(), str(path))
        check_fit(*configs, None, args.speculate_k)
        tokenizer = Tokenizer.from_checkpoint(paths[0])
        tokenizer.check_same(Tokenizer.from_checkpoint(paths[1]))
        if tokenizer.vocab_size > configs[0].vocab_size:
            raise ValueError(f"{paths[0]}: got {tokenizer.vocab_size} tokens, expected at most the "
                             f"model's {configs[0].vocab_size}; download it again")
        missing = cpu.can_compile(device) if args.compile else None
        if missing:
            terminal.say(f"{missing}: running uncompiled, several times slower")
        context = min(config.max_position_embeddings for config in configs)
        return cls(*paths, tokenizer, device, tp.pick_dtype(args.dtype, configs[0], device),
                   context, args.compile and missing is None, args.speculate_k,
                   args.max_new_tokens)

    def load(self, shard: tp.Shard) -> tuple[Transformer, Transformer]:
        """Target and draft."""
        if self.compile:
            setup_compiler(self.device, shard.world)
        target, draft = terminal.load_models(self, lambda path, progress: (
            Transformer.from_checkpoint(path, device=self.device, dtype=self.dtype, shard=shard,
                                        progress=progress)), shard)
        return target, draft

    def length(self, longest_prompt: int) -> int:
        """Positions that prompts up to this long and their answers need, rounded up."""
        need = longest_prompt + self.max_new_tokens
        return min(self.context, -(-need // 128) * 128)

    def key(self) -> dict:
        """What results depend on, for a journal."""
        parts: list = []
        for path in (self.target_path, self.draft_path):
            parts += [(name, *_stamp(file.path)) for name, file in Checkpoint(path).files.items()]
            parts += [file_hash(file) for file in sorted(path.glob("*.json"))]
        models = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        return {"models": models, "dtype": str(self.dtype), "device": self.device.type,
                "ranks": tp.world_size(), "compile": self.compile, "speculate_k": self.speculate_k,
                "max_new_tokens": self.max_new_tokens}


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def check_paths(*, inputs: list, outputs: list) -> None:
    """ValueError where an output would overwrite an input or another one, or cannot be written."""
    seen = [Path(path).resolve() for path in inputs]
    for path in filter(None, outputs):
        if Path(path).resolve() in seen:
            raise ValueError(f"got {path} twice, expected another file for each output")
        seen.append(Path(path).resolve())
        check_writable(path)


def file_hash(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


class Journal:
    """A file of JSON lines that a killed job goes on from; its first line says what it is of.

    A line counts once its newline is on disk: half a line, of a kill or a full disk, is cut off.
    Rank 0 reads and writes. `done` lines are of an earlier run; all ranks see `lines`, or with
    share=False rank 0 alone. ValueError where the file is of another job.
    """

    def __init__(self, path: str | Path, key: dict, shard: tp.Shard, *, share: bool = True):
        self.path, self.file, self.keeps = Path(path), None, share or shard.rank == 0
        problem = None
        self.lines: list[dict] = []
        if shard.rank == 0:
            try:
                self.lines = self._open(json.loads(json.dumps(key)))
            except (ValueError, OSError) as error:
                problem = str(error)
        problem, self.done, lines = shard.from_first(
            (problem, len(self.lines), self.lines if share else None))
        self.lines = lines if share else self.lines
        if problem:
            raise ValueError(problem)

    def _open(self, key: dict) -> list[dict]:
        self.file = self.path.open("a+b")
        try:
            return self._read(key)
        except BaseException:
            self.file.close()
            raise

    def _read(self, key: dict) -> list[dict]:
        if fcntl:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{self.path}: another run is writing it; wait for it, or give "
                                 "another output") from None
        self.file.seek(0)
        data = self.file.read()
        whole = data[:data.rfind(b"\n") + 1]
        try:
            found, *lines = [dict(json.loads(line)) for line in whole.splitlines()] or [key]
        except (ValueError, TypeError):
            raise ValueError(f"{self.path}: got a damaged file, expected the JSON lines of a run "
                             "to go on with; remove it to start anew") from None
        different = [f"{name}: {found.get(name)!r}, now {key.get(name)!r}"
                     for name in {**found, **key} if found.get(name) != key.get(name)]
        if different:
            raise ValueError(f"{self.path}: got a run of other settings ({'; '.join(different)}), "
                             "expected the same to go on with; remove it to start anew")
        self.file.truncate(len(whole))
        if not whole:
            self._write(key)
        return lines

    def append(self, line: dict) -> None:
        """Add a line; rank 0 has it on disk when this returns."""
        if self.keeps:
            self.lines.append(json.loads(json.dumps(line)))
        if self.file:
            self._write(line)

    def _write(self, line: dict) -> None:
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        if self.file:
            self.file.close()
