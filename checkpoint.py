"""Read a Hugging Face checkpoint directory: its config, its tensors by slice, their names, int8.

Nothing is trusted: a config is checked key by key, a safetensors header whole before any tensor is
read, and no file outside the directory is opened, whatever an index or a link says. Reading is lazy
and by slice: a rank reads its own part, and memory stays at one buffer. No pickle is ever opened.

    config, checkpoint = ModelConfig.from_checkpoint(path), Checkpoint(path)
    [name] = tensor_names("layers.0.self_attn.o_proj.weight")
    for row, rows in checkpoint.chunks(name):  # [some, in], on the CPU, in the stored dtype
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READ_CHUNK_BYTES = 64 << 20  # host memory that reading a tensor of any size may take
# One parameter of ours is read from several tensors, stacked along the output dimension.
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SIZES = (  # in config.json; the first five fields of ModelConfig
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
INT8_WEIGHTS = {  # the `weights` of a quantization_config
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def refusal(where: str | Path, got: str, expected: str, mend="Download it again.") -> ValueError:
    """The error for a file that gavel cannot use."""
    return ValueError(f"{where}: got {got}, expected {expected}. {mend}")


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's frequency scaling (`rope_type: llama3` in config.json)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a Llama checkpoint, read from its config.json and never changed afterwards."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    dtype: torch.dtype = torch.float32  # of the weights, as the checkpoint says
    int8: bool = False  # linear layers are stored in int8, and compute in `dtype`
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: dict, *, where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face config, in both spellings of the RoPE settings.

        ValueError for another architecture, a missing key, or a setting gavel does not implement.
        """
        kind, architecture = raw.get("model_type"), (raw.get("architectures") or [None])[0]
        if kind != "llama" or architecture not in (None, "LlamaForCausalLM"):
            raise refusal(where, f"model_type {kind!r}, architecture {architecture!r}",
                          "'llama' and 'LlamaForCausalLM'",
                          "gavel runs Llama 3.1, 3.2 (text) and 3.3 checkpoints.")
        sizes = [raw.get(key) for key in SIZES]
        for key, size in zip(SIZES, sizes):
            if not isinstance(size, int) or size < 1:
                raise refusal(where, f"{key} = {size!r}", "a positive integer")
        for key, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
            if (raw.get(key) or only) != only:
                raise refusal(where, f"{key} = {raw[key]!r}", repr(only), "No Llama 3 has another.")
        heads = raw["num_attention_heads"]
        kv_heads = raw.get("num_key_value_heads") or heads
        head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
        if heads % kv_heads or head_dim % 2:
            raise refusal(where, f"{heads} query heads, {kv_heads} key-value heads of {head_dim}",
                          "key-value heads that divide the query heads and an even head_dim")
        theta, scaling = read_rope(raw, where)
        stated = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
        if stated not in DTYPES:
            raise refusal(where, f"dtype {stated!r}", " or ".join(DTYPES), "Take another model.")
        quantization = raw.get("quantization_config") or raw.get("compression_config")
        if quantization is not None:
            check_layout(quantization, where)
        eos = raw.get("eos_token_id")
        return cls(
            *sizes, num_kv_heads=kv_heads, head_dim=head_dim, dtype=DTYPES[stated],
            rope_theta=theta, rope_scaling=scaling, rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            int8=quantization is not None, tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
            eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos or ()))

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> ModelConfig:
        """Read config.json; stop tokens come from generation_config.json where it has them."""
        path = checkpoint_dir(path) / "config.json"
        raw, generation = read_json(path), path.with_name("generation_config.json")
        if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
            raw["eos_token_id"] = eos
        return cls.from_dict(raw, where=str(path))


def read_rope(raw: dict, where: str) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from `rope_parameters` (transformers 5) or its forerunners."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise refusal(where, f"rope_type {rope_type!r}", "'default' or 'llama3'", "Take a Llama 3.")
    if rope_type == "default":
        return theta, None
    names = [field.name for field in fields(RopeScaling)]
    if missing := [name for name in names if name not in rope]:
        raise refusal(where, f"a rope_type llama3 that lacks {', '.join(missing)}", "all of them")
    return theta, RopeScaling(**{name: rope[name] for name in names})


