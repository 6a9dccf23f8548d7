"""The Llama-3.1 transformer with a static key-value cache, and the reader of its checkpoints.

One forward pass returns *hidden states before the final norm*, so that the judge head and the LM head share it:
`model(tokens, input_pos)` gives hidden, `model.logits(hidden)` gives logits. The cache is static: every shape is known
when the model is compiled, position p is written to row p, and rows past the committed position are simply dead until
they are overwritten. Attention costs what the length in use costs: on CUDA a Triton kernel reads the positions on the device,
elsewhere it is masked attention over the rows that the caller bounds it to.

q, k and v are read from three tensors into one matrix, and so are gate and up: at batch 1 a step is a handful of
matrix-vector products, and fewer, larger ones run closer to the memory limit.

Shapes: B batch, S new tokens, T cache length, H query heads, Hkv key-value heads, G = H/Hkv, Dh head dim, D model dim,
F feed-forward dim, V vocabulary.

    model = Transformer.from_checkpoint("Llama-3.1-8B-Instruct", device="cuda", dtype=torch.bfloat16)
    model.setup_caches(max_batch_size=1, max_seq_length=4096)
    hidden = model(tokens, input_pos)          # [1, S] int64, [S] int64 -> [1, S, D]
    logits = model.logits(hidden)              # [1, S, V]

Sources: Llama 3 (arXiv 2407.21783), RoPE (2104.09864) in the rotate-half form that Hugging Face weights are laid out for.
It does not read pickles, biases, other RoPE variants than Llama's, or architectures other than Llama.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

try:
    import triton
    import triton.language as tl
except ImportError:  # no triton for this platform: the torch routes still run
    triton = None

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of weights and activations
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
READ_CHUNK_BYTES = 64 << 20  # host memory that reading a tensor of any size may take
MAX_PACKED_BYTES = 4 << 30  # of a model's weights on a CPU that are kept a second time, for speed (see keep_packed)
PACKED_FOR = 16  # rows; oneDNN picks the same order for 1 to 128
FEW_ROWS = 2  # up to here a multiply-and-sum is the fastest linear layer on a CPU; for 4 rows a packed copy is
MAX_LOOP_ROWS = 4096  # of a cache that attention may read in loops: Inductor sums more terms in another way, a graph of its own
MAX_TILES = 1024  # of attention that may be split, each with its arrival counter; no chip has so many multiprocessors
# One parameter of ours is read from several tensors of the checkpoint, stacked along the output dimension.
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


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
    dtype: torch.dtype = torch.float32  # the dtype that the checkpoint says its weights have
    int8: bool = False  # linear layers are stored in int8 (see quantize.py); dtype is what they compute in
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: dict, *, where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face config (both spellings of the RoPE settings).
        Raises ValueError for an architecture that is not Llama, a missing key, or a setting gavel does not implement.
        """
        architecture = (raw.get("architectures") or [None])[0]
        if raw.get("model_type") != "llama" or architecture not in (None, "LlamaForCausalLM"):
            raise ValueError(
                f"{where}: got model_type {raw.get('model_type')!r}, architecture {architecture!r}; expected 'llama' and "
                "'LlamaForCausalLM'. gavel runs Llama 3.1, 3.2 (text) and 3.3 checkpoints.")
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if not isinstance(raw.get(key), int) or raw[key] < 1:
                raise ValueError(f"{where}: got {key} = {raw.get(key)!r}, expected a positive integer. Download it again.")
        for key in ("attention_bias", "mlp_bias"):
            if raw.get(key):
                raise ValueError(f"{where}: got {key} = true; gavel's layers have no bias, as no Llama 3 has one.")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{where}: got hidden_act {raw['hidden_act']!r}, expected 'silu'.")
        heads = raw["num_attention_heads"]
        kv_heads = raw.get("num_key_value_heads") or heads
        head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
        if heads % kv_heads or head_dim % 2:
            raise ValueError(f"{where}: got {heads} query heads, {kv_heads} key-value heads, head_dim {head_dim}; "
                             "expected key-value heads that divide the query heads and an even head_dim.")
        # transformers 5 writes one `rope_parameters`; every earlier release `rope_theta` beside `rope_scaling`.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(f"{where}: got rope_type {rope_type!r}, expected 'default' or 'llama3'.")
        scaling = None
        if rope_type == "llama3":
            missing = [f for f in RopeScaling.__dataclass_fields__ if f not in rope]
            if missing:
                raise ValueError(f"{where}: rope_type llama3 lacks {', '.join(missing)}. Download config.json again.")
            scaling = RopeScaling(**{f: rope[f] for f in RopeScaling.__dataclass_fields__})
        dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype") or "float32"), None)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{where}: got dtype {raw.get('dtype') or raw.get('torch_dtype')!r}, expected float32, "
                             "bfloat16 or float16.")
        quantization = raw.get("quantization_config") or raw.get("compression_config")
        if quantization is not None:
            from quantize import check_layout  # here, as that module imports this one

            check_layout(quantization, where)
        eos = raw.get("eos_token_id")
        return cls(
            vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"], num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6), max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rope_theta=float(theta), rope_scaling=scaling, tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            dtype=dtype, int8=quantization is not None, eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos or ()))

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> ModelConfig:
        """Read config.json of a checkpoint directory; stop tokens come from generation_config.json where it has them."""
        path = checkpoint_dir(path)
        raw = read_json(path / "config.json")
        if (path / "generation_config.json").is_file():
            eos = read_json(path / "generation_config.json").get("eos_token_id")
            if eos is not None:
                raw["eos_token_id"] = eos
        return cls.from_dict(raw, where=str(path / "config.json"))


def read_json(path: Path) -> dict:
    """Parse a JSON object. FileNotFoundError or ValueError say which file and how to mend it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face checkpoint directory with {path.name}. "
                                "Download the whole directory (hf download), not single files.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Download it again.") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: got a JSON {type(raw).__name__}, expected an object. Download it again.")
    return raw


def checkpoint_dir(path: str | Path) -> Path:
    """`path` as a Path; FileNotFoundError where it is no directory."""
    path = Path(path)
    if not path.is_dir():
        kind = "a file" if path.exists() else "nothing there"
        raise FileNotFoundError(f"{path}: got {kind}, expected a Hugging Face checkpoint directory (config.json, "
                                "safetensors, tokenizer). Download one with: hf download REPO --local-dir DIR")
    return path


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` counts bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """One safetensors file, read lazily at the offsets of its header.

    The header is checked whole (length, names, dtypes, shapes, offsets, overlaps, holes) before any tensor is read.
    Rows are read with plain file reads into a buffer, not mapped: resident memory stays at the buffer's size.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tensors = self._read_header()
        self.bytes_read = 0  # of tensors, since the header

    def _read_header(self) -> dict[str, TensorInfo]:
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":  # a zip, or a bare pickle
                    raise ValueError(f"{self.path}: got a pickle (a PyTorch .bin or .pth under another name), expected "
                                     "safetensors. gavel never opens pickles; download the safetensors files.")
                raise self._broken(f"header length {length} in a file of {size} bytes")
            try:
                header = json.loads(file.read(length))
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise self._broken("a header that is not JSON") from None
        if not isinstance(header, dict):
            raise self._broken("a header that is no JSON object")
        header.pop("__metadata__", None)
        tensors = {name: self._tensor_info(name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if info.offset != end:
                raise self._broken(f"{name} at byte {info.offset} where the one before it ends at {end}")
            end += info.nbytes
        if end != size:
            raise self._broken(f"{size} bytes where the header describes {end}")
        return tensors

    def _tensor_info(self, name: str, entry: object, data_start: int) -> TensorInfo:
        try:
            dtype, shape, (begin, end) = str(entry["dtype"]), list(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise self._broken(f"an entry for {name} without dtype, shape and data_offsets") from None
        if dtype not in SAFETENSORS_DTYPES:
            raise self._broken(f"dtype {dtype!r} for {name} (known: {', '.join(SAFETENSORS_DTYPES)})")
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise self._broken(f"shape {shape} and offsets {begin}, {end} for {name}")
        nbytes = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
        if end - begin != nbytes:
            raise self._broken(f"{end - begin} bytes for {name}, whose shape {shape} takes {nbytes}")
        return TensorInfo(SAFETENSORS_DTYPES[dtype], tuple(shape), data_start + begin, nbytes)

    def _broken(self, got: str) -> ValueError:
        return ValueError(f"{self.path}: got {got}; expected a whole safetensors file. Its download is probably "
                          "incomplete: download it again.")

    def read(self, name: str, start: int = 0, stop: int | None = None, columns: tuple[int, int] | None = None) -> Tensor:
        """Rows start..stop, and of a matrix columns[0]..columns[1], as a CPU tensor in the stored dtype (default: all)."""
        info = self.tensors[name]
        if not info.shape:
            start, stop, row_bytes, shape = 0, 1, info.nbytes, ()
        else:
            stop = info.shape[0] if stop is None else stop
            assert 0 <= start <= stop <= info.shape[0], (name, start, stop, info.shape)
            row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
            shape = (stop - start, *info.shape[1:])
        begin, run, runs = info.offset + start * row_bytes, (stop - start) * row_bytes, 1
        if columns is not None and columns != (0, info.shape[1]):
            assert 0 <= columns[0] <= columns[1] <= info.shape[1], (name, columns, info.shape)
            width, size = columns[1] - columns[0], info.dtype.itemsize
            begin, run, runs, shape = begin + columns[0] * size, width * size, stop - start, (stop - start, width)
        buffer = bytearray(run * runs)
        if not buffer:
            return torch.empty(shape, dtype=info.dtype)
        self.bytes_read += len(buffer)
        with open(self.path, "rb", buffering=0) as file:
            for i in range(runs):
                file.seek(begin + i * row_bytes)
                view = memoryview(buffer)[i * run:(i + 1) * run]
                while view:  # one read may return less than was asked for (2 GB limit, signals)
                    count = file.readinto(view)
                    if not count:
                        raise self._broken(f"end of file inside {name}")
                    view = view[count:]
        return torch.frombuffer(buffer, dtype=info.dtype).view(shape)


class Checkpoint:
    """The tensors of a Hugging Face directory: one `model.safetensors`, or shards with an index.
    Raises FileNotFoundError for a missing shard or no safetensors at all, ValueError for pickles and broken files.
    """

    def __init__(self, path: str | Path):
        self.path = checkpoint_dir(path)
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index}: got no weight_map, expected one from tensor to file. Download it again.")
        elif (self.path / "model.safetensors").is_file():
            weight_map = None
        else:
            pickles = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pth", ".pt"))
            found = f"only pickles ({', '.join(pickles[:3])})" if pickles else "no weights"
            raise FileNotFoundError(
                f"{self.path}: got {found}, expected model.safetensors or shards with model.safetensors.index.json. "
                "gavel never opens pickles; download the safetensors files of the repository.")
        self.files: dict[str, SafetensorsFile] = {}
        for name in sorted(set(weight_map.values())) if weight_map else ["model.safetensors"]:
            if not (self.path / name).is_file():
                missing = sum(value == name for value in weight_map.values())
                raise FileNotFoundError(f"{self.path / name} does not exist; the index expects {missing} tensors in it. "
                                        "Resume the download (hf download).")
            self.files[name] = SafetensorsFile(self.path / name)
        if weight_map is None:
            weight_map = dict.fromkeys(self.files["model.safetensors"].tensors, "model.safetensors")
        for tensor, name in weight_map.items():
            if tensor not in self.files[name].tensors:
                raise ValueError(f"{self.path / name}: lacks {tensor}, which the index expects there. Download it again.")
        self.weight_map = weight_map

    def info(self, name: str) -> TensorInfo:
        """dtype, shape and place of a tensor; ValueError where the checkpoint has none of that name."""
        if name not in self.weight_map:
            raise ValueError(f"{self.path}: lacks the tensor {name}, which its config.json calls for "
                             f"(it has {len(self.weight_map)} others). Download the directory again.")
        return self.files[self.weight_map[name]].tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None, columns: tuple[int, int] | None = None) -> Tensor:
        """Rows start..stop (and columns) of a tensor, on the CPU, in the stored dtype."""
        self.info(name)
        return self.files[self.weight_map[name]].read(name, start, stop, columns)

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self.files.values())

    def chunks(self, name: str, nbytes: int = READ_CHUNK_BYTES, rows: tuple[int, int] | None = None,
               columns: tuple[int, int] | None = None) -> Iterator[tuple[int, Tensor]]:
        """(row, counted from the first asked for, rows) in pieces of at most nbytes (but at least one row)."""
        info = self.info(name)
        first, last = rows or (0, info.shape[0] if info.shape else 1)
        step = max(1, nbytes * (info.shape[0] if info.shape else 1) // max(info.nbytes, 1))
        for start in range(first, last, step):
            yield start - first, self.read(name, start, min(start + step, last), columns)


def rope_inv_freq(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Inverse frequencies [Dh/2] in float32, scaled as Llama 3.1 does it.

    Wavelengths beyond original_max_position_embeddings / low_freq_factor are stretched by `factor`, those below
    .../high_freq_factor are kept, and between the two the frequency is interpolated.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    inv_freq = 1.0 / (config.rope_theta ** exponent)
    if config.rope_scaling is None:
        return inv_freq
    s = config.rope_scaling
    wavelength = 2 * math.pi / inv_freq
    smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    stretched = inv_freq / s.factor
    between = (1 - smooth) * stretched + smooth * inv_freq
    long = wavelength > s.original_max_position_embeddings / s.low_freq_factor
    short = wavelength < s.original_max_position_embeddings / s.high_freq_factor
    return torch.where(long, stretched, torch.where(short, inv_freq, between))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [B, heads, S, Dh] with cos, sin [S, Dh] (rotate-half form)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] · weightᵀ [..., out] for weight [out, in] in x's dtype, by torch's fastest route for it as stored.

    On a CPU a row or two are fastest as a multiply-and-sum that Inductor fuses, more of them in float32 by oneDNN, not MKL.
    """
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight)
    if rows <= FEW_ROWS and torch.compiler.is_compiling():
        y = [(row.float() * weight.float()).sum(-1) for row in x.view(rows, -1).unbind()]  # one loop over the weight
        return torch.stack(y).to(x.dtype).view(*x.shape[:-1], -1)
    if x.dtype is torch.float32:
        return torch.ops.gavel.onednn_linear(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """`linear` with a weight of its own, without bias; from more than FEW_ROWS rows on by the packed copy, where there is one."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.packed = False

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if (self.packed and x.device.type == "cpu" and not torch.is_grad_enabled()
                and (rows > FEW_ROWS or not torch.compiler.is_compiling())):
            y = torch.ops.gavel.packed_linear(x.reshape(rows, x.shape[-1]), self.weight)
            return y.view(*x.shape[:-1], y.shape[1])
        return linear(x, self.weight)


PACKED = WeakTensorKeyDictionary()  # weight -> (its data, its version, the copy)


def keep_packed(weight: Tensor, dtype: torch.dtype) -> bool:
    """Keep a copy of a weight [out, in] on a CPU, in `dtype` and in oneDNN's order for many rows; False where oneDNN cannot.

    Without it each product of several rows reorders the weight first.
    """
    if weight.is_inference() or not can_pack(dtype):
        return False
    if packed_copy(weight, dtype) is None:
        data = weight.detach()  # kept, so that no other weight comes to lie at its address
        PACKED[weight] = data, weight._version, torch.ops.mkldnn._reorder_linear_weight(data.to(dtype), PACKED_FOR)
    return True


def can_pack(dtype: torch.dtype) -> bool:
    return torch.backends.mkldnn.is_available() and (
        dtype is torch.float32 or dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        or dtype is torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported())


def packed_copy(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The copy, unless the weight was replaced or written to since (what was written through `.data` goes unseen)."""
    data, version, packed = PACKED.get(weight, (None, None, None))
    fits = data is not None and data.data_ptr() == weight.data_ptr() and version == weight._version and packed.dtype is dtype
    return packed if fits else None


def packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, in], weight [out, in] -> x · weightᵀ [R, out] by the packed copy; by the weight itself where that does not fit."""
    packed = packed_copy(weight, x.dtype)
    if packed is None or not len(x):
        return F.linear(x, weight.to(x.dtype))
    return torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), packed, None, "none", [], "")


torch.library.define("gavel::packed_linear", "(Tensor x, Tensor weight) -> Tensor")
torch.library.impl("gavel::packed_linear", "CPU", packed_linear)
torch.library.register_fake("gavel::packed_linear", lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, in], weight [out, in], float32 -> x · weightᵀ [R, out], stored column by column.

    The product is taken as weight · xᵀ, so that oneDNN reorders the small x for its kernels and not the weight.
    """
    if not torch.backends.mkldnn.is_available():
        return (weight @ x.t()).t()
    return torch.ops.mkldnn._linear_pointwise(weight, x.contiguous(), None, "none", [], "").t()


torch.library.define("gavel::onednn_linear", "(Tensor x, Tensor weight) -> Tensor")
torch.library.impl("gavel::onednn_linear", "CPU", onednn_linear)
torch.library.register_fake("gavel::onednn_linear", lambda x, weight: x.new_empty(weight.shape[0], x.shape[0]).t())


def compiled(function):
    """torch.compile of a copy with code of its own: Dynamo looks up all that was ever compiled for one code object."""
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copy, dynamic=False, fullgraph=True)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, the mean square in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class KVCache(nn.Module):
    """Keys and values [B, Hkv, T, Dh] of one layer. Position p lives in row p; rows not yet reached are dead."""

    def __init__(self, batch: int, kv_heads: int, length: int, head_dim: int, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        shape = (batch, kv_heads, length, head_dim)
        self.register_buffer("k", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("v", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("arrivals", torch.zeros(MAX_TILES, dtype=torch.int32, device=device), persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, Hkv, S, Dh] to rows input_pos [S] and return the whole cache of these B sequences."""
        batch = k.shape[0]
        self.k[:batch, :, input_pos] = k
        self.v[:batch, :, input_pos] = v
        return self.k[:batch], self.v[:batch]


class Whole:
    """A process that holds whole models. tp.Shard has the same face, and one rank's part of them."""

    rank, world = 0, 1

    def check_config(self, config: ModelConfig, what: str) -> None:
        """ValueError where such a model cannot be spread over the ranks."""

    def cut(self, source: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """(rows, columns) of a checkpoint's tensor that this rank holds; None: all columns."""
        return (0, shape[0]), None

    def apply(self, model: Transformer, cuts: dict) -> None:
        """Give a model on the meta device this rank's sizes."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' x, side by side along the last dimension."""
        return x

    def agree(self, stop: bool) -> bool:
        """Whether to stop here, as rank 0 says."""
        return stop

    def same(self, tokens: list[int]) -> None:
        """In debugging, RuntimeError unless all ranks have the same tokens."""

    def from_first(self, value: object) -> object:
        """Rank 0's value."""
        return value


WHOLE = Whole()


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, loops: bool = True) -> Tensor:
    """q [B, H, S, Dh], k and v [B, Hkv, T, Dh], mask [S, T] (True: attend) -> [B, H, S, Dh].

    The G query heads that share a key head are folded into the row dimension of the query ([B, Hkv, G·S, Dh]), so that keys
    and values are read once and never repeated. For few such rows on a CPU, `loops` that Inductor fuses take the place of a
    call, which costs a small model more than the work itself.
    """
    B, H, S, Dh = q.shape
    group = H // k.shape[1]
    q, mask = q.reshape(B, k.shape[1], group * S, Dh), mask.repeat(group, 1)
    if (loops and group * S <= 4 and q.device.type == "cpu" and q.dtype is not torch.float64
            and torch.compiler.is_compiling() and not torch.is_grad_enabled()):
        scores = (q[:, :, :, None].float() * k[:, :, None].float()).sum(-1) * Dh**-0.5  # [B, Hkv, G·S, T]
        p = scores.masked_fill(~mask, -math.inf).softmax(-1)
        y = (p[..., None] * v[:, :, None].float()).sum(-2).to(v.dtype)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.reshape(B, H, S, Dh)


def attend_torch(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
    """The reference of attention over a cache: q [B, H, S, Dh], k and v [B, Hkv, T, Dh], input_pos [S] -> [B, H, S, Dh].

    Row s attends to cache rows 0..input_pos[s]; query head h uses key head h // G. Any floating dtype, float64 too.
    """
    return grouped_attention(q, k, v, torch.arange(k.shape[2], device=q.device) <= input_pos[:, None])


def jit(kernel):
    """triton.jit where there is a triton."""
    return triton.jit(kernel) if triton is not None else kernel


@jit
def attend_kernel(out, partial, arrivals, q, stride_qb, stride_qh, stride_qs, k, stride_kb, stride_kh, stride_kt,
                  v, stride_vb, stride_vh, stride_vt, input_pos, kv_heads, group, S, HEAD_DIM: tl.constexpr,
                  SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                  UPCAST: tl.constexpr):
    """out[s, g] = softmax(q[s, g] · kᵀ / √Dh) · v over cache rows 0..input_pos[s], with an online softmax in fp32.

    Grid (B·Hkv, blocks of the G·S query rows of a key head, splits), SPLIT where splits > 1. A tile of rows needs the cache up
    to the last position among them, read from input_pos here; its blocks of BLOCK_N rows are dealt out to the splits in equal
    runs, and splits that get none leave at once. The others write (acc, max, sum) to partial [tiles, splits, BLOCK_M ·
    (BLOCK_D + 2)] and count in arrivals[tile]; the last of them to arrive merges from split 0 on and sets the count back to 0.
    out is [B, S, H, Dh].

    Query rows past G·S repeat row 0 and are not stored; columns past Dh are masked. Cache rows past a tile's last position are
    not read; between a query's own and that one, rows of this very pass, the weight is 0 (times NaN still NaN, as in torch).
    UPCAST: the interpreter multiplies bf16 as raw bits.
    """
    head, block, split, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    b, h = (head // kv_heads).to(tl.int64), head % kv_heads
    row, d, lane = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    stored = (row < group * S)[:, None] & (d < HEAD_DIM)[None, :]
    row = tl.where(row < group * S, row, 0)
    s, query_head = row // group, h * group + row % group  # position by position: a tile of a long chunk ends early
    pos = tl.load(input_pos + s).to(tl.int32)
    length = tl.max(pos) + 1
    blocks = tl.cdiv(length, BLOCK_N)
    steps = tl.cdiv(blocks, splits)
    begin = split * steps * BLOCK_N
    end = tl.minimum(begin + steps * BLOCK_N, length)

    q_rows = q + b * stride_qb + query_head.to(tl.int64) * stride_qh + s.to(tl.int64) * stride_qs
    x = tl.load(q_rows[:, None] + d[None, :], (d < HEAD_DIM)[None, :] & (begin < end), other=0)
    k_block = k + b * stride_kb + h.to(tl.int64) * stride_kh + begin.to(tl.int64) * stride_kt
    v_block = v + b * stride_vb + h.to(tl.int64) * stride_vh + begin.to(tl.int64) * stride_vt
    top = tl.full([BLOCK_M], -3e38, tl.float32)  # finite: a row without a live key in this share has weights exp2(-inf) = 0
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + lane
        kt = tl.load(k_block + (lane[None, :] * stride_kt + d[:, None]),
                     (n < end)[None, :] & (d < HEAD_DIM)[:, None], other=0)  # [BLOCK_D, BLOCK_N]
        w = tl.load(v_block + (lane[:, None] * stride_vt + d[None, :]),
                    (n < end)[:, None] & (d < HEAD_DIM)[None, :], other=0)  # [BLOCK_N, BLOCK_D]; 0 times NaN would be NaN
        if UPCAST:
            x, kt, w = x.to(tl.float32), kt.to(tl.float32), w.to(tl.float32)
        scores = tl.dot(x, kt, input_precision="ieee") * (1.4426950408889634 * HEAD_DIM ** -0.5)  # log2(e) / √Dh
        scores = tl.where(n[None, :] <= pos[:, None], scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p, rescale = tl.exp2(scores - new[:, None]), tl.exp2(top - new)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(w.dtype), w, acc * rescale[:, None], input_precision="ieee")
        top = new
        k_block += BLOCK_N * stride_kt
        v_block += BLOCK_N * stride_vt

    at = out + ((b * S + s) * kv_heads * group + query_head)[:, None] * HEAD_DIM + d[None, :]
    if not SPLIT:
        tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), stored)
    elif begin < end:
        tile, size = head * tl.num_programs(1) + block, BLOCK_M * (BLOCK_D + 2)
        m = tl.arange(0, BLOCK_M)
        share = partial + tile.to(tl.int64) * splits * size
        acc_at, top_at = m[:, None] * BLOCK_D + d[None, :], BLOCK_M * BLOCK_D + m
        tl.store(share + split * size + acc_at, acc)
        tl.store(share + split * size + top_at, top)
        tl.store(share + split * size + top_at + BLOCK_M, total)
        tl.debug_barrier()  # all of it is stored before this program counts as arrived
        shares = tl.cdiv(blocks, steps)
        if tl.atomic_add(arrivals + tile, 1) == shares - 1:
            top = tl.full([BLOCK_M], -3e38, tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for i in tl.range(0, shares, loop_unroll_factor=2):  # loads in flight
                top_i = tl.load(share + i * size + top_at, cache_modifier=".cg")
                new = tl.maximum(top, top_i)
                old, add = tl.exp2(top - new), tl.exp2(top_i - new)
                total = total * old + tl.load(share + i * size + top_at + BLOCK_M, cache_modifier=".cg") * add
                acc = acc * old[:, None] + tl.load(share + i * size + acc_at, cache_modifier=".cg") * add[:, None]
                top = new
            tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), stored)
            tl.store(arrivals + tile, 0)


