"""The Llama-3.1 transformer with a static key-value cache, and how its weights are loaded.

One forward pass returns *hidden states before the final norm*, so that the judge head and the LM
head share it: `model(tokens, input_pos)` gives hidden, `model.logits(hidden)` gives logits. Every
shape is known when the model is compiled, position p is written to cache row p, and rows past the
committed position are dead until they are overwritten.

q, k and v are read from three tensors into one matrix, and so are gate and up: at batch 1 a step is
a handful of matrix-vector products, and fewer, larger ones run closer to the memory limit. Over
ranks (tp.py) a layer is built with this rank's sizes and reads its own slices.

Shapes: B batch, S new tokens, T cache length, H query heads, Hkv key-value heads, Dh head dim, D
model dim, F feed-forward dim, V vocabulary; H, Hkv, F and V are one rank's.

    model = Transformer.from_checkpoint("Llama-3.1-8B-Instruct", device="cuda")
    model.setup_caches(max_batch_size=1, max_seq_length=4096)
    hidden = model(tokens, input_pos)          # [1, S] int64, [S] int64 -> [1, S, D]
    logits = model.logits(hidden)              # [1, S, V]

Sources: Llama 3 (arXiv 2407.21783), RoPE (2104.09864) in the rotate-half form that Hugging Face
weights are laid out for. No biases, no RoPE variants but Llama's, no other architecture.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import KVCache, grouped_attention
from checkpoint import Checkpoint, ModelConfig, check_shapes, tensor_names
from quantize import Int8Linear, unpack
from tp import Shard


def compiled(function):
    """torch.compile of a copy: Dynamo searches all graphs that share a code object."""
    code, scope = function.__code__.replace(), function.__globals__
    copy = FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copy, dynamic=False, fullgraph=True)


def rope_inv_freq(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Inverse frequencies [Dh/2] in float32, scaled as Llama 3.1 does it.

    Wavelengths beyond original_max_position_embeddings / low_freq_factor are stretched by `factor`,
    those below .../high_freq_factor are kept, and between the two the frequency is interpolated.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float()
    inv_freq = 1.0 / (config.rope_theta ** (exponent / config.head_dim))
    if config.rope_scaling is None:
        return inv_freq
    s = config.rope_scaling
    original, wavelength = s.original_max_position_embeddings, 2 * math.pi / inv_freq
    smooth = (original / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    stretched = inv_freq / s.factor
    between = (1 - smooth) * stretched + smooth * inv_freq
    long = wavelength > original / s.low_freq_factor
    short = wavelength < original / s.high_freq_factor
    return torch.where(long, stretched, torch.where(short, inv_freq, between))


def rope_tables(config: ModelConfig, length: int, dtype: torch.dtype,
                device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, Dh], computed in float32 and then rounded to `dtype`."""
    angles = torch.arange(length, device=device).float()[:, None] * rope_inv_freq(config, device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [B, heads, S, Dh] with cos, sin [S, Dh] (rotate-half form)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, the mean square in float32 (arXiv
    1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention over a cache, or over the tokens at hand."""

    def __init__(self, config: ModelConfig, shard: Shard):
        super().__init__()
        D, self.head_dim, self.shard = config.hidden_size, config.head_dim, shard
        self.heads, self.kv_heads = shard.heads(config)
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(D, rows, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, D, bias=False)
        self.cache: KVCache | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None,
                input_pos: Tensor | None) -> Tensor:
        B, S, _ = x.shape
        # [B, H + 2·Hkv, S, Dh]
        qkv = self.qkv_proj(x).view(B, S, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if input_pos is not None:
            k, v = self.cache.update(input_pos, k, v)  # [B, Hkv, T, Dh]
        y = self.attend(q, k, v, mask, input_pos)  # [B, H, S, Dh]
        return self.shard.all_reduce(self.o_proj(y.transpose(1, 2).reshape(B, S, -1)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               input_pos: Tensor | None) -> Tensor:
        """By the kernel, which learns from input_pos what to read, or by the mask [S, rows]."""
        if mask is None:
            return torch.ops.gavel.attend(q, k, v, input_pos, self.cache.arrivals)
        used = mask.shape[1]
        return grouped_attention(q, k[:, :, :used], v[:, :, :used], mask)


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, shard: Shard):
        super().__init__()
        width, self.shard = config.intermediate_size // shard.world, shard
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # [B, S, F] each
        return self.shard.all_reduce(self.down_proj(F.silu(gate) * up))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, shard: Shard):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, shard)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config, shard)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None,
                input_pos: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, input_pos)
        return x + self.mlp(self.post_attention_layernorm(x))


def head(norm: RMSNorm, lm_head: nn.Module, hidden: Tensor) -> Tensor:
    return lm_head(norm(hidden))


class Transformer(nn.Module):
    """Llama: tokens in, hidden states before the final norm out."""

    def __init__(self, config: ModelConfig, shard: Shard | None = None):
        super().__init__()
        self.config, self.shard = config, shard or Shard()
        D, V = config.hidden_size, config.vocab_size // self.shard.world
        self.embed_tokens = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Block(config, self.shard) for _ in range(config.num_layers))
        self.norm = RMSNorm(D, config.rms_norm_eps)
        self.lm_head = nn.Linear(D, V, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.run_block, self.run_head = Block.forward, head  # compile_parts replaces them
        # also where a meta device is current
        first = torch.tensor(self.shard.rank * V, device="cpu")
        self.register_buffer("first_token", first, persistent=False)  # of this rank's vocabulary
        self.max_seq_length = self.caches_made = 0
        self.cached: list[int] = []  # tokens whose cache rows are right; kept by who runs the model

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: torch.device | str = "cpu",
                        dtype: torch.dtype | None = None, shard: Shard | None = None,
                        progress: Callable[[int, int], None] | None = None) -> Transformer:
        """Load a Hugging Face directory as downloaded; dtype defaults to the one its config names.

        Of a model that is spread over ranks only this rank's part is read. progress(bytes read,
        bytes in all) is called as reading goes on. Every tensor's presence and shape is checked
        before the first byte of a weight is read. Raises FileNotFoundError or ValueError (not a
        directory, no config, not Llama, missing shard or tensor, contradicting shape, pickles).
        """
        config, shard = ModelConfig.from_checkpoint(path), shard or Shard()
        checkpoint = Checkpoint(path)
        with torch.device("meta"):
            whole, model = (cls(config, part).to(dtype or config.dtype) for part in (Shard(),
                                                                                     shard))
        for each in (whole, model):
            int8_layers(each, checkpoint)
        sources = {name: tensor_names(name, int8=parameter.dtype is torch.int8)
                   for name, parameter in whole.named_parameters()}
        for name, parameter in whole.named_parameters():
            check_shapes(checkpoint, sources[name], parameter, config)
        model = model.to_empty(device=device)
        if config.tie_word_embeddings:  # to_empty unties
            model.lm_head.weight = model.embed_tokens.weight
        for buffer in model.buffers():
            buffer.zero_()
        model.first_token.fill_(shard.rank * model.embed_tokens.weight.shape[0])
        model.requires_grad_(False).eval().load(checkpoint, sources, progress or (lambda *_: None))
        return model

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint, sources: dict[str, list[str]], progress) -> None:
        """Fill each parameter from this rank's part of the tensors that `sources` names."""
        done, total = 0, sum(parameter.nbytes for parameter in self.parameters())
        for name, parameter in self.named_parameters():
            row = 0
            for source in sources[name]:
                taken, columns = self.shard.cut(source, checkpoint.info(source).shape, self.config)
                for start, rows in checkpoint.chunks(source, rows=taken, columns=columns):
                    if parameter.dtype is torch.int8:
                        rows = unpack(rows, parameter.shape[1])
                    part = parameter[row + start:row + start + rows.shape[0]]
                    part.copy_(rows.view(part.shape))
                    done += part.nbytes
                    progress(done, total)
                row += taken[1] - taken[0]
        self.bytes_read = checkpoint.bytes_read

    device = property(lambda self: self.embed_tokens.weight.device)
    dtype = property(lambda self: self.norm.weight.dtype)

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        """Allocate caches, and RoPE's tables, for positions 0..max_seq_length-1."""
        config, device = self.config, self.device
        for layer in self.layers:
            layer.self_attn.cache = KVCache(max_batch_size, layer.self_attn.kv_heads,
                                            max_seq_length, config.head_dim, dtype=self.dtype,
                                            device=device)
        cos, sin = rope_tables(config, max_seq_length, self.dtype, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("rows", torch.arange(max_seq_length, device=device), persistent=False)
        self.max_seq_length, self.cached = max_seq_length, []
        self.caches_made += 1

    def clear_caches(self) -> None:
        """Forget everything, NaN and infinity in dead rows too."""
        for layer in self.layers:
            layer.self_attn.cache.k.zero_()
            layer.self_attn.cache.v.zero_()
        self.cached = []

    def compile_parts(self) -> None:
        """Compile one block, which all layers share as they differ in data alone, and the head."""
        if self.run_block is Block.forward:
            self.run_block, self.run_head = map(compiled, (Block.forward, head))

    @contextlib.contextmanager
    def uncompiled_parts(self) -> Iterator[None]:
        """Within it passes run uncompiled: for lengths that come once each."""
        parts, (self.run_block, self.run_head) = (self.run_block, self.run_head), (Block.forward,
                                                                                   head)
        try:
            yield
        finally:
            self.run_block, self.run_head = parts

    def forward(self, tokens: Tensor, input_pos: Tensor | None = None,
                rows: Tensor | None = None) -> Tensor:
        """tokens [B, S] int64 at positions input_pos [S] int64 -> hidden [B, S, D], before the
        final norm.

        Row s attends to cache rows 0..input_pos[s], its own included. `rows`, a beginning of
        self.rows that reaches to the last position at least, bounds what masked attention reads
        (default: the whole cache). Without input_pos no cache is read or written: causal attention
        over the S tokens alone (training, scoring), differentiable.
        """
        if input_pos is None:
            S = tokens.shape[1]
            cos, sin = rope_tables(self.config, S, self.dtype, tokens.device)
            mask = torch.ones(S, S, dtype=torch.bool, device=tokens.device).tril()
        else:
            cos, sin = self.cos[input_pos], self.sin[input_pos]  # [S, Dh]
            rows = self.rows if rows is None else rows
            mask = None if tokens.is_cuda else rows <= input_pos[:, None]  # [S, rows]
        x = self.embed(tokens)
        for layer in self.layers:
            x = self.run_block(layer, x, cos, sin, mask, input_pos)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] -> [B, S, D]; each rank looks up its part of the vocabulary."""
        if self.shard.world == 1:
            return self.embed_tokens(tokens)
        local, size = tokens - self.first_token, self.embed_tokens.weight.shape[0]
        elsewhere = (local < 0) | (local >= size)
        found = self.embed_tokens(local.clamp(0, size - 1)).masked_fill(elsewhere[..., None], 0)
        return self.shard.all_reduce(found)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] before the final norm -> logits [..., V] in the model's dtype."""
        return self.run_head(self.norm, self.lm_head, hidden)


def int8_layers(model: Transformer, checkpoint: Checkpoint) -> None:
    """Put an Int8Linear where `checkpoint` holds a layer's weights in int8 (on the meta device).

    ValueError where layers that gavel stacks are not all int8, or a layer holds what is not known.
    """
    if not model.config.int8:
        return
    for name, layer in list(model.named_modules()):
        if not isinstance(layer,
                          nn.Linear) or name == "lm_head" and model.config.tie_word_embeddings:
            continue
        names = tensor_names(f"{name}.weight")
        sources = [source.removesuffix(".weight") for source in names]
        packed = [source for source in sources
                  if f"{source}.weight_packed" in checkpoint.weight_map]
        if packed and packed != sources:
            raise ValueError(f"{checkpoint.path}: got int8 for {', '.join(packed)} alone, expected "
                             f"it for all of {', '.join(sources)}, which gavel reads as one "
                             "matrix; quantise all or none of them")
        for source in packed:
            for extra in ("weight_zero_point", "weight_g_idx", "weight_global_scale",
                          "input_scale"):
                if f"{source}.{extra}" in checkpoint.weight_map:
                    raise ValueError(f"{checkpoint.path}: got {source}.{extra}, expected "
                                     "weight_packed, weight_scale and weight_shape alone "
                                     "(symmetric, 8 bits, one scale a channel); take such a "
                                     "checkpoint")
        if packed:
            parent, _, child = name.rpartition(".")
            scale_dtype = checkpoint.info(f"{sources[0]}.weight_scale").dtype
            with torch.device("meta"):
                int8 = Int8Linear(layer.in_features, layer.out_features, scale_dtype=scale_dtype)
            setattr(model.get_submodule(parent), child, int8)
