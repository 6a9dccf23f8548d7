"""Build Triton kernels ahead of time, as they are launched at real sizes, without a GPU; report registers and spills.

A launch is recorded and not run: the module's kernels are replaced by recorders, its launcher is called with tensors of
real shapes (on the meta device: no memory), and each recorded call is compiled with the signature, the divisibility by
16 and the warps of that call. NVIDIA's registers and spills are read by the cuobjdump that Triton carries, AMD's from
the assembly. It needs a process without TRITON_INTERPRET.

    python scripts/aot.py --target sm_90                      # judge.py, every variant; one JSON line a kernel
    python scripts/aot.py --module quantize                   # the int8 layer, every set of block sizes
    python scripts/aot.py --module attention                  # attention over the cache
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8", torch.int32: "i32",
         torch.int64: "i64"}


class Recorder:
    """Stands where a kernel stood; kernel[grid](...) appends (kernel, grid, args, options) to `calls`."""

    def __init__(self, kernel, calls: list):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((self.kernel, grid, args, options))


def record(module, run) -> list:
    """The launches that `run()` makes of `module`'s kernels, as (kernel, grid, args, options); nothing is executed."""
    import triton

    calls: list = []
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, Recorder(kernel, calls))
        run()
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return calls


def build(kernel, args: tuple, options: dict, target: str) -> dict:
    """Compile one recorded launch for a key of TARGETS: {"registers", "spills", "shared"} (spills in bytes; AMD: registers)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(options)
    compile_options = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constexprs, attrs = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attrs[(i,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=compile_options)
    if target.startswith("sm_"):
        registers, spills = cubin_usage(compiled.asm["cubin"])
    else:
        registers, spills = amd_usage(compiled.asm["amdgcn"])
    return {"registers": registers, "spills": spills, "shared": compiled.metadata.shared}


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread) of a cubin with one kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers a thread, those spilled to memory) from AMD assembly; spilled scalars go to vector lanes."""
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly))
    return int(found["vgpr_count"]), int(found["vgpr_spill_count"])


def judge_launches(K: int, V: int, D: int) -> dict[str, tuple]:
    """Every distinct launch of judge.py by name: dtype x (greedy, sampled, top-k) x (with and without head)."""
    import judge

    judge.INTERPRETED = True  # meta tensors pass as the interpreter's would
    head = judge.JudgeHead(torch.zeros(1, D), torch.zeros(1), {"threshold": "0.5"}).to("meta")
    launches = {}
    for name, dtype in DTYPES.items():
        for rule, top_k in (("greedy", None), ("sampled", None), ("top_k", 50)):
            for with_head in (False, True):
                kept = judge.Judge(head) if with_head else judge.Exact()

                def run(dtype=dtype, rule=rule, top_k=top_k, kept=kept):
                    f = {"dtype": torch.float32, "device": "meta"}
                    sampling = {} if rule == "greedy" else {
                        "temperature": torch.empty((), **f), "top_k": top_k, "draft_probs": torch.empty(K, V, **f),
                        "uniforms": torch.empty(K, **f), "exponentials": torch.empty(V, **f)}
                    judge.accept_triton(
                        torch.empty(K + 1, D, dtype=dtype, device="meta"),
                        torch.empty(K + 1, V, dtype=dtype, device="meta"),
                        torch.empty(K, dtype=torch.int64, device="meta"), rule=kept,
                        threshold=torch.empty((), **f),
                        stop_tokens=torch.empty(3, dtype=torch.int64, device="meta"), **sampling)
                for kernel, grid, args, options in record(judge, run):
                    types = "-".join(TYPES[a.dtype] if isinstance(a, torch.Tensor) else str(a) for a in args)
                    key = (kernel.__name__, types, str(sorted(options.items())))
                    launches.setdefault(key, (f"{kernel.__name__} {name} {rule}{' head' if with_head else ''}",
                                              kernel, grid, args, options))
    return {launch[0]: launch[1:] for launch in launches.values()}


def quantize_launches(target: str) -> dict[str, tuple]:
    """Every distinct launch of quantize.py by name: dtype x the sizes of x at which block sizes change, K even and odd."""
    import quantize

    quantize.INTERPRETED = True  # meta tensors pass as the interpreter's would
    quantize.STAGE_BYTES = (96 if target.startswith("sm_") else 48) << 10  # as a build of torch for it chooses
    launches = {}
    for name, dtype in DTYPES.items():
        for M in (1, 25, 64, 512):
            for N, K in ((57344, 8192), (8192, 8192), (8192, 8188)):  # without and with splits; a K that no block divides
                def run(dtype=dtype, M=M, N=N, K=K):
                    meta = {"device": "meta"}
                    quantize.int8_linear_triton(
                        torch.empty(M, K, dtype=dtype, **meta), torch.empty(N, K, dtype=torch.int8, **meta),
                        torch.empty(N, dtype=torch.bfloat16, **meta), torch.empty(1024, dtype=torch.int32, **meta))
                for kernel, grid, args, options in record(quantize, run):
                    options = options | {"UPCAST": False}
                    key = (name, str(sorted(options.items())), M if M == 1 else 0, K % 16)
                    launches.setdefault(key, (f"{kernel.__name__} {name} {M} x {N} x {K}", kernel, grid, args, options))
    return {launch[0]: launch[1:] for launch in launches.values()}


def attention_launches() -> dict[str, tuple]:
    """Every distinct launch of attention.py by name: dtype x head_dim x rows of a draft, a verification and a prefill."""
    import attention

    attention.INTERPRETED = True  # meta tensors pass as the interpreter's would
    launches = {}
    for name, dtype in DTYPES.items():
        for head_dim in (64, 128):
            for S, G in itertools.product((1, 2, 17, 26, 512), (4, 8)):
                def run(dtype=dtype, head_dim=head_dim, S=S, G=G):
                    q, cache = (torch.empty(1, heads, rows, head_dim, dtype=dtype, device="meta")
                                for heads, rows in ((8 * G, S), (8, 4096)))
                    attention.attend_triton(
                        q, cache, cache, torch.empty(S, dtype=torch.int64, device="meta"),
                        torch.empty(attention.MAX_TILES, dtype=torch.int32, device="meta"))
                for kernel, grid, args, options in record(attention, run):
                    options = options | {"UPCAST": False}
                    key = (name, str(sorted(options.items())), S == 1)
                    launches.setdefault(key, (f"{kernel.__name__} {name} {S} x {G} x {head_dim}", kernel, grid, args, options))
    return {launch[0]: launch[1:] for launch in launches.values()}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", choices=("judge", "quantize", "attention"), default="judge",
                        help="default: %(default)s")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="what to build for")
    parser.add_argument("--speculate_k", type=int, default=25, help="draft length K")
    parser.add_argument("--vocab_size", type=int, default=128256, help="V")
    parser.add_argument("--hidden_size", type=int, default=16384, help="D")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set, but the interpreter compiles nothing; unset it")
    for target in args.target:
        if args.module == "quantize":
            launches = quantize_launches(target)
        elif args.module == "attention":
            launches = attention_launches()
        else:
            launches = judge_launches(args.speculate_k, args.vocab_size, args.hidden_size)
        for name, (kernel, grid, values, options) in launches.items():
            usage = build(kernel, values, options, target)
            print(json.dumps({"kernel": name, "target": target, "grid": grid, **usage}), flush=True)


if __name__ == "__main__":
    main(parse_args())