INTERPRETED = triton is not None and not isinstance(attend_kernel, triton.JITFunction)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def attend_options(rows: int, heads: int, T: int, head_dim: int, itemsize: int, processors: int) -> dict[str, int]:
    """Block sizes and splits for `rows` = G·S query rows on each of `heads` = B·Hkv key heads: of shapes and the chip alone.

    Tensor cores want 16 rows, and 64 once there are as many; float32 multiplies without them, in registers, hence its small
    tiles. No register spills at Dh 64 and 128 (scripts/aot.py; 128 rows would, with 8 warps).
    Splits give each multiprocessor one program, as 8 key heads at batch 1 would leave most idle; but one program reads
    T / SPLITS rows of k and v, and the last one SPLITS · BLOCK_M rows in float32 as well, a sum that is smallest at the root
    below. A model, not yet measured on a device.
    """
    half, block_d = itemsize < 4, max(16, 1 << (head_dim - 1).bit_length())
    block_m = 16 if rows <= 16 or not half else 32 if rows <= 32 else 64
    block_n = 64 if half else 32 if block_d <= 64 else 16
    tiles = heads * -(-rows // block_m)
    splits = min(processors // tiles, -(-T // block_n), round(math.sqrt(T * itemsize / (2 * block_m))))
    return {"SPLITS": max(1, splits) if tiles <= MAX_TILES else 1, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d,
            "num_warps": 8 if block_m * block_d >= (8192 if half else 2048) else 4, "num_stages": 2}


def attend_triton(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, arrivals: Tensor) -> Tensor:
    """attend_torch by the kernel, in bf16, fp16 or fp32; any strides. input_pos ascends and stays below T.

    arrivals: int32 [MAX_TILES] zeros, and zeros again afterwards; not to be shared by streams that run at once. The result
    [B, H, S, Dh] is stored as [B, S, H, Dh]: the output projection reads it as it lies.
    """
    if triton is None or not (q.is_cuda or INTERPRETED):
        raise ValueError(f"impl='triton': got {'no triton package' if triton is None else f'tensors on {q.device}'}, expected "
                         "triton and a GPU; use impl='torch' (to test: TRITON_INTERPRET=1 before the import)")
    (B, H, S, Dh), (kv_heads, T) = q.shape, k.shape[1:3]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(B, S, H, Dh, dtype=q.dtype, device=q.device)
    rows = H // kv_heads * S
    options = attend_options(rows, B * kv_heads, T, Dh, q.element_size(), multiprocessors(q.device))
    grid = B * kv_heads, -(-rows // options["BLOCK_M"]), options["SPLITS"]
    split = options.pop("SPLITS") > 1
    size = math.prod(grid) * options["BLOCK_M"] * (options["BLOCK_D"] + 2) if split else 1
    partial = torch.empty(size, dtype=torch.float32, device=q.device)
    attend_kernel[grid](out, partial, arrivals, q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], input_pos, kv_heads,
                        H // kv_heads, S, HEAD_DIM=Dh, SPLIT=split, UPCAST=INTERPRETED, **options)
    return out.transpose(1, 2)


torch.library.define("gavel::attend", "(Tensor q, Tensor k, Tensor v, Tensor input_pos, Tensor arrivals) -> Tensor")
torch.library.impl("gavel::attend", ("CPU", "CUDA"), attend_triton)
torch.library.register_fake(
    "gavel::attend", lambda q, k, v, input_pos, arrivals: q.new_empty(q.transpose(1, 2).shape).transpose(1, 2))


class Attention(nn.Module):
    """Grouped-query attention.

    impl, where there is a cache: 'triton' (CUDA: `attend_triton`) or 'torch' (masked, over the whole cache); by default the
    device's own. None replaces another.
    """

    def __init__(self, config: ModelConfig, *, impl: str | None = None):
        super().__init__()
        if impl not in (None, "triton", "torch"):
            raise ValueError(f"got impl {impl!r}, expected 'triton' or 'torch'")
        self.impl = impl
        self.head_dim, self.shard = config.head_dim, WHOLE
        self.qkv_proj = Linear(config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * self.head_dim)
        self.o_proj = Linear(config.num_heads * self.head_dim, config.hidden_size)
        self.cache: KVCache | None = None

    # From the weights, which may be one rank's part.
    heads = property(lambda self: self.o_proj.weight.shape[1] // self.head_dim)
    kv_heads = property(lambda self: (self.qkv_proj.weight.shape[0] // self.head_dim - self.heads) // 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, input_pos: Tensor | None) -> Tensor:
        B, S, _ = x.shape
        qkv = self.qkv_proj(x).view(B, S, -1, self.head_dim).transpose(1, 2)  # [B, H + 2·Hkv, S, Dh]
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if input_pos is not None:
            k, v = self.cache.update(input_pos, k, v)  # [B, Hkv, T, Dh]
        if input_pos is not None and (self.impl or ("triton" if x.is_cuda else "torch")) == "triton":
            y = torch.ops.gavel.attend(q, k, v, input_pos, self.cache.arrivals)
        else:
            used = mask.shape[1]
            y = grouped_attention(q, k[:, :, :used], v[:, :, :used], mask, loops=k.shape[2] <= MAX_LOOP_ROWS)
        y = y.transpose(1, 2).reshape(B, S, -1)
        return self.shard.all_reduce(self.o_proj(y))


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        self.shard = WHOLE

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.shard.all_reduce(self.down_proj(F.silu(gate) * up))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, input_pos: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, input_pos)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Llama: tokens in, hidden states before the final norm out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.shard: Whole = WHOLE
        self.run_block, self.run_head = Block.forward, head  # compile_parts replaces them
        self.register_buffer("first_token", torch.zeros((), dtype=torch.int64), persistent=False)  # of this rank's vocabulary
        self.max_seq_length = self.caches_made = 0
        self.cached: list[int] = []  # tokens whose rows in the caches are right; kept by who runs the model

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
                        shard: Whole = WHOLE, progress: Callable[[int, int], None] | None = None) -> Transformer:
        """Load a Hugging Face directory as downloaded; dtype defaults to the one that its config names.

        Of a model that is spread over ranks (tp.py) only this rank's part is read. progress(bytes read, bytes in all) is
        called as reading goes on. Every tensor's presence and shape is checked before the first byte of a weight is read.
        Raises FileNotFoundError or ValueError (not a directory, no config, not Llama, missing shard or tensor,
        contradicting shape, pickles, a number of ranks that does not divide the model).
        """
        config = ModelConfig.from_checkpoint(path)
        shard.check_config(config, str(path))
        checkpoint = Checkpoint(path)
        with torch.device("meta"):
            model = cls(config).to(dtype or config.dtype)
        if config.int8:
            from quantize import int8_layers, unpack  # here, as that module imports this one

            int8_layers(model, checkpoint)
        sources = {name: checkpoint_names(name, config, int8=p.dtype is torch.int8) for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            check_shapes(checkpoint, sources[name], name, parameter, config)
        cuts = {name: [shard.cut(source, checkpoint.info(source).shape, config) for source in names]
                for name, names in sources.items()}
        shard.apply(model, cuts)
        model = model.to_empty(device=device)
        if config.tie_word_embeddings:  # to_empty unties
            model.lm_head.weight = model.embed_tokens.weight
        done, total = 0, sum(p.nbytes for p in model.parameters())
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.zero_()
            model.first_token.fill_(shard.rank * model.embed_tokens.weight.shape[0])
            for name, parameter in model.named_parameters():
                row = 0
                for source, (taken, columns) in zip(sources[name], cuts[name]):
                    for start, rows in checkpoint.chunks(source, rows=taken, columns=columns):
                        if parameter.dtype is torch.int8:
                            rows = unpack(rows, parameter.shape[1])
                        part = parameter[row + start:row + start + rows.shape[0]]
                        part.copy_(rows.view(part.shape))
                        done += part.nbytes
                        if progress:
                            progress(done, total)
                    row += taken[1] - taken[0]
        model.bytes_read = checkpoint.bytes_read
        return model.requires_grad_(False).eval()

    device = property(lambda self: self.embed_tokens.weight.device)
    dtype = property(lambda self: self.norm.weight.dtype)

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        """Allocate caches and position tables for positions 0..max_seq_length-1 (RoPE angles in float32)."""
        config, device = self.config, self.device
        for layer in self.layers:
            layer.self_attn.cache = KVCache(max_batch_size, layer.self_attn.kv_heads, max_seq_length, config.head_dim,
                                            dtype=self.dtype, device=device)
        cos, sin = rope_tables(config, max_seq_length, self.dtype, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("rows", torch.arange(max_seq_length, device=device), persistent=False)
        self.max_seq_length, self.cached, self.caches_made = max_seq_length, [], self.caches_made + 1

    def compile_parts(self) -> None:
        """Compile one block, which all layers share as they differ in data alone, and the way to the logits."""
        if self.run_block is Block.forward:
            self.run_block, self.run_head = map(compiled, (Block.forward, head))

    @contextlib.contextmanager
    def uncompiled_parts(self) -> Iterator[None]:
        """Within it passes run uncompiled: for lengths that come once each."""
        parts, (self.run_block, self.run_head) = (self.run_block, self.run_head), (Block.forward, head)
        try:
            yield
        finally:
            self.run_block, self.run_head = parts

    def pack(self) -> None:
        """Keep packed copies of a CPU model's linear layers (see keep_packed), if all of them take MAX_PACKED_BYTES at most."""
        layers = [layer for layer in self.modules() if hasattr(layer, "packed")]
        fits = sum(layer.weight.numel() for layer in layers) * self.dtype.itemsize <= MAX_PACKED_BYTES
        for layer in layers:
            layer.packed = self.device.type == "cpu" and fits and keep_packed(layer.weight, self.dtype)

    def clear_caches(self) -> None:
        """Forget everything, NaN and infinity in dead rows too."""
        for layer in self.layers:
            layer.self_attn.cache.k.zero_()
            layer.self_attn.cache.v.zero_()
        self.cached = []

    def forward(self, tokens: Tensor, input_pos: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """tokens [B, S] int64 at positions input_pos [S] int64 -> hidden [B, S, D], before the final norm.

        Row s attends to cache rows 0..input_pos[s], its own included. `rows`, a beginning of self.rows that reaches to the
        last position at least, bounds what attention reads (default: the whole cache). Without input_pos no cache is read or
        written: causal attention over the S tokens alone (training, scoring), differentiable.
        """
        if input_pos is None:
            S = tokens.shape[1]
            cos, sin = rope_tables(self.config, S, self.dtype, tokens.device)
            mask = torch.ones(S, S, dtype=torch.bool, device=tokens.device).tril()
        else:
            cos, sin = self.cos[input_pos], self.sin[input_pos]
            mask = (self.rows if rows is None else rows) <= input_pos[:, None]  # [S, T]
        x = self.embed(tokens)
        for layer in self.layers:
            x = self.run_block(layer, x, cos, sin, mask, input_pos)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] -> [B, S, D]; over ranks each one looks up its part of the vocabulary, and zeros elsewhere."""
        if self.shard.world == 1:
            return self.embed_tokens(tokens)
        local, size = tokens - self.first_token, self.embed_tokens.weight.shape[0]
        elsewhere = (local < 0) | (local >= size)
        return self.shard.all_reduce(self.embed_tokens(local.clamp(0, size - 1)).masked_fill(elsewhere[..., None], 0))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] before the final norm -> logits [..., V] in the model's dtype (V: of this rank)."""
        return self.run_head(self.norm, self.lm_head, hidden)


def head(norm: RMSNorm, lm_head: nn.Module, hidden: Tensor) -> Tensor:
    return lm_head(norm(hidden))


def rope_tables(config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, Dh], computed in float32 and then rounded to `dtype`."""
    angles = torch.arange(length, device=device).float()[:, None] * rope_inv_freq(config, device)[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def checkpoint_names(parameter: str, config: ModelConfig, *, int8: bool = False) -> list[str]:
    """The checkpoint's tensors that one parameter of ours is read from, in the order of its rows."""
    if int8:
        parameter += "_packed"
    parameter = parameter.removesuffix(".scale") + ".weight_scale" if parameter.endswith(".scale") else parameter
    if parameter.startswith("lm_head."):
        return [parameter]
    for ours, theirs in STACKED.items():
        if ours in parameter:
            return ["model." + parameter.replace(ours, name) for name in theirs]
    return ["model." + parameter]


def check_shapes(checkpoint: Checkpoint, sources: list[str], name: str, parameter: Tensor, config: ModelConfig) -> None:
    """ValueError where the tensors that make up `parameter` are missing or contradict config.json."""
    head_dim = config.head_dim
    rows = {"q_proj": config.num_heads * head_dim, "k_proj": config.num_kv_heads * head_dim,
            "v_proj": config.num_kv_heads * head_dim, "gate_proj": config.intermediate_size,
            "up_proj": config.intermediate_size}
    for source in sources:
        info = checkpoint.info(source)
        out = rows.get(source.split(".")[-2], parameter.shape[0])
        expected, kinds = (out, *parameter.shape[1:]), tuple(DTYPES.values())
        if source.endswith(".weight_packed"):
            stated = tuple(checkpoint.read(source.replace("_packed", "_shape")).tolist())
            if stated != expected:
                raise ValueError(f"{checkpoint.path}: got weight_shape {list(stated)} beside {source}, expected {list(expected)} "
                                 "by config.json. Weights and config are of different models: download both again.")
            expected, kinds = (out, -(-expected[1] // 4)), (torch.int32,)
        elif source.endswith(".weight_scale"):
            expected = (out, 1)
        if info.shape != expected:
            raise ValueError(f"{checkpoint.path}: got shape {list(info.shape)} for {source}, expected {list(expected)} by "
                             "config.json. Weights and config are of different models: download both again.")
        if info.dtype not in kinds:
            raise ValueError(f"{checkpoint.path}: got dtype {info.dtype} for {source}, expected "
                             f"{' or '.join(map(str, kinds))}; download the checkpoint as published.".replace("torch.", ""))
