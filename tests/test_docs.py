"""README and docs/: links and commands that work, tables that are fresh, examples that run.

Examples are taken from the pages themselves: the rule and the drafter of docs/hacking.md are
appended to a copy of the modules, its edit of the layer is applied to one. They run as a reader
would run them.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import drafter as drafters
import generate
import judge
import quantize
import train_head
from generate import Engine
from model import Transformer
from scripts import bench, bench_labels, calibrate, demo_pair, label, picture, report
from scripts.bench_tools import empty_model, weight_bytes
from terminal import DEMO, DEMO_PROMPT
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / page for page in report.PAGES]
HACKING = (ROOT / "docs" / "hacking.md").read_text(encoding="utf-8")
PLAINLY = ["--no-compile", "--no-compare", "--dtype", "float32", "--device", "cpu"]
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def code(text: str, language: str, beginning: str = "") -> str:
    """The only fenced block of a language that begins so."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    [block] = [block for block in blocks if block.startswith(beginning)]
    return block


KL, DRAFTER = code(HACKING, "python", "class KL"), code(HACKING, "python", "class Prompt")
QK_NORM = code(HACKING, "diff")


# pages

def test_readme_takes_ten_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=report.PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert links
    for link in (link for link in links if "://" not in link):
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {link}"


def commands(text: str) -> list[list[str]]:
    """What a page tells to type, but for what records say of themselves."""
    text = report.BLOCK.sub("", text)
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = [block.replace("$MAX", "100").replace("\\\n", " ") for block in blocks]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`((?:python|torchrun) [^`]+)`", text)
    parts = (shlex.split(part, comments=True) for line in lines for part in line.split(" && "))
    return [part for part in parts if part]


def test_commands_are_understood(monkeypatch):
    for rule in ("kl", "NAME"):  # the example's; a placeholder
        monkeypatch.setitem(judge.RULES, rule, judge.Rule)
    monkeypatch.setitem(drafters.DRAFTERS, "prompt", drafters.Drafter)
    parsers = {"generate.py": generate, "quantize.py": quantize, "train_head.py": train_head}
    parsers |= {f"scripts/{module.__name__.rpartition('.')[2]}.py": module
                for module in (bench, bench_labels, calibrate, demo_pair, label, picture, report)}
    found = [command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]
    found += map(shlex.split, [*report.COMMANDS.values(), *(command for _, command in report.GPU)])
    assert len(found) > 30
    for command in found:
        if command[0].startswith("./"):
            assert os.access(ROOT / command[0], os.X_OK), command
        elif command[0] in ("python", "torchrun"):
            at = next(i for i, word in enumerate(command) if word.endswith(".py"))
            try:
                with redirect_stdout(io.StringIO()):
                    parsers[command[at]].parse_args(command[at + 1:])
            except SystemExit as stop:
                assert not stop.code, " ".join(command)


@pytest.mark.slow
def test_train_a_judge_runs_on_the_bundled_pair(tmp_path):
    """The page's commands in their order, as written but for their counts, without compilation."""
    text = (ROOT / "docs" / "train-a-judge.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    script = "".join(block for block in blocks if "Llama" not in block and "torchrun" not in block)
    for written, small in (("build/judge-demo", str(tmp_path)), ("--problems 400", "--problems 14"),
                           ("--problems 100", "--problems 4"), ("--limit 100", "--limit 5"),
                           ("--max_regressions 0.03", "--max_regressions 0.3")):
        assert written in script
        script = script.replace(written, small)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-euxo", "pipefail", "-c", script], cwd=ROOT, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=900,
                          env=os.environ | {"PATH": path, "TORCHDYNAMO_DISABLE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert script.count("python ") == 10
    for said in ("hours at", "this head tells right from wrong with an AUC of",
                 "With 95% confidence, at threshold"):
        assert said in done.stdout


def test_examples_are_right_under_every_rule(monkeypatch):
    """README's Python runs as it stands; each rule solves its problem, and the one shown first."""
    monkeypatch.chdir(ROOT)
    scope, out = {}, io.StringIO()
    with redirect_stdout(out):
        exec(code((ROOT / "README.md").read_text(encoding="utf-8"), "python"), scope)
    assert re.search(r"\beleven\.$", out.getvalue().strip())  # (2 + 5) * 2 - 3
    engine, encode = scope["engine"], scope["tokenizer"].encode_prompt
    for prompt, answer in ((scope["prompt"], "eleven"), (DEMO_PROMPT, "nineteen")):
        for rule in ("none", "exact", "judge"):
            assert list(engine.generate(encode(prompt), max_new_tokens=160, rule=rule))
            assert engine.stats["text"].endswith(f" {answer}."), (rule, engine.stats["text"])


# tables

@pytest.fixture
def book(tmp_path, monkeypatch) -> Path:
    """A copy of pages and records for report.py to change."""
    for directory in ("docs", "benchmarks"):
        shutil.copytree(ROOT / directory, tmp_path / directory)
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def change(book: Path, name: str, edit) -> None:
    path = book / "benchmarks" / f"{name}.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_tables_are_fresh(capsys):
    assert report.main(check=True) == 0, capsys.readouterr().out


def test_stale_tables_are_named_and_rewritten(book, capsys):
    report.main(check=False)
    capsys.readouterr()
    before = (book / "docs" / "quality.md").read_text()
    change(book, "demo_pair", lambda data: data["judge"].update(accuracy=0.12345))
    assert report.main(check=True) == 1
    said = capsys.readouterr().out
    assert "docs/quality.md: stale: quality demo_pair" in said
    assert "README.md: stale: results pair_cpu demo_pair" in said
    assert (book / "docs" / "quality.md").read_text() == before
    report.main(check=False)
    for page in ("docs/quality.md", "README.md"):
        assert "12.35%" in (book / page).read_text()
    assert report.main(check=True) == 0


def test_records_old_and_new_and_missing(book):
    """A missing key becomes a dash, a record's own command is quoted, a missing record is named."""
    def older(data: dict) -> None:
        data.pop("machine", None)
        data["rows"]["target"].pop("tokens_per_second_quartiles")
        data["rows"]["target"].pop("seconds_to_first_token")
        data["tuning"] = {"exact": {"3": 10.0, "5": 11.0}}

    def newer(data: dict) -> None:
        data["machine"] = {"device": "Z80", "torch": "9.9", "commit": "abc1234",
                           "command": "python scripts/bench.py limit --repeats 3"}
        data["beyond_caches_gb_per_s"] = 12.0

    change(book, "pair_cpu", older)
    change(book, "limit_cpu", newer)
    (book / "benchmarks" / "kernel_cpu.json").unlink()
    report.main(check=False)
    page = (book / "docs" / "benchmarks.md").read_text()
    assert re.search(r"\| target alone \| – \| \d+ \| [\d.]+ \| – \|", page)
    assert "K = 3: 10, **K = 5: 11**" in page
    assert "Command: `python scripts/bench.py limit --repeats 3`. Z80, torch 9.9" in page
    assert "commit abc1234" in page
    assert "beyond the caches 12" in page
    assert f"No record yet: `{report.COMMANDS['kernel_cpu']}`" in page


def test_a_gpu_record_brings_its_table(book):
    for record in (book / "benchmarks").glob("*_gpu.json"):
        record.unlink()
    shutil.copy(book / "benchmarks" / "long_cpu.json", book / "benchmarks" / "long_gpu.json")
    report.main(check=False)
    page = (book / "docs" / "benchmarks.md").read_text()
    assert "#### Length in use, length allocated\n\n| positions in use" in page
    assert page.count("| open |") == len(report.GPU) - 1


@pytest.mark.parametrize("text, message", [
    ("<!-- table: nonsense -->\n<!-- end -->", "nonsense"),
    ("<!-- table: gpu -->\n", "without its <!-- end -->")])
def test_wrong_markers_are_named(book, text, message):
    (book / "docs" / "method.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        report.main(check=True)


def test_bytes_of_a_round_are_those_of_the_shapes():
    """The arithmetic of docs/method.md."""
    size = {name: weight_bytes(empty_model(name)) / 1e9 for name in ("8B-bf16", "8B-int8",
                                                                     "70B-int8")}
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for draft in ("8B-bf16", "8B-int8"):
        drafting, once = 25 * size[draft], size["70B-int8"]
        cells = (f"25 · {size[draft]:.1f} GB = {drafting:.0f} GB", f"{once:.1f} GB",
                 f"{drafting / (drafting + once):.0%}")
        assert f"| {' | '.join(cells)} |" in page


# the picture

SAMPLE = {"prompt": "a < b & c\n\nd", "rule": "kl", "new_tokens": 9, "rounds": 3,
          "tokens_per_round": 2.67, "accepted_exact": 3, "accepted_judge": 3,
          "sources": ["target", "exact", "kl"] * 3, "scores": [None, 0.25, 0.75] * 3}
TEXTS = ["<b>&", " \x00\x1b\x7f\x85", " it's", "\n", "x" * 200, "\n\n", "", " \ud800\ufffe", "end"]
TSPAN, TITLE = (f"{{{picture.SVG}}}{name}" for name in ("tspan", "title"))


def spans_of(svg: ET.Element) -> list[ET.Element]:
    """The spans of the answer's tokens: children of the second text."""
    return svg.findall(f"{{{picture.SVG}}}text")[1].findall(TSPAN)


def text_of(span: ET.Element) -> str:
    return "".join(piece.text or "" for piece in span.iter(TSPAN))


def test_picture_shows_every_token_once():
    svg = ET.fromstring(ET.tostring(picture.draw(SAMPLE, TEXTS), encoding="utf-8"))  # well-formed
    spans = spans_of(svg)
    assert [span.get("class") for span in spans] == ["target", "exact", "lossy"] * 3
    assert [text_of(span) for span in spans] == [picture.visible(text) for text in TEXTS]
    assert [text_of(span) for span in spans[:4]] == ["<b>&", " ␀␛␡�", " it's", "↵"]
    titles = [span.find(TITLE).text for span in spans[:3]]
    assert titles == ["target", "exact, score 0.25", "kl, score 0.75"]
    width = float(svg.get("viewBox").split()[2])
    assert all(float(piece.get("x")) + len(piece.text or "") * picture.ADVANCE <= width
               for span in spans for piece in span.iter(TSPAN))
    everything = "".join(svg.itertext())
    assert "kept by the kl alone" in everything
    assert "9 tokens in 3 rounds, 2.7 tokens a round: 3 exact, 3 by the kl" in everything


def test_picture_of_the_exact_rule_names_no_other():
    sample = SAMPLE | {"rule": "exact", "sources": ["target", "exact", "exact"] * 3}
    everything = "".join(picture.draw(sample, TEXTS).itertext())
    assert "alone" not in everything and "9 tokens in 3 rounds" in everything


@pytest.mark.parametrize("texts, expected", [
    (["ab", " cd"], [[(0, 0, "ab")], [(0, 2, " cd")]]),
    (["a" * 83, " cd", " e"], [[(0, 0, "a" * 83)], [(1, -1, " cd")], [(1, 2, " e")]]),
    (["a\nb", "c"], [[(0, 0, "a\n"), (1, 0, "b")], [(1, 1, "c")]]),
    (["", "a" * 90], [[(0, 0, "")], [(0, 0, "a" * 84), (1, 0, "a" * 6)]])])
def test_picture_wraps_whole_tokens(texts, expected):
    assert picture.layout(texts) == expected


def test_picture_by_its_command(tmp_path):
    """From a file of generate.py --json, half a character in a token included; README's own."""
    tokenizer = Tokenizer.from_checkpoint(DEMO / "target")
    tokens = [*tokenizer.encode("Mia é <"), tokenizer.special_tokens["<|eot_id|>"]]
    sample = SAMPLE | {"tokens": tokens, "sources": ["exact"] * (len(tokens) - 1) + ["target"],
                       "scores": [None] * len(tokens)}
    given, made = tmp_path / "a.json", tmp_path / "new" / "a.svg"
    given.write_text(json.dumps([{}, sample]))
    picture.main(picture.parse_args([str(given), str(made), "--sample", "1"]))
    spans = spans_of(ET.parse(made).getroot())
    assert len(spans) == len(tokens) and "".join(map(text_of, spans)) == "Mia é <<|eot_id|>"
    with pytest.raises(ValueError, match="no sample 5"):
        picture.main(picture.parse_args([str(given), str(made), "--sample", "5"]))

    bundled = spans_of(ET.parse(ROOT / "docs" / "judged_answer.svg").getroot())
    assert "".join(map(text_of, bundled)).endswith(" nineteen.<|eot_id|>")
    assert {span.get("class") for span in bundled} == {"target", "exact", "lossy"}


# examples of docs/hacking.md

def house(directory: Path, **appended: str) -> Path:
    """A copy of the modules with text appended to some, and the bundled pair."""
    directory.mkdir()
    for module in ROOT.glob("*.py"):
        shutil.copy(module, directory)
    (directory / "checkpoints").symlink_to(ROOT / "checkpoints")
    for module, text in appended.items():
        with (directory / f"{module}.py").open("a", encoding="utf-8") as file:
            file.write(f"\n\n{text}")
    return directory


def run(directory: Path, command: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True,
                          timeout=300)


def answer(directory: Path, *options: str, ranks: bool = False) -> dict:
    """The first object of `generate.py --json`."""
    launcher = RANKS if ranks else [sys.executable]
    done = run(directory, [*launcher, "generate.py", *PLAINLY, *options, "--json", "out.json"])
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "out.json").read_text())[0]


def hunks_of(diff: str) -> dict[str, list[tuple[str, str]]]:
    """Per file the (old, new) texts of a diff's hunks."""
    files: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
        name, _, rest = part.partition("\n")
        for hunk in re.split(r"^@@.*\n", rest, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in (" ", sign))
                        for sign in "-+")
            files.setdefault(name, []).append((old, new))
    return files


def apply(directory: Path, diff: str, *names: str) -> None:
    """Apply a diff's hunks to the files `names`; each must fit in exactly one place."""
    for name in names:
        text = (directory / name).read_text(encoding="utf-8")
        for old, new in hunks_of(diff)[name]:
            assert text.count(old) == 1, f"{name} has changed: {old}"
            text = text.replace(old, new)
        (directory / name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def own_house(tmp_path_factory) -> Path:
    return house(tmp_path_factory.mktemp("own") / "gavel", judge=KL, drafter=DRAFTER)


def test_places_to_touch_are_as_many_as_the_page_says():
    assert len(KL.splitlines()) <= 15 and len(DRAFTER.splitlines()) <= 20
    places = {"a rule": len(re.findall(r"^(?:class|RULES)", KL, re.MULTILINE)),
              "a drafter": len(re.findall(r"^(?:class|DRAFTERS)", DRAFTER, re.MULTILINE)),
              "QK-norm in the layer": sum(map(len, hunks_of(QK_NORM).values()))}
    for change, count in places.items():
        assert f"| {change} | {count} |" in HACKING


@pytest.mark.parametrize("options", [[], ["--temperature", "0.8", "--seed", "3"]],
                         ids=["greedy", "sampled"])
def test_rule_runs_from_the_command_line_alone_and_over_ranks(own_house, options):
    options = ["--rule", "kl", "--rule_args", "tau=0.1", *options]
    alone, spread = answer(own_house, *options), answer(own_house, *options, ranks=True)
    assert alone["rule"] == spread["rule"] == "kl"
    assert (alone["world_size"], spread["world_size"]) == (1, 2)
    assert (alone["tokens"], alone["sources"]) == (spread["tokens"], spread["sources"])
    assert alone["finish_reason"] == "stop" and alone["text"].endswith(" nineteen.")
    assert all(0 <= score <= 1 for score in alone["scores"] if score is not None)


def test_rule_keeps_more_where_tau_allows_it(own_house):
    kept = answer(own_house, "--rule", "kl", "--rule_args", "tau=1")
    assert kept["accepted_judge"] == kept["sources"].count("kl") > 0


def test_rule_refuses_a_wrong_tau_in_one_line(own_house):
    done = run(own_house, [sys.executable, "generate.py", "--rule", "kl", "--rule_args", "tau=-1"])
    assert done.returncode == 2 and "expected a positive number" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def random_pair(tiny_checkpoint, dtype: torch.dtype) -> tuple[Transformer, Transformer]:
    """A random target, and a draft that is near it."""
    path = tiny_checkpoint(vocab_size=720, seed=3)
    target, draft = (Transformer.from_checkpoint(path, dtype=dtype) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for parameter in draft.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return target, draft


def by_definition(target: Transformer, draft: Transformer, prompt: list[int], *, tau: float, K: int,
                  new_tokens: int, temperature: float | None,
                  seed: int) -> tuple[list[int], list[str]]:
    """Tokens and sources, slowly: float64, no cache, token by token, KL as a sum over V."""
    V, generator = target.config.vocab_size, torch.Generator().manual_seed(seed)

    def distributions(model: Transformer, text: list[int]) -> torch.Tensor:
        logits = model.logits(model(torch.tensor([text])))[0].double()
        return torch.softmax(logits / (temperature or 1), -1)  # [len(text), V]

    def draw(kind: str, *shape: int) -> torch.Tensor | None:
        if temperature is None:
            return None
        return getattr(torch.empty(shape), f"{kind}_")(generator=generator).double()

    def choose(weights: torch.Tensor, e: torch.Tensor | None) -> int:
        return int((weights if e is None else weights / e).argmax())

    def divergence(p: list[float], q: list[float]) -> float:
        return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q) if a > 0)

    first = choose(distributions(target, prompt)[-1], draw("exponential", V))
    text, sources = [*prompt, first], ["target"]
    while len(sources) < new_tokens:
        e, q, drafted = draw("exponential", K, V), [], []
        for i in range(K):
            q.append(distributions(draft, text + drafted)[-1])
            drafted.append(choose(q[i], None if e is None else e[i]))
        u, e = draw("uniform", K), draw("exponential", V)
        p, kept = distributions(target, text + drafted)[len(text) - 1:], []
        for i, token in enumerate(drafted):
            exact = p[i].argmax() == token if u is None else u[i] * q[i][token] < p[i][token]
            kl = divergence(p[i].tolist(), q[i].tolist())
            assert abs(kl - tau) > 1e-4  # else rounding decides
            if not exact and not kl < tau:
                break
            kept.append("exact" if exact else "kl")
        a = len(kept)
        rest = p[a] if u is None or a == K else (p[a] - q[a]).clamp(min=0)
        text += [*drafted[:a], choose(rest, e)]
        sources += [*kept, "target"]
    return text[len(prompt):][:new_tokens], sources[:new_tokens]


@pytest.mark.parametrize("temperature", [None, 0.8])
@torch.no_grad()
def test_rule_is_its_definition(tiny_checkpoint, temperature):
    scope = dict(vars(judge)) | {"RULES": {}}
    exec(KL, scope)
    prompt, tau, K = [300, 17, 98, 256, 44], 1.0, 5
    tokens, sources = by_definition(*random_pair(tiny_checkpoint, torch.float64), prompt, tau=tau,
                                    K=K, new_tokens=60, temperature=temperature, seed=4)
    engine = Engine(*random_pair(tiny_checkpoint, torch.float32), rule=scope["RULES"]["kl"](tau),
                    speculate_k=K, stop_tokens=(), max_seq_length=128)
    blocks = list(engine.generate(prompt, max_new_tokens=60, temperature=temperature or 0, seed=4))
    assert {"kl", "exact", "target"} == set(sources)
    assert [token for block in blocks for token in block.tokens] == tokens
    assert [source for block in blocks for source in block.sources] == sources


def test_drafter_runs_from_the_command_line(own_house):
    alone, drafted = answer(own_house), answer(own_house, "--draft", "prompt")
    assert drafted["rule"] == "exact" and drafted["tokens"] == alone["tokens"]  # lossless
    options = ["--draft", "prompt", "--temperature", "0.8"]
    sampled = answer(own_house, *options)
    spread = answer(own_house, *options, "--max_new_tokens", "16", ranks=True)
    assert sampled["tokens"][:16] == spread["tokens"] and sampled["accepted_exact"] > 0


def test_drafter_draws_from_its_q(tiny_checkpoint):
    """Shares of proposed tokens are those of the prompt; greedy takes the most frequent."""
    scope = dict(vars(drafters)) | {"DRAFTERS": {}}
    exec(DRAFTER, scope)
    drafter, V = scope["DRAFTERS"]["prompt"](), 720
    drafter.setup(random_pair(tiny_checkpoint, torch.float32)[0], 8, 64, compile=False)
    drafter.prefill(torch.tensor([5, 7, 7, 9]), 0)
    state = drafters.State(torch.tensor([7, 9]), torch.tensor(3))
    generator = torch.Generator().manual_seed(0)
    sampling = drafters.Sampling(torch.tensor(1.0), None, generator)
    drawn, (q, *_) = zip(*(drafter.propose(state, sampling) for _ in range(500)))
    shares = torch.cat(drawn).bincount(minlength=V) / 4000
    assert q[0, [5, 7, 9]].tolist() == [0.25, 0.5, 0.25] and (shares - q[0]).abs().max() < 0.03
    drafted, q = drafter.propose(state, drafters.Sampling(None, None, generator))
    assert drafted.tolist() == [7] * 8 and q is None


USE_QK_NORM = """
import sys
from pathlib import Path
import torch
import tp
from generate import Engine
from model import Transformer
from quantize import quantize_checkpoint

_, path, out = sys.argv
shard = tp.start(torch.device("cpu"), check=True)
model = Transformer.from_checkpoint(path, dtype=torch.float32, shard=shard)
with torch.no_grad():
    logits = shard.gather(model.logits(model(torch.arange(1, 25)[None])))
engine = Engine(model, stop_tokens=(), max_seq_length=64)
blocks = list(engine.generate(list(range(1, 25)), max_new_tokens=16))
if shard.rank == 0:
    torch.save((logits, [token for block in blocks for token in block.tokens]), out)
if shard.world == 1:
    quantize_checkpoint(Path(path), Path(path + "-int8"))
    int8 = Transformer.from_checkpoint(path + "-int8")
    for ours, theirs in zip(int8.layers, model.layers):
        assert torch.equal(ours.self_attn.k_norm.weight, theirs.self_attn.k_norm.weight)
tp.stop()
"""


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> tuple[Path, torch.Tensor, list[int]]:
    """A random Qwen3 that calls itself Llama; its logits of a text, and how it goes on greedily."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        initializer_range=0.2, rms_norm_eps=1e-5, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    path = tmp_path_factory.mktemp("qwen3") / "checkpoint"
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config))
    text = torch.arange(1, 25)[None]
    with torch.no_grad():
        logits = model(text).logits
        for _ in range(16):
            text = torch.cat((text, model(text).logits[:, -1:].argmax(-1)), 1)
    return path, logits, text[0, 24:].tolist()


def test_layer_edit_is_qwen3s_norm(qwen3, tmp_path):
    """The edit of docs/hacking.md: logits and tokens of one process and of two ranks; int8."""
    path, expected, tokens = qwen3
    patched = house(tmp_path / "patched")
    apply(patched, QK_NORM, "model.py", "tp.py")
    (patched / "use.py").write_text(USE_QK_NORM)
    for launcher in ([sys.executable], RANKS):
        done = run(patched, [*launcher, "use.py", str(path), "out.pt"])
        assert done.returncode == 0, done.stderr
        logits, said = torch.load(patched / "out.pt")
        assert ((logits - expected).norm() / expected.norm()).item() < 1e-5 and said == tokens
    plain = Transformer.from_checkpoint(path, dtype=torch.float32)  # without it they are left out
    with torch.no_grad():
        logits = plain.logits(plain(torch.arange(1, 25)[None]))
    assert ((logits - expected).norm() / expected.norm()).item() > 0.1


def test_layer_edit_without_its_row_is_named(qwen3, tmp_path):
    half = house(tmp_path / "half")
    apply(half, QK_NORM, "model.py")
    (half / "use.py").write_text(USE_QK_NORM)
    done = run(half, [sys.executable, "use.py", str(qwen3[0]), "out.pt"])
    assert done.returncode and "q_norm.weight has no row in tp.TABLE" in done.stderr