def check_layout(raw: dict, where: str) -> None:
    """ValueError unless a quantization_config says packed, 8 bits, symmetric, a scale a channel."""
    def expect(what: str, got: object, *allowed: object) -> None:
        if got not in allowed:
            raise refusal(where, f"{what} {got!r}", repr(allowed[0]), "gavel runs compressed-"
                          "tensors checkpoints with 8-bit weights and one scale a channel (w8a16), "
                          "as quantize.py writes them; take such a one.")

    groups, sparsity = raw.get("config_groups"), raw.get("sparsity_config") or {}
    expect("quant_method", raw.get("quant_method"), "compressed-tensors")
    expect("quantization format", raw.get("format"), "pack-quantized")
    expect("quantization_status", raw.get("quantization_status", "compressed"), "compressed")
    expect("kv_cache_scheme", raw.get("kv_cache_scheme"), None)
    expect("sparsity format", sparsity.get("format", "dense"), "dense")
    expect("transform_config", raw.get("transform_config") or None, None)
    if not isinstance(groups, dict) or not groups:
        raise refusal(where, f"config_groups {groups!r}", "at least one group")
    for name, group in groups.items():
        weights = (group if isinstance(group, dict) else {}).get("weights") or {}
        for key, only in INT8_WEIGHTS.items():
            expect(f"{key} of {name}'s weights", weights.get(key), only)
        for key, *fine in (("group_size", None, -1), ("actorder", None), ("dynamic", False, None)):
            expect(f"{key} of {name}'s weights", weights.get(key), *fine)
        for key in ("input_activations", "output_activations"):
            expect(f"{key} of {name}", group.get(key), None)
        expect(f"format of {name}", group.get("format"), None, "pack-quantized")


def checkpoint_dir(path: str | Path) -> Path:
    """`path` as a Path; FileNotFoundError where it is no directory."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: got {'a file' if path.exists() else 'nothing there'}, expected a Hugging "
            "Face checkpoint directory (config.json, safetensors, tokenizer). Download one with: "
            "hf download REPO --local-dir DIR")
    return path


def check_inside(path: Path, directory: Path) -> None:
    """ValueError where `path` leads out of `directory`, by a link or by its name.

    Links of a Hugging Face cache are fine: they lead from …/snapshots/REVISION to …/blobs.
    """
    root, real = (Path(os.path.realpath(place)) for place in (directory, path))
    blobs = [root.parent.parent / "blobs"] if root.parent.name == "snapshots" else []
    if not any(real.is_relative_to(place) for place in (root, *blobs)):
        raise refusal(path, f"a path that leads to {real}", f"a file inside {directory}",
                      "gavel opens no other: put a copy of it there.")


def read_json(path: Path) -> dict:
    """Parse a JSON object. FileNotFoundError or ValueError say which file and how to mend it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a Hugging Face checkpoint directory with "
            f"{path.name}. Download the whole directory (hf download), not single files.")
    check_inside(path, path.parent)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Download it again.") from None
    if not isinstance(raw, dict):
        raise refusal(path, f"a JSON {type(raw).__name__}", "an object")
    return raw


