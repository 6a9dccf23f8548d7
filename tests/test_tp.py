"""tp.py: ranks give the tokens of one process, read their own part alone, cannot drift, and end together."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from test_train_head import write_answers

import tp
import train_head
from checkpoint import ModelConfig
from drafter import LookupDrafter
from generate import Engine
from judge import JudgeHead
from model import Transformer
from quantize import quantize_checkpoint
from terminal import DEMO, DEMO_PROMPT
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=16, intermediate_size=192)
TOLERANCE = 1e-5  # of logits in float32; a rank's part left out of one all-reduce gives 1e-1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(world: int, directory: Path, cases: list[dict], timeout: float = 300) -> dict:
    """All cases in one process group of `world` forked ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])  # one import for all; it needs the path, and is silent where it fails
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        multiprocessing.forkserver.ensure_running()
    port = free_port()
    processes = [context.Process(target=ranks.main, args=(rank, world, port, str(directory), cases)) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world
    return torch.load(directory / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def cases(tiny_checkpoint, tmp_path_factory) -> dict[str, dict]:
    """Targets of every kind with a draft (the target under noise: it agrees now and then) and a judge head."""
    place = tmp_path_factory.mktemp("cases")
    torch.manual_seed(1)
    head = JudgeHead(torch.randn(1, 64) * 0.3, torch.zeros(1), {"threshold": "0.6"})
    head.save(place / "judge.safetensors")
    made = {"plain": tiny_checkpoint(**SIZES, llama3_rope=True), "tied": tiny_checkpoint(**SIZES, tie_word_embeddings=True),
            "sharded": tiny_checkpoint(**SIZES, max_shard_size="100KB", dtype=torch.bfloat16)}
    draft = tiny_checkpoint(**SIZES | {"num_hidden_layers": 1})
    for name in ("plain", "tied"):
        quantize_checkpoint(made[name], place / f"{name}-int8")
        made[f"{name}-int8"] = place / f"{name}-int8"
    quantize_checkpoint(draft, place / "draft-int8")
    drafts = {name: draft for name in made} | {"plain": made["tied"], "plain-int8": place / "draft-int8"}
    return {name: {"target": str(path), "draft": str(drafts[name]), "head": str(place / "judge.safetensors"), "speculate_k": 5}
            for name, path in made.items()}


@pytest.fixture(scope="module")
def alone(cases) -> dict[str, dict]:
    with torch.no_grad():
        return {name: ranks.answers(case) for name, case in cases.items()}


def compare(results: list[dict], references: list[dict]) -> None:
    for ours, reference in zip(results, references, strict=True):
        assert ours["tokens"]
        for way, tokens in ours["tokens"].items():
            assert len(tokens) >= 12 and tokens == reference["tokens"][way][:len(tokens)]
        for got, expected in zip(ours["logits"], reference["logits"], strict=True):
            assert ((got - expected).norm() / expected.norm()).item() < TOLERANCE


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_give_the_tokens_of_one_process(world, cases, alone, tmp_path):
    """Both drafters, every rule, greedy, sampled and with top-k; float32 and int8; at 8 ranks pairs share a key-value head."""
    names = list(cases) if world == 2 else ["plain", "plain-int8"]
    found = run_ranks(world, tmp_path, [cases[name] for name in names])
    compare(found["results"], [alone[name] for name in names])
    kept = {(way[0], source) for name in names for way, tokens in alone[name]["tokens"].items() for _, source in tokens}
    assert {("model", "judge"), ("model", "often"), ("model", "exact"), ("lookup", "judge"), ("lookup", "exact")} <= kept
    assert len({tuple(early) for early in found["early"]}) == 1 and found["early"][0][0] == 3  # all stopped where rank 0 did
    for rank_read in found["read"]:
        for read, held in rank_read:
            assert read <= 1.1 * held  # int8 pads nothing here; a rank that read whole matrices would read `world` times that


def test_more_ranks_than_key_value_heads(tiny_checkpoint, tmp_path):
    sizes = dict(hidden_size=64, num_attention_heads=16, num_key_value_heads=8, head_dim=8, intermediate_size=256, vocab_size=720)
    case = {"target": str(tiny_checkpoint(**sizes)), "draft": None, "head": None, "speculate_k": 4}
    with torch.no_grad():
        reference = ranks.answers(case)
    compare(run_ranks(16, tmp_path, [case])["results"], [reference])


def test_table_covers_every_parameter(tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint(**SIZES)
    quantize_checkpoint(directory, tmp_path / "int8")
    for path in (directory, tmp_path / "int8"):
        for name, _ in Transformer.from_checkpoint(path).named_parameters():
            assert tp.kind(name) in ("vocabulary", "heads", "column", "row", "replicated")
    with pytest.raises(KeyError, match="no row in tp.TABLE"):
        tp.kind("layers.0.self_attn.q_norm.weight")


def config(**changes) -> ModelConfig:
    raw = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
           "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
    return ModelConfig.from_dict(raw | changes)


@pytest.mark.parametrize("changes, world, message", [
    ({}, 3, r"3 ranks, which do not divide query heads 64, intermediate_size 28672.*expected 1 or 2 or 4 or 8 or 16 or 32"),
    ({"num_key_value_heads": 16, "num_attention_heads": 48, "vocab_size": 48000, "intermediate_size": 48000}, 24,
     "key-value heads 16"),
    ({"vocab_size": 128257}, 2, "vocabulary 128257"),
    ({"intermediate_size": 28674}, 4, "intermediate_size 28674")], ids=str)
def test_world_sizes_that_do_not_fit_are_named(changes, world, message):
    with pytest.raises(ValueError, match=message):
        tp.check_world(config(**changes), world, "model")


def test_int8_needs_whole_words():
    quantized = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"weights": {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}}}
    tp.check_world(config(intermediate_size=28676), 2, "model")
    with pytest.raises(ValueError, match="by 4, in int8.*down_proj's 14338 inputs"):
        tp.check_world(config(intermediate_size=28676, quantization_config=quantized), 2, "model")


def test_variables_half_set_and_too_many_ranks(monkeypatch):
    for name in tp.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert tp.world_size() == 1
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="got RANK without WORLD_SIZE, LOCAL_RANK.*torchrun"):
        tp.world_size()
    for name in tp.VARIABLES:
        monkeypatch.setenv(name, "2")
    assert tp.world_size() == 2
    with pytest.raises(ValueError, match="cuda:0.* several ranks"):
        tp.pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="8 ranks on a machine with 2 GPUs.*nproc_per_node=2"):
        tp.pick_device("cuda")
    assert tp.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert tp.pick_device("cuda") == torch.device("cuda", 2)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
