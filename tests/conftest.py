"""What all tests share: settings of the process, and tiny random checkpoints to read.

`tiny_checkpoint` writes what a download would bring, by transformers and tokenizers and by none of gavel's own code, so
that the tests have something independent to agree with. Weights are drawn wide enough that attention is far from uniform,
logits are far from ties, and no norm weight is 1: a mistake must show.

    def test_reads_config(tiny_checkpoint):
        directory = tiny_checkpoint(num_hidden_layers=3, tie_word_embeddings=True, llama3_rope=True)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, and so for every process that a test starts: threads that wait for each
# other over tiny matrices take most of a core, and Inductor's pool of compilers seconds to start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
]  # fmt: skip
STOP_TOKENS = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
BYTES, MERGES = 256, 200
VOCAB_SIZE = BYTES + MERGES + len(SPECIAL_TOKENS)
# Llama-3.1's template without its date header and tools.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The merges are learned from this: several scripts, so that some tokens end within a character.
CORPUS = """\
The judge reads what the draft has written, and keeps every token that is correct; the target writes the next one.
Tom has 12 apples. He gives 3 to Ann and buys 45 more, so there are 12 - 3 + 45 = 54 apples. The answer is 54.
    for i in range(1000):  # a comment
        total += values[i] * 0.5
We're here, they'll come, it's theirs, I'd go, you've seen, don't wait.
Schöne Grüße aus München! Où êtes-vous déjà allé ? ¿Cuántos años tiene?
Привет, как дела? 今日はとても良い天気です。 你好，世界。 안녕하세요 👋🏽 🎉🎉
"""
# With heads of 16 and base 10,000, one frequency of eight is kept, two are blended and five are slowed: each branch counts.
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def pytest_configure() -> None:
    """Settle the process before any test module, and so triton or transformers, is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run as Python; @triton.jit reads this when it decorates
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns in every process forked after its first use
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest begins first: run side by side, none is left waiting for it."""
    items.sort(key=lambda item: item.path.name != "test_tp.py")


@pytest.fixture(autouse=True)
def full_float32() -> None:
    """TF32 off for every test, whatever ran before it."""
    torch.set_float32_matmul_precision("highest")


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE as Llama-3.1's: 256 bytes, then MERGES merges, then the 256 special tokens, in order of ids."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([CORPUS], trainers.BpeTrainer(
        vocab_size=BYTES + MERGES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "CORPUS yields too few merges"
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": "<|eot_id|>",
                "clean_up_tokenization_spaces": False, "model_max_length": 512, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_model(directory: Path, *, dtype: torch.dtype, llama3_rope: bool, max_shard_size: str, seed: int, **config) -> None:
    """Write config.json, generation_config.json and random weights; `config` overrides fields of LlamaConfig."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    rope = {"rope_theta": 10_000.0} | (LLAMA3_ROPE if llama3_rope else {"rope_type": "default"})
    first = BYTES + MERGES
    stop = [first + SPECIAL_TOKENS.index(token) for token in STOP_TOKENS]
    fields = dict(vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, initializer_range=0.2,
                  rope_parameters=rope, bos_token_id=first, eos_token_id=stop)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(fields | config)))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.generation_config = GenerationConfig(bos_token_id=first, eos_token_id=stop)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(*, dtype, llama3_rope, max_shard_size, seed, **config) -> a new Hugging Face directory, the caller's to change.

    `config` overrides fields of LlamaConfig: hidden_size, head_dim, tie_word_embeddings, num_key_value_heads, … Weights are
    float32 unless `dtype` says otherwise; a `max_shard_size` like "100KB" shards them; the same seed gives the same weights.
    """

    def make(*, dtype: torch.dtype = torch.float32, llama3_rope: bool = False, max_shard_size: str = "1GB", seed: int = 0,
             **config) -> Path:
        directory = tmp_path_factory.mktemp("checkpoint")
        write_tokenizer(directory)
        write_model(directory, dtype=dtype, llama3_rope=llama3_rope, max_shard_size=max_shard_size, seed=seed, **config)
        return directory

    return make