class TensorInfo(NamedTuple):
    """Where one tensor lies: `offset` counts bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """One safetensors file, read lazily by rows and columns.

    The safetensors library checks the header whole (lengths, dtypes, shapes, overlaps, holes)
    first. Reads go into a buffer, not through its map: resident memory stays at the buffer's size.
    """

    def __init__(self, path: Path):
        self.path, self.bytes_read = path, 0  # of tensors, since the header
        self.tensors: dict[str, TensorInfo] = {}
        with open(path, "rb") as file:
            head = file.read(8)
        try:
            with safe_open(path, framework="np") as file:
                offset = 8 + int.from_bytes(head, "little")
                for name in file.offset_keys():
                    part = file.get_slice(name)
                    dtype, shape = SAFETENSORS_DTYPES.get(part.get_dtype()), part.get_shape()
                    if dtype is None:
                        raise refusal(path, f"dtype {part.get_dtype()!r} for {name}",
                                      "one of " + ", ".join(SAFETENSORS_DTYPES))
                    nbytes = math.prod(shape) * dtype.itemsize
                    self.tensors[name] = TensorInfo(dtype, tuple(shape), offset, nbytes)
                    offset += nbytes
        except SafetensorError as error:
            if head.startswith((b"PK\x03\x04", b"\x80")):  # a zip, or a bare pickle
                raise refusal(
                    path, "a pickle (a PyTorch .bin or .pth under another name)", "safetensors",
                    "gavel never opens pickles: download the safetensors files.") from None
            raise self._broken(f"{error}") from None

    def _broken(self, got: str) -> ValueError:
        return refusal(self.path, got, "a whole safetensors file",
                       "Its download is probably incomplete: download it again.")

    def read(self, name: str, start: int = 0, stop: int | None = None,
             columns: tuple[int, int] | None = None) -> Tensor:
        """Rows start..stop, and columns[0]..columns[1] of a matrix (default: all), on the CPU."""
        info = self.tensors[name]
        rows, *rest = info.shape or (1,)  # a scalar is one row
        stop = rows if stop is None else stop
        assert 0 <= start <= stop <= rows, (name, start, stop, info.shape)
        shape = (stop - start, *rest)[:len(info.shape)]
        row_bytes = info.nbytes // max(rows, 1)
        begin, run, runs = info.offset + start * row_bytes, (stop - start) * row_bytes, 1
        if columns is not None and columns != (0, info.shape[1]):
            assert 0 <= columns[0] <= columns[1] <= info.shape[1], (name, columns, info.shape)
            shape, size = (stop - start, columns[1] - columns[0]), info.dtype.itemsize
            begin, run, runs = begin + columns[0] * size, shape[1] * size, shape[0]
        tensor = torch.empty(shape, dtype=info.dtype, device="cpu")
        buffer = tensor.view(-1).view(torch.uint8).numpy()
        self.bytes_read += len(buffer)
        with open(self.path, "rb") as file:
            for i in range(runs):
                file.seek(begin + i * row_bytes)
                if file.readinto(buffer[i * run:(i + 1) * run]) < run:
                    raise self._broken(f"end of file inside {name}")
        return tensor


class Checkpoint:
    """The tensors of a Hugging Face directory: one `model.safetensors`, or shards with an index.

    FileNotFoundError for a missing shard or no safetensors at all; ValueError for pickles, broken
    files, and files that lie outside the directory.
    """

    def __init__(self, path: str | Path):
        self.path = checkpoint_dir(path)
        index, single = self.path / "model.safetensors.index.json", "model.safetensors"
        if not index.is_file() and not (self.path / single).is_file():
            pickles = [p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pth", ".pt")]
            found = f"only pickles ({', '.join(sorted(pickles)[:3])})" if pickles else "no weights"
            raise FileNotFoundError(
                f"{self.path}: got {found}, expected {single} or shards with {index.name}. gavel "
                "never opens pickles; download the safetensors files of the repository.")
        weight_map = self._read_index(index) if index.is_file() else {}
        self.files: dict[str, SafetensorsFile] = {}
        for name in sorted(set(weight_map.values())) or [single]:
            check_inside(self.path / name, self.path)
            if not (self.path / name).is_file():
                count = list(weight_map.values()).count(name)
                raise FileNotFoundError(f"{self.path / name} does not exist; the index expects "
                                        f"{count} tensors in it. Resume the download (hf download)")
            self.files[name] = SafetensorsFile(self.path / name)
        self.weight_map = weight_map or dict.fromkeys(self.files[single].tensors, single)
        for tensor, name in self.weight_map.items():
            if tensor not in self.files[name].tensors:
                raise ValueError(f"{self.path / name}: lacks {tensor}, which the index expects "
                                 "there. Download it again.")

    @staticmethod
    def _read_index(index: Path) -> dict[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise refusal(index, "no weight_map", "one from tensor to file")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
                raise refusal(index, f"{name!r} as the file of {tensor}",
                              "the name of a file beside the index")
        return weight_map

    bytes_read = property(lambda self: sum(file.bytes_read for file in self.files.values()))

    def info(self, name: str) -> TensorInfo:
        """dtype, shape and place of a tensor; ValueError where there is none of that name."""
        if name not in self.weight_map:
            raise ValueError(f"{self.path}: lacks the tensor {name}, which its config.json calls "
                             f"for (it has {len(self.weight_map)} others). Download it again.")
        return self.files[self.weight_map[name]].tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None,
             columns: tuple[int, int] | None = None) -> Tensor:
        """Rows start..stop (and columns) of a tensor, on the CPU, in the stored dtype."""
        self.info(name)
        return self.files[self.weight_map[name]].read(name, start, stop, columns)

    def chunks(self, name: str, nbytes: int = READ_CHUNK_BYTES, rows: tuple[int, int] | None = None,
               columns: tuple[int, int] | None = None) -> Iterator[tuple[int, Tensor]]:
        """(row, counted from the first asked for, rows), at most nbytes (or one row) at a time."""
        info = self.info(name)
        height = info.shape[0] if info.shape else 1
        first, last = rows or (0, height)
        step = max(1, nbytes * height // max(info.nbytes, 1))
        for start in range(first, last, step):
            yield start - first, self.read(name, start, min(start + step, last), columns)


def tensor_names(parameter: str, *, int8: bool = False) -> list[str]:
    """The checkpoint's tensors that make up one parameter of ours, in the order of its rows."""
    parameter = f"{parameter}_packed" if int8 else parameter.replace(".scale", ".weight_scale")
    for ours, theirs in STACKED.items():
        if ours in parameter:
            return [f"model.{parameter.replace(ours, name)}" for name in theirs]
    return [parameter if parameter.startswith("lm_head.") else f"model.{parameter}"]


