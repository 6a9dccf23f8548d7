"""generate.py: lossless rules token for token and in distribution, the judge's rule, the cache, stop tokens, the command line."""

import collections
import io
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import drafter
import generate
import terminal
from checkpoint import ModelConfig
from cpu import can_compile
from drafter import LookupDrafter, ModelDrafter, Sampling, State
from generate import Answer, Engine, Round
from judge import JudgeHead, Rule, check_fit, probs
from model import Transformer
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
PROMPT = [7, 3, 11, 5]


def random_model(seed: int, *, vocab_size: int = 97, hidden_size: int = 32, num_layers: int = 2,
                 spread: float = 0.3) -> Transformer:
    """A random float32 model, made without a file; `spread` sets how peaked its distributions are."""
    config = ModelConfig(vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
                         num_layers=num_layers, num_heads=4, num_kv_heads=2, head_dim=8, rms_norm_eps=1e-5,
                         max_position_embeddings=512, rope_theta=1e4)
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=spread, generator=generator)
    return model.requires_grad_(False).eval()


def near(model: Transformer, noise: float, seed: int = 9) -> Transformer:
    """A copy of a model with noisy weights: a draft that is right at times."""
    copy = random_model(0, vocab_size=model.config.vocab_size, hidden_size=model.config.hidden_size,
                        num_layers=model.config.num_layers)
    generator = torch.Generator().manual_seed(seed)
    for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
        ours.data = theirs.data + noise * torch.randn(theirs.shape, generator=generator)
    return copy


def random_head(size: int, *, threshold: float = 0.5, bias: float = 0.0, seed: int = 3) -> JudgeHead:
    weight = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) / size ** 0.5
    return JudgeHead(weight, torch.tensor([bias]), {"threshold": str(threshold), "target": "random", "data": "none"})


def run(engine: Engine, prompt=PROMPT, n: int = 40, **options) -> list[int]:
    return [token for block in engine.generate(prompt, max_new_tokens=n, **options) for token in block.tokens]


@torch.no_grad()
def greedy(model: Transformer, prompt: list[int], n: int) -> list[int]:
    """The obvious reference: no cache, every prefix read anew."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model.logits(model(torch.tensor([tokens]))[:, -1]).argmax()))
    return tokens[len(prompt):]


@torch.no_grad()
def judged(target: Transformer, draft: Transformer, head: JudgeHead, prompt: list[int], n: int, K: int, threshold: float,
           stop: tuple[int, ...] = ()) -> tuple[list[int], list[str]]:
    """The judge's rule by its definition: no cache, one candidate at a time."""
    tokens, sources = [*prompt, *greedy(target, prompt, 1)], ["target"]
    while len(tokens) - len(prompt) < n:
        drafted = greedy(draft, tokens, K)
        for i, token in enumerate(drafted):
            prefix = [*tokens, token]
            hidden = target(torch.tensor([prefix]))[0]  # row -2 read the token before, row -1 the token itself
            if int(target.logits(hidden[-2]).argmax()) == token:
                sources.append("exact")
            elif head.score(hidden[-1]) > threshold and token not in stop:
                sources.append("judge")
            else:
                break
            tokens = prefix
            if i == K - 1:
                break
        tokens += greedy(target, tokens, 1)
        sources.append("target")
    return tokens[len(prompt):][:n], sources[:n]


DRAFTS = {"identical": 0.0, "good": 0.02, "bad": 0.3}


