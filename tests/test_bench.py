"""scripts/bench.py: every subcommand on tiny models, uncompiled, and the arithmetic behind its figures on made-up times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cpu
from generate import Engine
from judge import RULES, Rule, Verified
from model import Transformer
from quantize import Int8Linear, quantize_checkpoint
from scripts import bench, bench_pair, bench_scale, bench_tools
from scripts.bench_tools import Forced, draft_name, empty_model, model_config, random_model
from tp import Shard

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(capsys):
    """run(*argv) -> (the report in the last line of stdout, the lines before it)."""
    def command(*argv: object) -> tuple[dict, list[str]]:
        args = bench.parse_args([str(value) for value in argv])
        args.run(args)
        lines = capsys.readouterr().out.splitlines()
        return json.loads(lines[-1]), lines[:-1]
    return command


@pytest.fixture(scope="module")
def pair(tiny_checkpoint, tmp_path_factory) -> dict:
    """A target, another one as its draft, and five prompts of which three carry answers."""
    target = tiny_checkpoint(seed=1)
    head = bench_scale.random_head(64)
    head.save(target / "judge.safetensors")
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"prompt": text} for text in ("Hello", "One two")]
    lines += [{"prompt": "a b", "answer": ""}, {"prompt": "c d", "answer": ""}, {"prompt": "e f", "answer": "<never said>"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"target": target, "draft": tiny_checkpoint(seed=2, num_hidden_layers=1), "prompts": prompts}


ROW = {"tokens_per_second", "tokens_per_second_quartiles", "milliseconds_per_token", "seconds_to_first_token", "tokens_per_round",
       "accepted_per_round", "accuracy", "speculate_k", "agrees_with_target", "new_tokens", "ratio_to_target",
       "ratio_to_hf_generate"}


def pair_options(pair: dict) -> list:
    return ["pair", "--no-compile", "--dtype", "float32", "--device", "cpu", "--checkpoint_path", pair["target"],
            "--draft_checkpoint_path", pair["draft"], "--prompts", pair["prompts"], "--max_new_tokens", 8]


def test_pair(pair, run, tmp_path):
    report, lines = run(*pair_options(pair), "--num_prompts", 3, "--tune_prompts", 2, "--tune_k", 2, 3, "--assisted_k", 4,
                        "--json", tmp_path / "pair.json")
    assert json.loads((tmp_path / "pair.json").read_text()) == report
    assert list(report["rows"]) == list(bench_pair.WAYS) and all(set(row) == ROW for row in report["rows"].values())
    about = {"device", "torch", "transformers", "commit", "command", "threads"}
    assert about <= set(report["machine"])
    rows = report["rows"]
    for way in ("hf_generate", "hf_assisted", "exact"):
        assert rows[way]["agrees_with_target"] == 1, way  # in float32: the same tokens
    assert rows["target"]["ratio_to_target"] == rows["hf_generate"]["ratio_to_hf_generate"] == 1
    assert set(report["tuning"]) == {"exact", "judge"}
    for way, tuning in report["tuning"].items():
        assert set(tuning["tokens_per_second"]) == {"2", "3"} and tuning["edge"]
        assert tuning["best"] == rows[way]["speculate_k"]
    assert rows["hf_assisted"]["speculate_k"] == 4 and rows["judge"]["speculate_k"] in (2, 3)
    assert rows["draft"]["speculate_k"] is None and rows["draft"]["accepted_per_round"] == 0
    assert all(row["accuracy"] == 2 / 3 for row in rows.values())
    assert [line.split()[0] for line in lines[-len(rows):]] == list(rows)


class First(Rule):
    """Keeps the first n draft tokens, and what the exact rule keeps."""

    name = "first"

    def __init__(self, n: int = 1):
        self.n = n

    def score(self, seen: Verified) -> torch.Tensor:
        return (torch.arange(len(seen.drafted)) < self.n).float()


def test_pair_takes_any_rule_by_name(pair, run, monkeypatch):
    monkeypatch.setitem(RULES, "first", First)
    report, _ = run(*pair_options(pair), "--num_prompts", 2, "--tune_prompts", 1, "--tune_k", 2, 3,
                    "--ways", "target", "--rule", "first", "--rule_args", "n=2", "--no_hf")
    assert list(report["rows"]) == ["target", "first"] and report["rule_args"] == "n=2"
    row = report["rows"]["first"]
    assert row["accepted_per_round"] > 1.5 and row["speculate_k"] in (2, 3)
    assert set(report["tuning"]["first"]["tokens_per_second"]) == {"2", "3"}


def test_a_best_k_at_the_edge_is_said(monkeypatch, capsys):
    def interleave(contest, trials, prompts, desc):
        fast = {"exact": 2, "judge": 24}
        return {(way, k): [made_up(1 + abs(k - fast[way]), [0])] for way, k in trials}

    monkeypatch.setattr(bench_pair, "interleave", interleave)
    grids = {"exact": [1, 2, 3], "judge": [12, 16, 24], "hf_assisted": [4]}
    chosen, tuning = bench_pair.choose_k(None, grids, [])
    assert chosen == {"exact": 2, "judge": 24, "hf_assisted": 4}
    assert [tuning[way]["edge"] for way in ("exact", "judge")] == [False, True]
    said = capsys.readouterr().err
    assert "judge: the best K, 24, lies at the edge of [12, 16, 24]" in said and "exact" not in said
    assert not bench_pair.at_edge(1, [1, 2]) and not bench_pair.at_edge(64, [32, 64])


def test_assisted_generation_drafts_k_tokens_a_round(pair):
    """With itself as its assistant transformers accepts all K, at any K, in every round."""
    args = bench.parse_args([str(option) for option in pair_options(pair)])
    args.draft_checkpoint_path = args.checkpoint_path
    setup, _ = bench_pair.prepare(args, ["hf_assisted"], 4)
    other = bench_pair.HuggingFace(setup, ())
    for k in (3, 5):
        answer = other.answer([1, 2, 3], 4 * (k + 1), k)
        assert (len(answer["tokens"]), answer["rounds"], answer["accepted"]) == (4 * (k + 1), 4, 4 * k)
    assert other.answer([1, 2, 3], 5, None)["rounds"] == 0


def test_pair_takes_the_first_prompts_to_choose_k(pair):
    args = bench.parse_args(["pair", "--prompts", str(pair["prompts"]), "--num_prompts", "3"])
    validation, prompts = bench_pair.get_prompts(args, lambda text: [text], 2)
    assert [prompt.ids[0] for prompt in (*validation, *prompts)] == ["Hello", "One two", "a b", "c d", "e f"]
    assert prompts[2].is_right("so it is <never said>.", False) and not prompts[2].is_right("no", True)
    assert validation[0].is_right is None
    with pytest.raises(ValueError, match="got 5 prompts, expected 3 to choose K and 3"):
        bench_pair.get_prompts(args, lambda text: [text], 3)


def made_up(seconds: float, tokens: list[int], *, rounds: int = 0, accepted: int = 0, right: bool | None = None) -> dict:
    return {"tokens": tokens, "new_tokens": len(tokens), "seconds": seconds, "seconds_to_first_token": seconds / 4,
            "rounds": rounds, "round_tokens": len(tokens) - 1, "accepted": accepted, "right": right}


def test_rows_of_made_up_times():
    answers = {
        "target": [made_up(1.0, [1] * 10), made_up(0.5, [2] * 10), made_up(2.0, [3] * 10)],  # 10, 20 and 5 tokens/s
        "judge": [made_up(0.5, [1] * 10, rounds=3, accepted=6, right=True),
                  made_up(0.1, [2] * 9, rounds=2, accepted=6, right=False),
                  made_up(0.25, [3] * 10, rounds=3, accepted=6)],  # 20, 90 and 40
    }
    rows = bench_pair.summarise(answers, {"judge": 4})
    assert rows["target"]["tokens_per_second"] == 10 and rows["target"]["tokens_per_second_quartiles"] == [7.5, 15]
    judge = rows["judge"]
    assert judge["tokens_per_second"] == pytest.approx(40) and judge["milliseconds_per_token"] == pytest.approx(25)
    assert judge["ratio_to_target"] == pytest.approx(4) and judge["ratio_to_hf_generate"] is None
    assert judge["tokens_per_round"] == 26 / 8 and judge["accepted_per_round"] == 18 / 8
    assert judge["accuracy"] == 0.5 and rows["target"]["accuracy"] is None
    assert judge["agrees_with_target"] == pytest.approx(2 / 3) and judge["speculate_k"] == 4
    assert judge["seconds_to_first_token"] == 0.25 / 4


def test_best_k_has_the_highest_median():
    def at(*speeds):
        return [made_up(10 / speed, [0] * 10) for speed in speeds]

    assert bench_pair.best_k({2: at(5, 6, 7), 8: at(1, 9, 9), 4: at(8, 8, 100)}) == 8
    assert bench_pair.best_k({8: at(5), 4: at(5)}) == 4


def test_turns_and_quartiles():
    clocks = {name: iter(values) for name, values in {"a": [9, 1, 2, 3], "b": [9, 4, 4, 4]}.items()}
    times = bench_tools.take_turns({name: clock.__next__ for name, clock in clocks.items()}, 3)
    assert times == {"a": [1, 2, 3], "b": [4, 4, 4]}  # the first turn is a warm-up
    assert bench_tools.spread(times["a"], "ms", prefix="x_") == {"x_ms": 2000, "x_ms_quartiles": [1500, 2500]}
    assert bench_tools.spread([0.5], "us") == {"us": 5e5, "us_quartiles": [5e5, 5e5]}


def test_limit(run, monkeypatch):
    assert bench.BEYOND_CACHES >= 512 << 20
    monkeypatch.setattr(bench, "BEYOND_CACHES", 1 << 20)
    report, _ = run("limit", "--no-compile", "--model", "demo-fp32", "--draft", "demo-draft-bf16", "--device", "cpu",
                    "--length", 20, "--speculate_k", 1, 3, "--repeats", 2)
    steps = {step["step"]: step for step in report["steps"]}
    assert list(steps) == ["draft step", "target step", "verify 2 rows", "verify 4 rows"]
    config, _ = model_config("demo-fp32")
    assert steps["verify 4 rows"]["cache_bytes"] == 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * 24
    draft = empty_model("demo-draft-bf16")
    assert steps["draft step"]["weight_bytes"] == bench_tools.weight_bytes(draft)
    for name, step in steps.items():
        assert step["share"] == pytest.approx(step["ceiling_ms"] / step["ms"])
        which = "draft" if name == "draft step" else "target"
        speed = report["bandwidth"][which]["gb_per_s"] * 1e6
        moved = step["weight_bytes"] + step["cache_bytes"]
        assert step["ceiling_ms"] == pytest.approx(moved / speed)
    assert steps["target step"]["to_target_step"] == 1 and report["beyond_caches_gb_per_s"] > 0


def test_machine_names_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/bench.py", "pair", "--json", "a b.json"])
    about = bench_tools.machine(torch.device("cpu"))
    assert about["command"] == "python scripts/bench.py pair --json 'a b.json'"
    assert about["commit"] and about["device"].endswith("cores")


def test_int8(run, monkeypatch):
    """The layers as a model on a CPU runs them; uncompiled, as nothing here depends on it."""
    seen = []
    forward = cpu.CpuInt8Linear.forward
    monkeypatch.setattr(cpu.CpuInt8Linear, "forward",
                        lambda layer, x: seen.append(x.shape) or forward(layer, x))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(bench.SHAPES, "demo", {"o": (32, 64)})
    monkeypatch.setitem(bench.ROTATION_BYTES, "cpu", 4096)
    monkeypatch.setattr(bench, "bandwidth", lambda device: 1e9)
    report, _ = run("int8", "--models", "demo", "--rows", 1, 3, "--repeats", 1, "--device", "cpu",
                    "--dtype", "bfloat16")
    for entry in report["layers"]:
        M, moved = entry["rows"], 32 * 64 + 2 * entry["rows"] * (32 + 64)
        assert entry["int8"]["share"] == pytest.approx(moved / entry["int8"]["us"] / 1e3, rel=1e-6)
        assert torch.Size((M, 64)) in seen and set(bench.WAYS) <= set(entry)
    assert [entry["rows"] for entry in report["passes"]] == [1, 17]
    assert report["gpu"] == bench.NOT_MEASURED and bench.RIVALS["cuda"] == ("bf16", "dequantise")


def test_kernel(run):
    report, _ = run("kernel", "--no-compile", "--device", "cpu", "--shape", 3, 64, 16, "--repeats", 2, "--dtype", "bfloat16")
    modes = {size["mode"]: size for size in report["sizes"]}
    assert set(modes) == set(bench.KERNEL_MODES)
    greedy = 2 * 4 * 64 + 2 * 3 * 16 + 4 * 16  # logits, hidden rows 1..K, head
    assert modes["greedy"]["bytes"] == greedy and modes["sampled"]["bytes"] == greedy + 2 * 4 * 64
    for size in modes.values():
        assert size["triton"] == bench.NOT_MEASURED == report["gpu"] and "compiled" not in size
        assert size["eager"]["gb_per_s"] == pytest.approx(size["bytes"] / size["eager"]["us"] / 1e3)


def test_long(run):
    report, _ = run("long", "--no-compile", "--model", "demo-fp32", "--device", "cpu", "--lengths", 8, 40, "--allocated", 64, 128,
                    "--new_tokens", 3, "--repeats", 1)
    assert [(row["in_use"], row["allocated"]) for row in report["in_use"]] == [(8, 43), (40, 43)]
    assert [(row["in_use"], row["allocated"]) for row in report["allocated"]] == [(8, 64), (8, 128)]
    assert report["in_use"][0]["to_shortest"] == 1 and report["in_use"][1]["ms"] > 0


def test_scale(run):
    report, lines = run("scale", "--no-compile", "--device", "cpu", "--models", "demo-fp32", "--speculate_k", 2, 4,
                        "--force_accepted", 3, "--rounds", 2, "--repeats", 1, "--prompt_tokens", 8)
    (model,) = report["models"]
    assert {"weight_bytes", "memory_bytes", "decode_ms", "decode_share", "cold_start_seconds", "warm_start_seconds"} <= set(model)
    assert [entry["name"] for entry in model["rounds"]] == ["forced 2 of 2", "forced 3 of 4"]
    for entry in model["rounds"]:
        assert entry["tokens_per_second"] == pytest.approx(1e3 * (entry["forced_accepted"] + 1) / entry["round_ms"])
        bytes_read = entry["speculate_k"] * model["draft_weight_bytes"] + model["weight_bytes"]
        assert entry["ceiling_ms"] * model["bandwidth_gb_per_s"] * 1e6 == pytest.approx(bytes_read, rel=0.05)  # and caches
        assert entry["share"] == pytest.approx(entry["ceiling_ms"] / entry["round_ms"])
    assert report["gpu"] == bench.NOT_MEASURED and any("forced 3 of 4" in line for line in lines)


@pytest.fixture(scope="module")
def random_pair() -> tuple[Transformer, Transformer]:
    device = torch.device("cpu")
    return random_model("demo-fp32", device), random_model("demo-draft-fp32", device, seed=1)


@pytest.mark.parametrize("accepted", [0, 2, 5])
@pytest.mark.parametrize("judged", [True, False])
def test_forced_acceptance(random_pair, accepted, judged):
    target, draft = random_pair
    rule = Forced(accepted, bench_scale.random_head(target.config.hidden_size) if judged else None)
    engine = Engine(target, draft, rule=rule, speculate_k=5, max_seq_length=128, stop_tokens=())
    blocks = list(engine.generate([1, 2, 3], max_new_tokens=1 + 4 * (accepted + 1)))
    assert [len(block.tokens) for block in blocks] == [1] + 4 * [accepted + 1]
    assert engine.stats["tokens_per_round"] == accepted + 1 and engine.stats["accepted_per_round"] == accepted
    # What is kept is what was drafted: the draft's own greedy text.
    alone = Engine(draft, max_seq_length=128, stop_tokens=())
    text = [1, 2, 3, *blocks[0].tokens]
    list(alone.generate(text, max_new_tokens=max(1, accepted)))
    assert blocks[1].tokens[:accepted] == alone.stats["tokens"][:accepted]
    assert engine.stats["accepted_exact"] == 0


@pytest.mark.parametrize("name,out_in", [("8B-int8", (6144, 4096)), ("70B-int8", (10240, 8192)), ("405B/8-int8", (2304, 16384))])
def test_shapes_are_those_of_llama(name, out_in):
    model = empty_model(name)
    attention = model.layers[0].self_attn
    assert tuple(attention.qkv_proj.weight.shape) == out_in
    config = model.config
    assert (attention.heads, attention.kv_heads) == (config.num_heads, config.num_kv_heads)
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear | Int8Linear)]
    assert all(isinstance(layer, Int8Linear) for layer in linears) and len(linears) == 4 * config.num_layers + 1


def test_random_sizes_add_up_to_their_names():
    parameters = {name: sum(p.numel() for p in empty_model(name).parameters()) for name in ("8B-bf16", "70B-bf16", "405B-bf16")}
    assert parameters == {"8B-bf16": 8_030_261_248, "70B-bf16": 70_553_706_496, "405B-bf16": 405_853_388_800}
    share = sum(p.numel() for p in empty_model("405B/8-bf16").parameters())
    assert share == pytest.approx(parameters["405B-bf16"] / 8, rel=1e-3)  # norms are held by all


def test_random_int8_model_stays_finite(monkeypatch):
    monkeypatch.setitem(bench_tools.SIZES, "8B", (1024, 3584, 32, 8, 8))  # as deep, but narrow
    monkeypatch.setattr(bench_tools, "VOCAB_SIZE", 512)
    model = random_model("8B-int8", torch.device("cpu"))
    model.setup_caches(1, 8)
    with torch.no_grad():
        hidden = model(torch.arange(8)[None], torch.arange(8))
        assert hidden.isfinite().all() and model.logits(hidden).isfinite().all() and hidden.float().std() > 0.01


def test_bytes_of_a_step():
    tied, untied = empty_model("demo-fp32"), empty_model("8B-bf16")
    assert bench_tools.weight_bytes(tied) == sum(p.nbytes for p in tied.parameters())
    assert bench_tools.weight_bytes(untied) == sum(p.nbytes for p in untied.parameters()) - 2 * 128256 * 4096
    assert bench_tools.cache_bytes(untied, 1) == 2 * 2 * 32 * 8 * 128


def test_a_larger_model_is_drafted_by_8b_in_its_kind():
    assert [draft_name(name, None) for name in ("8B-int8", "70B-int8", "405B/8-int8", "70B-bf16", "demo-fp32")] == [
        None, "8B-int8", "8B/8-int8", "8B-bf16", "demo-draft-fp32"]
    assert model_config("8B/8-int8")[0].vocab_size == model_config("405B/8-int8")[0].vocab_size == 16032


def test_a_draft_may_name_its_kind():
    assert draft_name("70B-int8", "8B") == "8B-int8" and draft_name("70B-int8", "8B-bf16") == "8B-bf16"
    assert draft_name("405B/8-int8", "8B-bf16") == "8B/8-bf16"  # cut as its target is
    assert draft_name("8B-int8", "8B-bf16") is None
    args = bench.parse_args(["limit", "--model", "70B-int8", "--draft", "8B"])
    assert bench.limit_names(args) == ("70B-int8", "8B-int8")


@pytest.fixture(scope="module")
def sharded(tiny_checkpoint, tmp_path_factory) -> dict[int, Path]:
    """A checkpoint that eight ranks can share, by the bits of its weights."""
    sizes = dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=16,
                 intermediate_size=192)
    made = {16: tiny_checkpoint(**sizes, dtype=torch.bfloat16),
            8: tmp_path_factory.mktemp("sharded") / "int8"}
    quantize_checkpoint(made[16], made[8])
    return made


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_bytes_per_rank_are_those_of_the_model(sharded, world, bits):
    model = Transformer.from_checkpoint(sharded[bits], shard=Shard(0, world))  # nothing is sent
    kind = {8: "int8", 16: "bf16"}[bits]
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert bench_tools.rank_bytes(model.config, kind, world) == held


def test_ranks(run):
    report, lines = run("ranks", "--models", "8B", "70B", "--world", 1, 8)
    assert report["computed"] == "from shapes, not measured" and lines[0].startswith("Computed")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[-2:]]
    assert table == [["8B", "8.56", "1.07", "9.1"], ["70B", "71.62", "8.96", "44.8"]]
    # by hand, by the formula in tp.py: b · (K + 1) · D · (2L + 1)
    assert report["models"][0]["collective_bytes"] == 2 * 17 * 4096 * 65
    with pytest.raises(ValueError, match="8B-int8: got 3 ranks"):
        run("ranks", "--models", "8B", "--world", 3)


@pytest.mark.parametrize("argv,message", [
    (["scale", "--models", "9B-int8"], "got model '9B-int8', expected SIZE-KIND"),
    (["scale", "--models", "70B/3-int8"], "divides its 8 key-value heads"),
    (["scale", "--speculate_k", "0"], "got K 0"),
    (["pair", "--checkpoint_path", "x"], "give both, or neither"),
    (["pair", "--ways", "judge"], "got --ways without target"),
    (["pair", "--exact_k", "0"], "got a K of 0"),
    (["pair", "--seed", "2000000"], "that K is chosen on"),
    (["pair", "--threads", "0"], "got --threads 0"),
    (["limit", "--model", "demo-fp32", "--checkpoint_path", "x"], "give one of them"),
    (["limit", "--speculate_k", "0"], "got K 0"),
    (["limit", "--model", "70B-int8", "--draft", "70B"], "the size of the target"),
    (["limit", "--checkpoint_path", "x", "--draft", "8B"], "got model '8B'"),
    (["pair", "--rule", "judge"], "got --rule judge, which is one of --ways"),
    (["pair", "--rule_args", "a=1"], "got --rule_args without --rule"),
    (["kernel", "--shape", "4", "8", "8"], "V from 50 on"),
    (["long", "--new_tokens", "1"], "--new_tokens below 2"),
    (["start", "--model", "demo"], "got model 'demo'"),
    (["kernel", "--json", "/nowhere/x.json"], "does not exist"),
])
def test_bad_input(run, argv, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(*argv, "--device", "cpu", "--no-compile")


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "x"}', '{"prompt": 1}', '{"prompt": "x", "answer": 2}'])
def test_bad_prompts(tmp_path, line):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(ValueError, match="line 2: got .*expected"):
        bench_pair.read_prompts(tmp_path / "prompts.jsonl", lambda text: [0])


def test_without_transformers(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    args = bench.parse_args([str(option) for option in pair_options(pair)])
    with pytest.raises(ValueError, match="transformers is not installed.*--no_hf"):
        bench_pair.prepare(args, ["target", "hf_generate"], 4)
    bench_pair.prepare(args, ["target", "judge"], 4)


def test_models_that_do_not_fit_are_skipped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 141 << 30))
    assert bench_tools.fits(["70B-bf16"], torch.device("cuda")) == "needs 144 GB, this GPU has 86 free"
    assert bench_tools.fits(["8B-int8"], torch.device("cuda")) is None
    assert bench_tools.fits(["70B-bf16"], torch.device("cpu")) is None


def test_command_exits_2_with_one_line():
    result = subprocess.run([sys.executable, "scripts/bench.py", "scale", "--models", "9B-int8"], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("bench.py: got model '9B-int8'") and result.stderr.count("\n") == 1


def test_caches_of_twins_are_their_own():
    """`long` compares allocations in turns: copies that share weights, and not caches."""
    model = random_model("demo-fp32", torch.device("cpu"))
    twin = bench_tools.twin_of(model)
    assert isinstance(twin, Transformer) and all(a is b for a, b in zip(model.parameters(), twin.parameters()))
    assert twin.lm_head.weight is twin.embed_tokens.weight
    twin.setup_caches(1, 16)
    assert model.max_seq_length == 0
