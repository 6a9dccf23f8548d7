"""model.py: agreement with transformers, the cache in any chunking, the kernel as on CUDA.

The attention kernel runs under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported:
tests/conftest.py), or on a GPU where there is one.
"""

import itertools

import pytest
import torch
from conftest import VOCAB_SIZE
from transformers import LlamaForCausalLM

import attention
import model
from cpu import can_compile
from model import Transformer

GPU = torch.cuda.is_available() and attention.triton is not None and not attention.INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
kernel_test = pytest.mark.skipif(
    not (GPU or attention.INTERPRETED),
    reason="needs triton, and a GPU or TRITON_INTERPRET=1 before triton is imported")
compile_test = pytest.mark.skipif(can_compile(torch.device(DEVICE)) is not None,
                                  reason="needs a C++ compiler and Python.h")
# ‖Δ‖/‖ref‖ against float32 transformers; a missing RoPE scaling gives 1e-1, a wrong theta 1e-1.
TOLERANCE = 2e-5


def relative(got: torch.Tensor, ref: torch.Tensor) -> float:
    return ((got - ref).norm() / ref.norm()).item()


def pair(directory):
    return (Transformer.from_checkpoint(directory, device="cpu", dtype=torch.float32),
            LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())


def random_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [
    {}, {"llama3_rope": True}, {"tie_word_embeddings": True}, {"head_dim": 24},
    {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"max_shard_size": "50KB"},
    {"dtype": torch.bfloat16}, {"dtype": torch.float16}], ids=str)
@torch.no_grad()
def test_logits_agree_with_transformers(tiny_checkpoint, options):
    ours, theirs = pair(tiny_checkpoint(**options))
    tokens = random_tokens(3, 41)
    ref = theirs(tokens).logits
    assert relative(ours.logits(ours(tokens)), ref) < TOLERANCE
    ours.setup_caches(max_batch_size=4, max_seq_length=64)
    assert relative(ours.logits(ours(tokens, torch.arange(41))), ref) < TOLERANCE


@torch.no_grad()
def test_far_positions_agree_with_transformers(tiny_checkpoint):
    ours, theirs = pair(tiny_checkpoint(
        llama3_rope=True, max_position_embeddings=16384, num_hidden_layers=1))
    tokens = random_tokens(1, 8400)
    ref = theirs(tokens, logits_to_keep=150).logits
    ours.setup_caches(max_batch_size=1, max_seq_length=8500)
    for start in range(0, 8400, 700):
        hidden = ours(tokens[:, start:start + 700], torch.arange(start, start + 700))
    assert relative(ours.logits(hidden[:, -150:]), ref) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 3, 16, 37])
@torch.no_grad()
def test_any_chunking_gives_the_same_logits_whatever_dead_rows_hold(tiny_checkpoint, chunk):
    ours, theirs = pair(tiny_checkpoint(llama3_rope=True))
    tokens = random_tokens(2, 37)
    ref = theirs(tokens).logits
    ours.setup_caches(max_batch_size=2, max_seq_length=50)
    for layer in ours.layers:
        layer.self_attn.cache.k.normal_(std=1e4)
        layer.self_attn.cache.v.normal_(std=1e4)
    rows = [ours(tokens[:, i:i + chunk], torch.arange(i, min(i + chunk, 37)))
            for i in range(0, 37, chunk)]
    assert relative(ours.logits(torch.cat(rows, dim=1)), ref) < TOLERANCE


@torch.no_grad()
def test_rows_may_be_rewritten(tiny_checkpoint):
    """What speculation leans on: rejected rows are overwritten, and never read before that."""
    ours, theirs = pair(tiny_checkpoint())
    tokens = random_tokens(1, 20)
    ours.setup_caches(max_batch_size=1, max_seq_length=32)
    ours(torch.cat((tokens[:, :9], torch.zeros(1, 8, dtype=torch.int64)), 1), torch.arange(17))
    hidden = ours(tokens[:, 9:], torch.arange(9, 20))
    assert relative(ours.logits(hidden), theirs(tokens).logits[:, 9:]) < TOLERANCE


def test_tokens_of_two_rows_do_not_see_each_other(tiny_checkpoint):
    ours, _ = pair(tiny_checkpoint())
    tokens = random_tokens(2, 9)
    ours.setup_caches(max_batch_size=2, max_seq_length=16)
    both = ours(tokens, torch.arange(9))
    alone = ours(tokens[1:], torch.arange(9))
    assert relative(both[1:], alone) < TOLERANCE


def attend_as_on_cuda(self, q, k, v, mask, input_pos):
    return torch.ops.gavel.attend(q, k, v, input_pos, self.cache.arrivals)


@kernel_test
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=compile_test)],
                         ids=["plain", "compiled"])
@torch.no_grad()
def test_model_with_the_kernel_agrees_whatever_dead_rows_hold(
        tiny_checkpoint, compile, monkeypatch):
    """All layers share one compiled block: one graph for it and one for the head, per length."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(model.Attention, "attend", attend_as_on_cuda)
    ours, theirs = pair(tiny_checkpoint(llama3_rope=True))
    tokens = random_tokens(2, 37)
    ref = theirs(tokens).logits
    ours = ours.to(DEVICE)
    ours.setup_caches(max_batch_size=3, max_seq_length=100)
    for layer in ours.layers:
        layer.self_attn.cache.k.fill_(float("nan"))
        layer.self_attn.cache.v.fill_(float("nan"))
    if compile:
        ours.compile_parts()
    before, rows = counters["stats"]["unique_graphs"], []
    for i, j in itertools.pairwise((0, 17, 18, 35, 36, 37)):
        hidden = ours(tokens[:, i:j].to(DEVICE), torch.arange(i, j, device=DEVICE))
        rows.append(ours.logits(hidden).cpu())
    assert relative(torch.cat(rows, dim=1), ref) < TOLERANCE
    assert counters["stats"]["unique_graphs"] - before == 4 * compile
    with ours.uncompiled_parts():
        hidden = ours(tokens[:, 30:36].to(DEVICE), torch.arange(30, 36, device=DEVICE))
        assert relative(ours.logits(hidden).cpu(), ref[:, 30:36]) < TOLERANCE
    assert counters["stats"]["unique_graphs"] - before == 4 * compile
    assert not any(layer.self_attn.cache.arrivals.any() for layer in ours.layers)


def test_the_kernel_is_never_replaced_in_silence(tiny_checkpoint, monkeypatch):
    ours = Transformer.from_checkpoint(tiny_checkpoint())
    ours.setup_caches(max_batch_size=1, max_seq_length=8)
    monkeypatch.setattr(model.Attention, "attend", attend_as_on_cuda)
    monkeypatch.setattr(attention, "INTERPRETED", False)
    got = r"got (no triton package|tensors on cpu), expected triton and a GPU"
    with pytest.raises(ValueError, match=got):
        ours(torch.zeros(1, 1, dtype=torch.int64), torch.arange(1))


def test_clearing_forgets_what_is_not_finite(tiny_checkpoint):
    ours, _ = pair(tiny_checkpoint())
    tokens = torch.arange(5)[None]
    ours.setup_caches(max_batch_size=1, max_seq_length=16)
    first = ours(tokens, torch.arange(5))
    for layer in ours.layers:
        layer.self_attn.cache.k[:, :, 9] = layer.self_attn.cache.v[:, :, 9] = torch.nan
    assert ours(tokens, torch.arange(5)).isnan().any()  # masked rows must be finite
    ours.cached = [0, 1]
    ours.clear_caches()
    assert torch.equal(ours(tokens, torch.arange(5)), first) and ours.cached == []