@pytest.mark.parametrize("K", [1, 2, 5, 16])
@pytest.mark.parametrize("draft", DRAFTS)
def test_exact_rule_is_plain_greedy_token_for_token(K, draft):
    target = random_model(1)
    engine = Engine(target, near(target, DRAFTS[draft]), speculate_k=K, stop_tokens=(), max_seq_length=128)
    assert run(engine, n=60) == greedy(target, PROMPT, 60)
    stats = engine.stats
    assert stats["rule"] == "exact" and stats["accepted_judge"] == 0
    if draft == "identical":  # every block whole: this fails when the draft's cache lacks the last token's row
        assert stats["rounds"] == -(-59 // (K + 1))
    if draft == "bad":
        assert stats["accepted_per_round"] < 0.5 * K


@pytest.mark.parametrize("K", [1, 4, 9])
def test_threshold_one_is_the_exact_rule(K):
    target = random_model(1)
    draft, head = near(target, 0.05), random_head(32, bias=50.0)  # a head that finds everything correct
    engine = Engine(target, draft, head, threshold=1.0, speculate_k=K, stop_tokens=(), max_seq_length=128)
    assert run(engine) == greedy(target, PROMPT, 40)
    assert engine.stats["accepted_judge"] == 0
    engine = Engine(target, draft, head, speculate_k=K, stop_tokens=(), max_seq_length=128)
    assert run(engine) != greedy(target, PROMPT, 40)


@pytest.mark.parametrize("K", [1, 3, 8])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_judge_rule_follows_its_definition(K, threshold):
    target = random_model(1)
    draft, head = near(target, 0.1), random_head(32)
    engine = Engine(target, draft, head, threshold=threshold, speculate_k=K, stop_tokens=(), max_seq_length=128)
    blocks = list(engine.generate(PROMPT, max_new_tokens=40))
    tokens, sources = judged(target, draft, head, PROMPT, 40, K, threshold)
    assert [t for b in blocks for t in b.tokens] == tokens
    assert [s for b in blocks for s in b.sources] == sources
    assert sources.count("judge") == engine.stats["accepted_judge"] > 0
    assert sources.count("exact") == engine.stats["accepted_exact"]


def noise(model: Transformer, start: int) -> None:
    for layer in model.layers:
        for rows in (layer.self_attn.cache.k, layer.self_attn.cache.v):
            rows[:, :, start:] = 1e3 * torch.randn(rows[:, :, start:].shape)


def test_no_answer_depends_on_dead_rows():
    target = random_model(1)
    draft, head = near(target, 0.1), random_head(32)

    def answer(poison: bool) -> list[int]:
        engine = Engine(target, draft, head, speculate_k=6, stop_tokens=(), max_seq_length=128)
        tokens, last = [], 0
        if poison:
            noise(target, 0)
            noise(draft, 0)
        for block in engine.generate(PROMPT, max_new_tokens=50):
            tokens += block.tokens
            last = len(PROMPT) + len(tokens) - 1  # position of the last committed token, which no model has read yet
            if poison:
                noise(target, last)
                noise(draft, last - 1)  # of a block that was accepted whole, the draft has not read the last token
        return tokens

    assert answer(poison=True) == answer(poison=False)


@pytest.mark.parametrize("position", [1, 4, 9])
def test_stop_token_ends_the_answer_inside_a_block(position):
    target = random_model(1)
    reference = greedy(target, PROMPT, 40)
    stop = reference[position]
    end = reference.index(stop) + 1
    engine = Engine(target, near(target, 0.0), speculate_k=16, stop_tokens=(stop,), max_seq_length=128)
    assert run(engine) == reference[:end]
    stats = engine.stats
    assert stats["finish_reason"] == "stop" and stats["tokens"][-1] == stop
    assert stats["new_tokens"] == end and end < 17
    assert round(stats["accepted_per_round"] * stats["rounds"]) <= end - 1  # what was cut off is not counted


def test_judge_never_rescues_a_stop_token():
    target = random_model(1)
    draft, head = near(target, 0.3), random_head(32, bias=50.0)
    free = Engine(target, draft, head, speculate_k=8, stop_tokens=(), max_seq_length=128)
    blocks = list(free.generate(PROMPT, max_new_tokens=40))
    rescued = [t for b in blocks for t, s in zip(b.tokens, b.sources) if s == "judge"]
    stop = (rescued[0],)
    engine = Engine(target, draft, head, speculate_k=8, stop_tokens=stop, max_seq_length=128)
    blocks = list(engine.generate(PROMPT, max_new_tokens=40))
    assert not [t for b in blocks for t, s in zip(b.tokens, b.sources) if s == "judge" and t in stop]
    expected, _ = judged(target, draft, head, PROMPT, 40, 8, 0.5, stop)
    got = [t for b in blocks for t in b.tokens]
    assert got == expected[:len(got)] and (len(got) == 40 or got[-1] in stop)


@pytest.mark.parametrize("n", [1, 2, 17, 23])
def test_max_new_tokens_cuts_inside_a_block(n):
    target = random_model(1)
    engine = Engine(target, near(target, 0.0), speculate_k=16, stop_tokens=(), max_seq_length=128)
    assert run(engine, n=n) == greedy(target, PROMPT, n)
    stats = engine.stats
    assert stats["finish_reason"] == "length"
    assert stats["new_tokens"] == n == 1 + round(stats["rounds"] * stats["tokens_per_round"])
    assert len(stats["acceptance_by_position"]) == 16


def test_answers_reach_the_end_of_the_context():
    target = random_model(1)
    engine = Engine(target, near(target, 0.0), speculate_k=7, stop_tokens=(), max_seq_length=33)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = run(engine, n=500)
    assert tokens == greedy(target, PROMPT, 29)
    assert "outgrow the context of 33" in str(caught[0].message)
    with pytest.raises(ValueError, match="the prompt has 33 tokens and the context holds 33"):
        run(engine, prompt=[1] * 33)


def test_chat_keeps_its_cache_and_says_the_same():
    target = random_model(1)
    draft = near(target, 0.05)
    engine = Engine(target, draft, speculate_k=4, stop_tokens=(), max_seq_length=256)
    history = [*PROMPT, *run(engine, n=20)]
    read = []
    hooks = [m.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1])) for m in (target, draft)]
    second = run(engine, prompt=[*history, 3, 4], n=1, keep_cache=True)
    for hook in hooks:
        hook.remove()
    assert sum(read) <= 2 * 4  # the two new tokens and at most two old ones, in each model
    assert second == greedy(target, [*history, 3, 4], 1)
    edited = [*history[:9], 8, 8]
    assert run(engine, prompt=edited, n=20, keep_cache=True) == greedy(target, edited, 20)
    run(engine, prompt=[*history, 5], n=8, rule="none", keep_cache=True)
    assert run(engine, prompt=[*history, 5, 6], n=12, keep_cache=True) == greedy(target, [*history, 5, 6], 12)


def test_consumer_that_stops_early_leaves_a_usable_engine():
    target = random_model(1)
    engine = Engine(target, near(target, 0.05), speculate_k=4, stop_tokens=(), max_seq_length=128)
    for _ in engine.generate(PROMPT, max_new_tokens=40):
        break
    assert engine.stats["new_tokens"] == 1
    assert run(engine) == greedy(target, PROMPT, 40)


def test_nonfinite_logits_raise_before_any_token():
    target = random_model(1)
    draft = near(target, 0.0)
    engine = Engine(target, draft, speculate_k=4, stop_tokens=(), max_seq_length=128)
    answer = engine.generate(PROMPT, max_new_tokens=20)
    next(answer)
    target.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        next(answer)
    with pytest.raises(FloatingPointError):
        run(engine)