def test_a_rank_has_the_sizes_that_the_table_cuts(tiny_checkpoint, tmp_path, world, int8):
    """At 8 ranks two share each key-value head."""
    directory = tiny_checkpoint(**SIZES)
    if int8:
        quantize_checkpoint(directory, tmp_path / "int8")
        directory = tmp_path / "int8"
    whole = Transformer.from_checkpoint(directory)
    sizes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    rows = 16 * (8 // world + 2 * max(4 // world, 1))  # heads of queries, keys and values
    for rank in range(world):
        shard = tp.Shard(rank, world)  # no process group: nothing is sent
        models = [Transformer.from_checkpoint(directory, shard=shard)]
        if not int8:
            models.append(Transformer(whole.config, shard))
        for model in models:
            found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            assert found == {name: {
                "replicated": (first, *rest), "heads": (rows, *rest), "column": (first // world, *rest),
                "vocabulary": (first // world, *rest), "row": (first, *(n // world for n in rest)),
            }[tp.kind(name)] for name, (first, *rest) in sizes.items()}
            model.setup_caches(1, 8)
            assert model.layers[0].self_attn.cache.k.shape[1] == max(4 // world, 1)


def torchrun(*arguments: str, nproc: int = 2, **environment) -> subprocess.Popen:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen, timeout: float = 400) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out, err


@pytest.mark.parametrize("nproc, new, options", [
    pytest.param(2, 24, ["--no-compare"], id="compiled", marks=pytest.mark.slow),
    pytest.param(8, 12, ["--no-compile", "--no-compare", "--draft", "lookup"], id="lookup"),
    pytest.param(2, 6, ["--no-compile"], id="table")])
def test_command_line_on_the_bundled_pair(nproc, new, options, tmp_path):
    out, err = finished(torchrun("generate.py", "--device", "cpu", "--judge", "--check_ranks", "--dtype", "float32",
                                 "--max_new_tokens", str(new), "--json", str(tmp_path / "out.json"), *options, nproc=nproc))
    (sample,) = json.loads((tmp_path / "out.json").read_text())
    assert sample["world_size"] == nproc and sample["rule"] == "judge"
    assert out.count(sample["text"].strip()) == out.count("tokens/round") == 1  # one rank prints
    rules = re.findall("^(target alone|exact|judge) .*", out, re.MULTILINE)
    assert rules == (["judge"] if "--no-compare" in options else ["target alone", "exact", "judge"])
    assert len(re.findall(r"rank \d+: [\d,.]+ MB of target read in", err)) == nproc
    assert "destroy_process_group" not in err and "leaked" not in err
    target, draft = (Transformer.from_checkpoint(DEMO / name, dtype=torch.float32) for name in ("target", "draft"))
    engine = Engine(target, LookupDrafter() if "lookup" in options else draft, JudgeHead.load(DEMO / "judge.safetensors"))
    ids = Tokenizer.from_checkpoint(DEMO / "target").encode_prompt(DEMO_PROMPT)
    assert sample["tokens"] == [token for block in engine.generate(ids, max_new_tokens=new) for token in block.tokens]


def test_training_over_ranks_gives_the_head_of_one_process(tiny_checkpoint, tmp_path):
    """One rank writes one head; it is the one that a single process trains, but for the rounding of the hidden states."""
    data = write_answers(tmp_path / "answers.jsonl", questions=12)
    directory, heads = tiny_checkpoint(**SIZES), {}
    for name in ("ranks", "alone"):
        command = ["train_head.py", "--checkpoint_path", str(directory), "--data", str(data), "--epochs", "3", "--lr", "0.01",
                   "--device", "cpu", "--dtype", "float32", "--cache", str(tmp_path / name), "--output", str(tmp_path / f"{name}.safetensors")]
        if name == "ranks":
            out, err = finished(torchrun(*command), 120)
            assert out.count("wrote") == 1 and "destroy_process_group" not in err
        else:
            train_head.main(train_head.parse_args(command[1:]))
        heads[name] = JudgeHead.load(tmp_path / f"{name}.safetensors")
    assert heads["ranks"].threshold == heads["alone"].threshold
    torch.testing.assert_close(heads["ranks"].weight, heads["alone"].weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_rank_that_dies_ends_the_job(how, tmp_path):
    """SIGKILL to one rank; SIGINT, as Ctrl-C, to the launcher."""
    process = torchrun("generate.py", "--device", "cpu", "--no-compile", "--max_new_tokens", "4000", "--num_samples", "50", "--checkpoint_path",
                       str(DEMO / "target"), "--prompt", "once")
    deadline = time.monotonic() + 120
    while not process.stdout.read(1):
        assert time.monotonic() < deadline
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    start = time.monotonic()
    os.kill(int(children[-1]) if how is signal.SIGKILL else process.pid, how)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and time.monotonic() - start < 60
    for child in children:
        assert not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text()
    if how is signal.SIGKILL:
        assert "SIGKILL" in err


def test_errors_come_once_and_before_weights():
    process = torchrun("generate.py", "--device", "cpu", "--no-compile", nproc=3)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and err.count("got 3 ranks, which do not divide query heads 8") == 1
    assert "MB of target read" not in err


@pytest.mark.slow
def test_two_agents_on_one_machine(tmp_path):
    """torchrun --nnodes=2 as on two machines, over loopback. They meet at a store of ours: the agent that hosts it may leave
    first, and torchrun then takes the other one's last heartbeat for a failure."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agents = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
         f"--rdzv_endpoint=127.0.0.1:{store.port}", "--rdzv_conf=is_host=0", "--rdzv_id=gavel", "--local_addr=127.0.0.1",
         "generate.py", "--device", "cpu", "--no-compile", "--max_new_tokens", "8", "--json", str(tmp_path / "out.json")], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for agent in agents:
        finished(agent, 120)
    assert json.loads((tmp_path / "out.json").read_text())[0]["world_size"] == 2