def check_shapes(checkpoint: Checkpoint, sources: list[str], parameter: Tensor,
                 config: ModelConfig) -> None:
    """ValueError where the tensors of `parameter` are missing or contradict config.json."""
    different = "Weights and config are of different models: download both again."
    kv_rows = config.num_kv_heads * config.head_dim
    rows = {"q_proj": config.num_heads * config.head_dim, "k_proj": kv_rows, "v_proj": kv_rows,
            "gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
    for source in sources:
        info = checkpoint.info(source)
        out = rows.get(source.split(".")[-2], parameter.shape[0])
        expected, dtypes = [out, *parameter.shape[1:]], list(DTYPES.values())
        if source.endswith(".weight_packed"):
            stated = checkpoint.read(source.replace("_packed", "_shape")).tolist()
            if stated != expected:
                raise refusal(checkpoint.path, f"weight_shape {stated} beside {source}",
                              f"{expected} by config.json", different)
            expected, dtypes = [out, -(-expected[1] // 4)], [torch.int32]
        elif source.endswith(".weight_scale"):
            expected = [out, 1]
        if list(info.shape) != expected:
            raise refusal(checkpoint.path, f"shape {list(info.shape)} for {source}",
                          f"{expected} by config.json", different)
        if info.dtype not in dtypes:
            got, *allowed = (str(dtype).removeprefix("torch.") for dtype in (info.dtype, *dtypes))
            raise refusal(checkpoint.path, f"dtype {got} for {source}", " or ".join(allowed),
                          "Download the checkpoint as published.")


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A place to write a file to, then renamed to `path`: killed, it is the old file or the new."""
    aside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_writable(path: str | None) -> None:
    """ValueError or FileNotFoundError where an output file could not be written."""
    if path is None:
        return
    if not (parent := Path(path).resolve().parent).is_dir():
        raise FileNotFoundError(f"{path}: its directory {parent} does not exist; make it first")
    if Path(path).is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{path}: got a place that cannot be written, expected a file in a "
                         "writable directory")