# ---- sampling

# Drafts far from the target, so that few samples tell: of each, IgnoresQ adds 3.5 to chi-square (its
# noncentrality, by enumeration), 2,800 in all, where 70 is p = 1e-6 and 25 what chance brings.
SAMPLES, VOCABULARY = 800, 5


def pair_distribution(target: Transformer, temperature: float, top_k: int | None) -> torch.Tensor:
    """Exact distribution of the second and third new token, by enumeration of the target alone."""
    def step(tokens):
        return probs(target.logits(target(torch.tensor([tokens]))[0, -1]), temperature, top_k).double()

    joint = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    for a in range(VOCABULARY):
        first = step([1, 2])[a]
        for b in range(VOCABULARY):
            joint[b] += first * step([1, 2, a])[b] * step([1, 2, a, b])
    return joint


def sampled_p_value(engine: Engine, temperature: float, top_k: int | None) -> float:
    """Chi-square of the second and third new token of many answers against the target's own distribution."""
    from scipy.stats import chisquare

    counts = torch.zeros(VOCABULARY, VOCABULARY)
    for seed in range(SAMPLES):
        _, b, c = run(engine, prompt=[1, 2], n=3, temperature=temperature, top_k=top_k, seed=seed)
        counts[b, c] += 1
    expected = pair_distribution(engine.target, temperature, top_k) * SAMPLES
    assert counts[expected == 0].sum() == 0  # what top-k excludes never comes
    kept = expected >= 5
    observed = torch.cat((counts[kept], counts[~kept].sum()[None])).double()
    wanted = torch.cat((expected[kept], expected[~kept].sum()[None]))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    return chisquare(observed.numpy(), (wanted * observed.sum() / wanted.sum()).numpy()).pvalue


def sampling_pair() -> tuple[Transformer, Transformer]:
    return tuple(random_model(seed, vocab_size=VOCABULARY, num_layers=1, spread=0.35) for seed in (11, 10))


class IgnoresQ(ModelDrafter):
    """Says that it drew uniformly. (A one-hot q in its place would be lossless too, only wasteful.)"""

    def propose(self, state, draws):
        drafted, q = super().propose(state, draws)
        return drafted, torch.full_like(q, 1 / q.shape[-1])


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.6, 3)])
@torch.no_grad()
def test_sampled_speculation_has_the_targets_distribution(temperature, top_k):
    engine = Engine(*sampling_pair(), speculate_k=2, stop_tokens=(), max_seq_length=16)
    assert sampled_p_value(engine, temperature, top_k) > 0.001


@torch.no_grad()
def test_the_chi_square_is_strong_enough_to_see_q_ignored():
    target, draft = sampling_pair()
    engine = Engine(target, IgnoresQ(draft), speculate_k=2, stop_tokens=(), max_seq_length=16)
    assert sampled_p_value(engine, 1.0, None) < 1e-6


def test_threshold_one_is_the_exact_rule_when_sampling():
    target = random_model(1)
    draft, options = near(target, 0.3), {"speculate_k": 4, "stop_tokens": (), "max_seq_length": 128}
    exact, judge = Engine(target, draft, **options), Engine(target, draft, random_head(32, bias=9.0), threshold=1.0, **options)
    for seed in range(5):
        assert run(exact, temperature=0.9, seed=seed) == run(judge, temperature=0.9, seed=seed)
        assert judge.rule == "judge" and judge.stats["accepted_judge"] == 0 < judge.stats["accepted_exact"]


