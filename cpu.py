"""What makes a model fast on a CPU; a reader of the GPU path never opens this file.

A CPU multiplies where a GPU waits for memory, so the route counts. `prepare(model)` gives each
linear layer the fastest for its rows: for one or two, a multiply-and-sum that Inductor fuses into
one loop over the weight; for more, a copy of the weight in oneDNN's own order, as else each product
reorders it first. int8 layers keep no copy: for few rows torch's int8 product is the fastest, for
more the weight is converted and multiplied. `Step` compiles whole steps, not blocks, and bounds
attention by the cache rows in use, a dynamic size, so that no length compiles anew.

    cpu.prepare(model)
    step = cpu.Step(next_token, compile=True)
    step(model, tokens, input_pos)      # next_token(model, tokens, input_pos, rows=the rows in use)

Shapes: R rows of x, S tokens. Threads and NUMA are torch's own settings.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from model import Transformer, compiled
from quantize import Int8Linear

# up to here a multiply-and-sum is the fastest linear layer; for 4 rows a packed copy is
FEW_ROWS = 2
INT8_ROWS = 12  # bfloat16: up to here _weight_int8pack_mm is the fastest int8 layer
MAX_PACKED_BYTES = 4 << 30  # of a model's weights that are kept a second time
PACKED_FOR = 16  # rows; oneDNN picks the same order for 1 to 128
ROW_STEP = 64  # attention reads the cache in use, rounded up to this
# a shorter chunk runs uncompiled: its layers take other routes, compiled anew
PREFILL_COMPILED = 16
PACKED = WeakTensorKeyDictionary()  # weight -> (its data, its version, the copy)


def prepare(model: Transformer) -> None:
    """Make a model's layers fast, if it is on a CPU."""
    if model.device.type != "cpu":
        return
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    fits = sum(layer.weight.numel() for layer in layers) * model.dtype.itemsize <= MAX_PACKED_BYTES
    for layer in layers:
        layer.__class__ = CpuLinear
        layer.packed = fits and keep_packed(layer.weight, model.dtype)
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.__class__ = CpuInt8Linear


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, in] · weightᵀ [R, out] in float32, compiled into one loop over the weight."""
    return torch.stack([(row.float() * weight.float()).sum(-1) for row in x.unbind()])


class CpuLinear(nn.Linear):
    """nn.Linear without bias by the fastest route for x's rows."""

    packed = False

    def forward(self, x: Tensor) -> Tensor:
        rows, learns = x.reshape(-1, x.shape[-1]), torch.is_grad_enabled()
        if rows.shape[0] <= FEW_ROWS and torch.compiler.is_compiling() and not learns:
            y = few_rows(rows, self.weight).to(x.dtype)
        elif self.packed and not learns:
            y = torch.ops.gavel.packed_linear(rows, self.weight)
        else:
            y = F.linear(rows, self.weight)
        return y.view(*x.shape[:-1], y.shape[-1])  # no rows, too


class CpuInt8Linear(Int8Linear):
    """Int8Linear by the fastest route for x's rows and dtype."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # torch's product reads 16 inputs at once, past the end of what is no multiple of them
        whole = rows.shape[1] % 16 == 0
        if x.dtype is self.scale.dtype is torch.bfloat16 and rows.shape[0] <= INT8_ROWS and whole:
            y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale)
        elif rows.shape[0] <= FEW_ROWS and torch.compiler.is_compiling():
            y = (few_rows(rows, self.weight) * self.scale).to(x.dtype)
        else:  # int8 to bfloat16 is exact
            y = (F.linear(rows, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])  # no rows, too


def keep_packed(weight: Tensor, dtype: torch.dtype) -> bool:
    """Keep a copy of weight [out, in] in `dtype`, in oneDNN's order; False where it cannot."""
    if weight.is_inference() or not can_pack(dtype):
        return False
    if packed_copy(weight, dtype) is None:
        data = weight.detach()  # kept, so that no other weight comes to lie at its address
        packed = torch.ops.mkldnn._reorder_linear_weight(data.to(dtype), PACKED_FOR)
        PACKED[weight] = data, weight._version, packed
    return True


def can_pack(dtype: torch.dtype) -> bool:
    supported = {torch.float32: lambda: True,
                 torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
                 torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported}
    return torch.backends.mkldnn.is_available() and dtype in supported and supported[dtype]()


def packed_copy(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The copy, unless the weight was replaced or written to since (`.data` goes unseen)."""
    data, version, packed = PACKED.get(weight, (None, None, None))
    same = data is not None and data.data_ptr() == weight.data_ptr() and version == weight._version
    return packed if same and packed.dtype is dtype else None


def packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, in] · weightᵀ [R, out] by the packed copy, or by the weight where none fits."""
    packed = packed_copy(weight, x.dtype)
    if packed is None or not len(x):
        return F.linear(x, weight.to(x.dtype))
    return torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), packed, None, "none", [], "")


torch.library.define("gavel::packed_linear", "(Tensor x, Tensor weight) -> Tensor")
torch.library.impl("gavel::packed_linear", "CPU", packed_linear)
torch.library.register_fake("gavel::packed_linear",
                            lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))


class Step:
    """`function(model, tokens [1, S], input_pos [S], …)`, attention bounded to the rows in use.

    dynamic: S varies from call to call (prefill). `steps`: positions that it writes, the last on.
    """

    def __init__(self, function: Callable, *, compile: bool, dynamic: bool = False):
        self.plain, self.compile, self.dynamic = function, compile, dynamic
        self.run = compiled(function) if compile else function
        self.views: dict[tuple, Tensor] = {}  # beginnings of model.rows

    def __call__(self, model: Transformer, tokens: Tensor, input_pos: Tensor, *args, **options):
        end, longest = int(input_pos[-1]) + options.get("steps", 1), model.max_seq_length - 1
        run, key = self.run, (id(model), model.caches_made, -(-end // ROW_STEP) * ROW_STEP)
        if key not in self.views:
            self.views[key] = model.rows[:min(key[-1], longest)]  # never the whole: it is dynamic
            if self.compile:  # else Dynamo need not be imported
                torch._dynamo.mark_dynamic(self.views[key], 0, min=2, max=longest)
        if self.dynamic and tokens.shape[1] < PREFILL_COMPILED:
            run = self.plain
        elif self.dynamic and self.compile:
            torch._dynamo.mark_dynamic(tokens, 1, min=PREFILL_COMPILED, max=longest)
            torch._dynamo.mark_dynamic(input_pos, 0, min=PREFILL_COMPILED, max=longest)
        return run(model, tokens, input_pos, *args, rows=self.views[key], **options)


def can_compile(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None where it can."""
    if device.type != "cpu":
        return None
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler ({' or '.join(compilers)}) found"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python.h found (it is in python3-dev)"
    return None