def test_seeds_repeat_and_differ():
    target = random_model(1)
    engine = Engine(target, near(target, 0.1), speculate_k=4, stop_tokens=(), max_seq_length=128)
    one, two, three = (run(engine, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == two != three


def test_top_k_one_is_greedy():
    target = random_model(1)
    engine = Engine(target, near(target, 0.1), speculate_k=4, stop_tokens=(), max_seq_length=128)
    assert run(engine, temperature=1.0, top_k=1) == greedy(target, PROMPT, 40)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 5, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rule", ["none", "exact", "judge"])
def test_a_round_in_flight_changes_nothing(rule, sampling):
    """The next round launched before the last is read: the same blocks and statistics, also in a chat's next turn."""
    target = random_model(1)
    draft, head, seen = near(target, 0.1), random_head(32), []
    for ahead in (0, 1, 3):
        engine = Engine(target, draft, head, speculate_k=3, max_seq_length=160, stop_tokens=(11, 23))
        engine.ahead, answers = ahead, []
        target.setup_caches(1, 160 + 8 + 4 * ahead)
        for prompt, keep in ((PROMPT, False), ([*PROMPT, 30, 31, 32], True)):
            blocks = list(engine.generate(prompt, max_new_tokens=50, rule=rule, keep_cache=keep, **sampling))
            answers.append((blocks, {k: v for k, v in engine.stats.items() if "second" not in k and "share" not in k}))
        seen.append(answers)
    assert seen[0] == seen[1] == seen[2]


def test_a_round_in_flight_stays_inside_the_caches():
    """An answer that fills the length, every draft token kept: the flight beyond its end writes the last rows there are."""
    target = random_model(1)
    engine = Engine(target, near(target, 0.0), speculate_k=6, stop_tokens=(), max_seq_length=64)
    engine.ahead = 1
    assert run(engine, n=60) == greedy(target, PROMPT, 60)  # a row outside would be an IndexError on a CPU


# Alike in all tests that compile: what one has compiled, the others find in Inductor's cache.
COMPILED = dict(speculate_k=4, stop_tokens=(), max_seq_length=512)


@pytest.mark.skipif(can_compile(torch.device("cpu")) is not None, reason="no C++ compiler")
def test_no_prompt_length_compiles_anew(monkeypatch):
    """After the warm-up, 20 prompts of other lengths, some in several chunks and from an empty to a full cache."""
    from torch._dynamo.utils import counters
    monkeypatch.setattr(drafter, "PREFILL_CHUNK", 128)
    target = random_model(1, num_layers=1)
    models = target, near(target, 0.1), random_head(32)
    engine, plain = Engine(*models, compile=True, **COMPILED), Engine(*models, **COMPILED)
    generator = torch.Generator().manual_seed(0)
    engine.warmup(rules=("none", "judge"))
    compiled = counters["stats"]["unique_graphs"]
    for length in [1, 2, 3, 15, 16, 17, 40, 63, 64, 65, 100, 127, 128, 129, 130, 200, 256, 272, 333, 503]:
        prompt = torch.randint(0, 40, (length,), generator=generator).tolist()
        for rule in ("none", "judge"):
            if length in (17, 272):
                assert run(engine, prompt, 9, rule=rule) == run(plain, prompt, 9, rule=rule)
            else:
                run(engine, prompt, 9, rule=rule)
        assert counters["stats"]["unique_graphs"] == compiled, length


gpu_test = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu_test
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 20, "seed": 3}], ids=["greedy", "sampled"])
def test_graphs_change_no_token(sampling):
    """Recorded rounds against the same rounds launched one by one, compiled and not; and acceptance with them."""
    draft, target = near(random_model(1), 0.1).cuda(), random_model(1).cuda()
    head, answers = random_head(32), []
    options = dict(speculate_k=3, stop_tokens=(), max_seq_length=128)
    for compile, record in ((True, True), (True, False), (False, False)):
        engine = Engine(target, draft, head, compile=compile, **options)
        engine.record = record
        for rule in ("none", "exact", "judge"):
            for _ in range(2):  # a graph's second answer reads what the first left
                answers.append((rule, run(engine, rule=rule, **sampling), engine.stats["accepted_per_round"]))
    assert all(answer == next(a for a in answers if a[0] == answer[0]) for answer in answers)


@gpu_test
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9}], ids=["greedy", "sampled"])
def test_a_round_waits_for_nothing(sampling):
    """CUDA's sync debug mode raises where the host would wait."""
    draft, target = near(random_model(1), 0.1).cuda(), random_model(1).cuda()
    engine = Engine(target, draft, random_head(32), speculate_k=3, stop_tokens=(), max_seq_length=128)
    run(engine, **sampling)
    draws = Sampling(engine.temperature if sampling else None, None, engine.generator)
    state = State(torch.tensor([5, 7], device="cuda"), torch.tensor(9, device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rule in ("judge", "none", "judge"):
            state, outcome = Round(engine, engine.rules[rule], draws)(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(outcome.tolist()) == 3 * 3 + 3


def test_compiled_steps_give_the_same_tokens():
    if can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    target = random_model(1, num_layers=1)
    draft, head = near(target, 0.1), random_head(32)
    plain, compiled = (Engine(target, draft, head, compile=c, **COMPILED) for c in (False, True))
    for sampling in ({}, {"temperature": 0.9, "top_k": 20, "seed": 3}):
        assert run(plain, **sampling) == run(compiled, **sampling)
        assert plain.stats["accepted_judge"] == compiled.stats["accepted_judge"] > 0


# ---- what is checked before work starts

@pytest.mark.parametrize("options, message", [
    ({"speculate_k": 0}, "got speculate_k 0"), ({"speculate_k": 65}, "got speculate_k 65"),
    ({"threshold": 1.5}, r"got threshold 1.5, expected a number in \[0, 1\]"), ({"threshold": -0.1}, "got threshold -0.1"),
    ({"draft": None}, "got rule 'judge' without a draft"), ({"rule": "kl"}, "got 'kl', expected one of exact, judge"),
    ({"judge": None, "threshold": 0.5, "rule": "exact"}, "got 0.5, expected none with rule exact"), ({"judge": random_head(48)}, "48.*32|32.*48")])
def test_pieces_that_do_not_fit(options, message):
    target = random_model(1)
    options = {"draft": target, "judge": random_head(32), "speculate_k": 4} | options
    with pytest.raises(ValueError, match=message):
        Engine(target, options.pop("draft"), options.pop("judge"), **options)


def test_vocabularies_must_agree():
    with pytest.raises(ValueError, match="vocabulary of 96 and a target with 97"):
        check_fit(random_model(1).config, random_model(1, vocab_size=96).config, None, 4)


@pytest.mark.parametrize("options, message", [
    ({"temperature": -1.0}, "got temperature -1.0"), ({"temperature": float("nan")}, "got temperature nan"),
    ({"top_k": 0}, "got top_k 0"), ({"n": 0}, "got max_new_tokens 0"), ({"prompt": []}, "empty prompt"),
    ({"rule": "judge"}, "got rule 'judge'")])
def test_options_out_of_range(options, message):
    engine = Engine(random_model(1), stop_tokens=(), max_seq_length=64)
    with pytest.raises(ValueError, match=message):
        run(engine, **options)


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint):
    """A target, a draft of the same tokenizer, and a head in the target's directory."""
    target, draft = tiny_checkpoint(seed=0), tiny_checkpoint(seed=1, hidden_size=32)
    random_head(64).save(target / "judge.safetensors")
    return target, draft


def cli(*arguments, env=None, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "generate.py"), *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, **(env or {})}, timeout=300, **options)


def prepare_error(*arguments) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        generate.main(generate.parse_args([*map(str, arguments)]))
    return str(caught.value)


def test_every_mistake_is_named_before_weights_load(checkpoints, tiny_checkpoint, tmp_path, monkeypatch):
    target, draft = checkpoints

    def no_weights(*_, **__):
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(Transformer, "from_checkpoint", no_weights)
    pair = ("--checkpoint_path", target, "--draft_checkpoint_path", draft, "--no-compile")
    assert "context holds 512" in prepare_error(*pair, "--prompt", "word " * 600)
    assert "got speculate_k 0" in prepare_error(*pair, "--speculate_k", 0)
    assert "got threshold 2.0" in prepare_error(*pair, "--judge", "--threshold", 2)
    assert "got temperature -1.0" in prepare_error(*pair, "--temperature", -1)
    assert "got top_k 0" in prepare_error(*pair, "--top_k", 0)
    assert "got max_new_tokens 0" in prepare_error(*pair, "--max_new_tokens", 0)
    assert "got num_samples 0" in prepare_error(*pair, "--num_samples", 0)
    assert "--judge without a draft" in prepare_error("--checkpoint_path", target, "--judge")
    assert "without --checkpoint_path" in prepare_error("--draft_checkpoint_path", draft)
    assert "does not exist; make it first" in prepare_error(*pair, "--json", tmp_path / "no" / "out.json")
    assert "cannot be written" in prepare_error(*pair, "--json", tmp_path)
    assert "does not exist; make it first" in prepare_error(*pair, "--profile", tmp_path / "no" / "trace.json")
    assert "expected cpu, cuda" in prepare_error(*pair, "--device", "tpu")
    assert "CUDA devices" in prepare_error(*pair, "--device", "cuda:97")
    assert "float16 on a CPU" in prepare_error(*pair, "--dtype", "float16", "--device", "cpu")
    assert "--system" in prepare_error(*pair, "--raw", "--system", "Be brief.")

    assert "got no file" in prepare_error(*pair, "--judge", tmp_path / "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(os.urandom(64))
    assert "broken or foreign" in prepare_error(*pair, "--judge", tmp_path / "junk.safetensors")
    random_head(48).save(tmp_path / "other.safetensors")
    assert re.search("hidden size 48 .*64", prepare_error(*pair, "--judge", tmp_path / "other.safetensors"))
    bare = tiny_checkpoint()
    message = prepare_error("--checkpoint_path", bare, "--draft_checkpoint_path", draft, "--judge")
    assert "no judge.safetensors" in message and "python train_head.py" in message

    raw = json.loads((bare / "tokenizer.json").read_text())
    raw["added_tokens"][-1]["content"] = "<|another|>"
    (bare / "tokenizer.json").write_text(json.dumps(raw))
    mixed = ("--checkpoint_path", target, "--draft_checkpoint_path", bare)
    assert "special tokens of draft and target differ" in prepare_error(*mixed)
    assert "does not exist" in prepare_error("--checkpoint_path", tmp_path)


# ---- the command line, as a user runs it

KEYS = {"prompt", "text", "tokens", "prompt_tokens", "new_tokens", "finish_reason", "seconds", "seconds_to_first_token",
        "tokens_per_second", "rounds", "tokens_per_round", "accepted_per_round", "accepted_exact", "accepted_judge",
        "acceptance_by_position", "sources", "scores", "rule", "speculate_k", "threshold", "temperature", "top_k", "seed", "device", "dtype",
        "compiled", "world_size"}


def test_command_line_writes_json(checkpoints, tmp_path):
    target, draft = checkpoints
    out = tmp_path / "out.json"
    done = cli("--checkpoint_path", target, "--draft_checkpoint_path", draft, "--judge", "--prompt", "hello there",
               "--no-compile", "--num_samples", 2, "--temperature", 0.9, "--top_k", 30, "--max_new_tokens", 24, "--json", out,
               "--dtype", "float32", "--speculate_k", 4, "--profile", tmp_path / "trace.json")
    assert done.returncode == 0, done.stderr
    samples = json.loads(out.read_text())
    assert len(samples) == 2 and all(KEYS <= sample.keys() for sample in samples)
    assert [s["seed"] for s in samples] == [0, 1] and samples[0]["tokens"] != samples[1]["tokens"]
    for s in samples:
        assert s["rule"] == "judge" and s["threshold"] == 0.5 and s["prompt"] == "hello there" and s["speculate_k"] == 4
        assert s["text"] == Tokenizer.from_checkpoint(target).decode(s["tokens"], skip_special=True)
        assert s["text"].strip() in done.stdout
    assert "\033" not in done.stdout and "tokens/round" in done.stdout
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "trace.json"]


def test_command_line_errors_are_one_line_and_exit_2(checkpoints):
    target, draft = checkpoints
    done = cli("--checkpoint_path", target, "--draft_checkpoint_path", draft, "--speculate_k", 0)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("generate.py: got speculate_k 0")
    with pytest.raises(SystemExit, match="2"):
        generate.parse_args(["--top_k", "many"])


def main(monkeypatch, *arguments, **streams) -> None:
    """The command line in this process: a new one takes seconds to import torch."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command line sets
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    generate.main(generate.parse_args([*map(str, arguments), "--device", "cpu"]))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_interactive_reads_turns_until_end_of_input(checkpoints, tmp_path, monkeypatch):
    target, draft = checkpoints
    out = tmp_path / "chat.json"
    main(monkeypatch, "--checkpoint_path", target, "--draft_checkpoint_path", draft, "--interactive", "--no-compile",
         "--max_new_tokens", 12, "--json", out, "--dtype", "float32", "--system", "Be brief.",
         stdin=io.StringIO("hello\nand then?\n"))
    first, second = json.loads(out.read_text())
    assert [first["prompt"], second["prompt"]] == ["hello", "and then?"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["new_tokens"]


def test_colours_tell_who_wrote_what(checkpoints, monkeypatch):
    """In a terminal of its own, and in this process where the reader wants no colour."""
    pty = pytest.importorskip("pty")
    target, draft = checkpoints
    arguments = ["--checkpoint_path", target, "--draft_checkpoint_path", draft, "--judge", "--no-compile", "--prompt", "hello",
                 "--max_new_tokens", 24, "--dtype", "float32"]
    ours, theirs = pty.openpty()
    base = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    process = subprocess.Popen([sys.executable, str(ROOT / "generate.py"), *map(str, arguments)], stdout=theirs,
                               stderr=theirs, env={**base, "TERM": "xterm-256color"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux reports the closed terminal this way
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    coloured = shown.decode()
    assert process.wait() == 0, coloured
    assert terminal.STYLES["lossy"] in coloured and terminal.STYLES["target"] in coloured and "kept by the judge" in coloured

    monkeypatch.setenv("TERM", "xterm-256color")
    for unwanted in ("1", ""):
        monkeypatch.setenv("NO_COLOR", unwanted)
        screen = Terminal()
        main(monkeypatch, *arguments, stdout=screen)
        assert ("\033[" in screen.getvalue()) == (not unwanted)


def test_no_compiler_is_said_and_runs_uncompiled(checkpoints, tmp_path, monkeypatch, capsys):
    target, _ = checkpoints
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    main(monkeypatch, "--checkpoint_path", target, "--max_new_tokens", 3, "--prompt", "hello")
    said = capsys.readouterr().err
    assert "no C++ compiler" in said and "compiling" not in said


def test_everything_but_cuda_runs_without_triton(checkpoints):
    target, draft = checkpoints
    arguments = ["--checkpoint_path", str(target), "--draft_checkpoint_path", str(draft), "--judge", "--no-compile",
                 "--max_new_tokens", "5", "--device", "cpu", "--prompt", "hi"]
    code = f"import sys; sys.modules['triton'] = None; import generate; generate.main(generate.parse_args({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        generate.parse_args(["--help"])
    said = capsys.readouterr().out
    for word in ("--judge", "--threshold", "--speculate_k", "bundled pair", "default"):
        assert word in said


def test_blocks_and_sources_line_up():
    target = random_model(1)
    engine = Engine(target, near(target, 0.1), random_head(32), speculate_k=5, stop_tokens=(), max_seq_length=128)
    blocks = list(engine.generate(PROMPT, max_new_tokens=30))
    assert blocks[0].sources == ["target"] and len(blocks[0].tokens) == 1
    for block in blocks[1:-1]:
        assert len(block.tokens) == len(block.sources) <= 6 and block.sources[-1] == "target"
        assert "target" not in block.sources[:-1]
    counts = collections.Counter(itertools.chain.from_iterable(b.sources for b in blocks))
    assert counts["exact"] == engine.stats["accepted_exact"] and counts["judge"] == engine.stats["accepted_judge"]


# ---- the books of an answer, without a model

def outcome(drafted: list[int], token: int, a: int, *, status: int = 0, sources=None, scores=None) -> list[float]:
    return [float(n) for n in (*drafted, token, a, status, *(sources or [1] * len(drafted)),
                               *(scores or [0.25] * len(drafted)))]


def test_an_answer_cuts_counts_and_ends():
    answer = Answer(9, (7,), 3, "judge")
    assert answer.add(outcome([], 5, 0)) == ([5], ["target"]) and answer.rounds == 0 and not answer.done
    assert answer.wants(7) and not answer.wants(8)
    block = answer.add(outcome([1, 2, 3], 4, 2, sources=[1, 2, 0], scores=[0.5, 0.75, 0.125]))
    assert block == ([1, 2, 4], ["exact", "judge", "target"])
    assert answer.add(outcome([1, 7, 3], 4, 3)) == ([1, 7], ["exact", "exact"])  # cut behind the stop token
    assert answer.done and answer.stopped
    s = answer.statistics()
    assert s["tokens"] == [5, 1, 2, 4, 1, 7] and s["scores"] == [None, 0.5, 0.75, None, 0.25, 0.25]
    assert s["sources"] == ["target", "exact", "judge", "target", "exact", "exact"]
    assert (s["rounds"], s["accepted_exact"], s["accepted_judge"]) == (2, 3, 1)
    assert s["tokens_per_round"] == 2.5 and s["accepted_per_round"] == 2 and s["finish_reason"] == "stop"
    assert s["acceptance_by_position"] == [1, 1, 0]


def test_an_answer_ends_at_its_length_inside_a_block():
    answer = Answer(3, (), 2, "exact")
    answer.add(outcome([], 5, 0))
    assert answer.add(outcome([1, 2], 3, 2)) == ([1, 2], ["exact", "exact"]) and answer.done
    s = answer.statistics()
    assert s["finish_reason"] == "length" and s["acceptance_by_position"] == [1, 1] and s["new_tokens"] == 3
    assert s["scores"] == [None] * 3  # no lossy rule, no scores


def test_same_thresholds_are_the_scores_that_could_turn():
    """The highest score that a round was cut before, and the lowest that the rule alone kept."""
    answer = Answer(30, (7,), 3, "judge")
    answer.add(outcome([], 5, 0))
    assert answer.statistics()["same_thresholds"] == [0.0, None]  # nothing was decided yet
    answer.add(outcome([1, 2, 3], 4, 3, sources=[1, 1, 1], scores=[0.125, 0.25, 0.0625]))
    assert answer.statistics()["same_thresholds"] == [0.0, None]  # exact: scores have no say
    answer.add(outcome([1, 2, 3], 4, 2, sources=[2, 1, 0], scores=[0.75, 0.125, 0.25]))
    assert answer.statistics()["same_thresholds"] == [0.25, 0.75]
    # what lies behind the cut does not count, nor does a lower refused or a higher kept score
    answer.add(outcome([1, 2, 3], 4, 0, sources=[0, 0, 2], scores=[0.125, 0.5, 0.625]))
    answer.add(outcome([1, 2, 3], 4, 1, sources=[2, 0, 2], scores=[0.875, 0.1875, 0.6875]))
    assert answer.statistics()["same_thresholds"] == [0.25, 0.75]
    # a whole block has no cut; a refused stop token is one that no threshold keeps
    answer.add(outcome([1, 2, 3], 4, 3, sources=[2, 1, 2], scores=[0.6875, 0.0, 0.71875]))
    answer.add(outcome([1, 7, 3], 4, 1, sources=[1, 0, 1], scores=[0.5, 0.5625, 0.5]))
    assert answer.statistics()["same_thresholds"] == [0.25, 0.6875]


@pytest.mark.parametrize(("new", "same"), [(2, [0.0, None]), (3, [0.0, 0.625]), (4, [0.25, 0.625])])
def test_same_thresholds_end_with_the_answer(new, same):
    """A cut, or a kept token, beyond max_new_tokens turns nothing."""
    answer = Answer(new, (), 3, "judge")
    answer.add(outcome([], 5, 0))
    answer.add(outcome([1, 2, 3], 4, 2, sources=[1, 2, 0], scores=[0.5, 0.625, 0.25]))
    assert answer.done and answer.statistics()["same_thresholds"] == same


def test_same_thresholds_end_with_a_stop_token():
    answer = Answer(30, (7,), 3, "judge")
    answer.add(outcome([], 5, 0))
    answer.add(outcome([1, 7, 3], 4, 2, sources=[2, 1, 0], scores=[0.75, 0.5, 0.625]))
    assert answer.stopped and answer.statistics()["same_thresholds"] == [0.0, 0.75]


@pytest.mark.parametrize("rule", ["none", "exact"])
def test_no_thresholds_without_a_lossy_rule(rule):
    answer = Answer(3, (), 2, rule)
    answer.add(outcome([], 5, 0))
    answer.add(outcome([1, 2], 3, 1))
    assert answer.statistics()["same_thresholds"] is None


def thresholds_of(target: Transformer, draft: Transformer, head: JudgeHead, stats: dict, K: int,
                  stop: tuple[int, ...]) -> tuple[list[float], list[float], list[float]]:
    """Scores without a cache, round by round: refused, kept by the judge alone, refused stops."""
    refused, kept, stops, tokens, at = [], [], [], [*PROMPT, stats["tokens"][0]], 1
    while at < len(stats["tokens"]):
        for token in greedy(draft, tokens, K):
            hidden = target(torch.tensor([[*tokens, token]]))[0]
            exact = int(target.logits(hidden[-2]).argmax()) == token
            if at == len(stats["tokens"]):
                return refused, kept, stops
            if token != stats["tokens"][at] or stats["sources"][at] == "target":
                (stops if token in stop else refused).append(head.score(hidden[-1]).item())
                break
            if not exact:
                kept.append(head.score(hidden[-1]).item())
            tokens, at = [*tokens, token], at + 1
        if at < len(stats["tokens"]):
            tokens, at = [*tokens, stats["tokens"][at]], at + 1
    return refused, kept, stops


@torch.no_grad()
def test_same_thresholds_of_an_engine_agree_with_scores_without_a_cache():
    target = random_model(1)
    draft, head, seen = near(target, 0.1), random_head(32), 0
    free = Engine(target, draft, head, speculate_k=4, stop_tokens=(), max_seq_length=128)
    run(free)
    wanted = set(range(97)) - set(free.stats["tokens"])  # drafts' tokens that were refused, too
    for stop in ((), tuple(wanted)):
        for threshold in (0.3, 0.5, 0.7):
            engine = Engine(target, draft, head, speculate_k=4, stop_tokens=stop,
                            threshold=threshold, max_seq_length=128)
            run(engine)
            low, high = engine.stats["same_thresholds"]
            refused, kept, stops = thresholds_of(target, draft, head, engine.stats, 4, stop)
            assert low == pytest.approx(max(refused, default=0.0), abs=1e-5)
            assert high == pytest.approx(min(kept, default=None), abs=1e-5)
            assert low <= threshold and (high is None or threshold < high)
            seen += max(stops, default=0.0) > threshold  # it would have left nothing of [low, high)
    assert seen


def test_an_answer_refuses_a_round_that_is_not_finite():
    answer = Answer(3, (), 2, "exact")
    with pytest.raises(FloatingPointError, match="not finite"):
        answer.add(outcome([1, 2], 3, 1, status=1))
    assert not answer.tokens


# ---- seams: rules and drafters

class Often(Rule):
    """Keeps what the target gives a probability above `least`, and what the draft was sure of."""

    name, needs_probs, needs_draft_probs = "often", True, True

    def __init__(self, least: float):
        self.least = least

    def score(self, seen):
        column = seen.drafted[:, None]
        p, q = (x[:len(column)].gather(1, column)[:, 0] for x in (seen.probs, seen.draft_probs))
        return ((p > self.least) & (q > self.least)).float()


@torch.no_grad()
def often(target, draft, n, K, least):
    """The rule by its definition: no cache, one candidate at a time."""
    tokens, sources = [*PROMPT, *greedy(target, PROMPT, 1)], ["target"]
    while len(tokens) < len(PROMPT) + n:
        for token in greedy(draft, tokens, K):
            p, q = (m.logits(m(torch.tensor([tokens]))[0, -1]).softmax(-1) for m in (target, draft))
            if int(p.argmax()) != token and not (p[token] > least and q[token] > least):
                break
            sources.append("exact" if int(p.argmax()) == token else "often")
            tokens.append(token)
        tokens += greedy(target, tokens, 1)
        sources.append("target")
    return tokens[len(PROMPT):][:n], sources[:n]


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.skipif(
    can_compile(torch.device("cpu")) is not None, reason="no C++ compiler"))])
def test_a_rule_of_ones_own_runs_by_its_definition(compile):
    target = random_model(1, num_layers=1)
    draft = near(target, 0.1)
    engine = Engine(target, draft, rule=Often(0.05), **COMPILED, compile=compile)
    blocks = list(engine.generate(PROMPT, max_new_tokens=40))
    tokens, sources = often(target, draft, 40, 4, 0.05)
    assert [t for b in blocks for t in b.tokens] == tokens and [s for b in blocks for s in b.sources] == sources
    assert engine.rule == "often" and engine.stats["accepted_judge"] == sources.count("often") > 0
    assert run(engine, rule=Often(2.0)) == run(engine, rule="exact") == greedy(target, PROMPT, 40)
    assert run(engine, temperature=0.8, rule=Often(2.0)) == run(engine, temperature=0.8, rule="exact")
    run(engine, temperature=0.8)
    assert engine.stats["accepted_judge"] > 0


class Every(Rule):
    name, overrules = "every", True

    def __init__(self, keep: list[float], on_host: bool = False):
        self.keep, self.on_host = torch.tensor(keep), on_host

    def score(self, seen):
        return torch.tensor([self.keep[i].item() for i in range(len(seen.drafted))]) if self.on_host else self.keep


@pytest.mark.parametrize("on_host", [False, True])
def test_a_rule_may_overrule_the_exact_one(on_host):
    """A draft that is always right, of which just two tokens stay: forced acceptance."""
    target = random_model(1)
    engine = Engine(target, near(target, 0.0), speculate_k=4, stop_tokens=(), max_seq_length=128)
    assert run(engine, n=31, rule=Every([1, 1, 0, 1], on_host)) == greedy(target, PROMPT, 31)
    assert engine.stats["tokens_per_round"] == 3 and engine.stats["accepted_exact"] == 0


def lookup(ids: list[int], K: int, ngram: int = 3) -> list[int]:
    """Prompt lookup as one would write it first."""
    n, best = len(ids) - 1, (-1, -1)
    for end in range(n):
        length = 0
        while length < ngram and length <= end and ids[end - length] == ids[n - length]:
            length += 1
        best = max(best, (length, end))
    return [ids[best[1] + 1 + i % (n - best[1])] for i in range(K)]


def test_lookup_proposes_what_followed_before():
    target = random_model(1)
    drafter_ = LookupDrafter()
    drafter_.setup(target, 5, 64, False)
    generator = torch.Generator().manual_seed(0)
    for length in (2, 3, 5, 9, 20, 40):
        ids = torch.randint(0, 3, (length,), generator=generator)
        drafter_.history.random_(0, 3)  # dead rows hold anything
        drafter_.prefill(ids[:-1], 0)
        state = State(ids[-2:], torch.tensor(length - 1))
        drafted, q = drafter_.propose(state, Sampling(None, None, generator))
        assert drafted.tolist() == lookup(ids.tolist(), 5) and q is None
        assert drafter_.history[:length + 5].tolist() == [*ids.tolist(), *drafted.tolist()]


@pytest.mark.parametrize("K", [1, 5, 16])
def test_lookup_is_lossless_also_in_a_chat(K):
    target = random_model(1, spread=0.6)
    engine = Engine(target, LookupDrafter(), speculate_k=K, stop_tokens=(), max_seq_length=256)
    prompt = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]
    first = run(engine, prompt, 60)
    assert first == greedy(target, prompt, 60) and engine.stats["accepted_exact"] > 0
    again = [*prompt, *first, 3, 4]
    assert run(engine, again, 30, keep_cache=True) == greedy(target, again, 30)
    assert run(engine, prompt, 40, temperature=1.0, top_k=1) == greedy(target, prompt, 40)


@torch.no_grad()
def test_sampling_with_lookup_has_the_targets_distribution():
    target, _ = sampling_pair()
    engine = Engine(target, LookupDrafter(), speculate_k=2, stop_tokens=(), max_seq_length=16)
    assert sampled_p_value(engine, 1.0, None) > 0.001
    assert engine.stats["rounds"] > 0
