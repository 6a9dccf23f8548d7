"""Render every table of README.md and docs/ from the records in benchmarks/.

A figure is measured once, written to a record by the command that measured it, and read from there.
Nobody types it. A page holds a marked block for each table, and this script fills it:

    <!-- table: pair pair_cpu -->
    …
    <!-- end -->

`pair` names a function of TABLES, `pair_cpu` the record that it reads, benchmarks/pair_cpu.json.
Each table ends with its command, machine and versions, as the record has them. A key that an older
record lacks becomes a dash, and a record that is not there becomes the command that would make it.

    python scripts/report.py             # rewrite the pages
    python scripts/report.py --check     # exit 1 and say which tables are stale (tests run this)
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import atomic_write  # noqa: E402

PAGES = ("README.md", "docs/method.md", "docs/benchmarks.md", "docs/hacking.md", "docs/quality.md",
         "docs/train-a-judge.md")
BLOCK = re.compile(r"<!-- table: ([\w ]+) -->\n(.*?)<!-- end -->", re.DOTALL)
HERE = "@/"  # stands for the way from a page to the repository's root, in links
BENCH, PAIR = "python scripts/bench.py", "python scripts/demo_pair.py"
LABELS = "python scripts/bench_labels.py"
COMMANDS = {  # what makes each record; a record that names its own command overrules this
    "pair_cpu": f"{BENCH} pair --json benchmarks/pair_cpu.json",
    "limit_cpu": f"{BENCH} limit --json benchmarks/limit_cpu.json",
    "long_cpu": f"{BENCH} long --json benchmarks/long_cpu.json",
    "kernel_cpu": f"{BENCH} kernel --json benchmarks/kernel_cpu.json",
    "int8_cpu": f"{BENCH} int8 --json benchmarks/int8_cpu.json",
    "ranks": f"{BENCH} ranks --json benchmarks/ranks.json",
    "labels": f"{LABELS} labels NAME=labels.jsonl --json benchmarks/labels.json",
    "heads": f"{LABELS} heads NAME=judge.safetensors --json benchmarks/heads.json",
    "calibration": f"{LABELS} calibration --record record.json --json benchmarks/calibration.json",
    "demo_pair": f"{PAIR} evaluate --json benchmarks/demo_pair.json",
    "demo_sweep": f"{PAIR} sweep --json benchmarks/demo_sweep.json",
    "demo_int8": f"{PAIR} int8 --json benchmarks/demo_int8.json",
    "demo_head": f"{PAIR} head -- --lr 1e-3 --dtype float32 --threshold 0.5 --json "
                 "benchmarks/demo_head.json"}
GPU = (  # what a GPU would show, its command, its record
    ("decode, draft and verify against the memory limit",
     f"{BENCH} limit --model 70B-int8 --draft 8B-int8 --json benchmarks/limit_gpu.json"),
    ("whole rounds of 8B drafting for 70B, 19 of K = 25 kept",
     f"{BENCH} scale --models 70B-int8 --speculate_k 25 --force_accepted 19 "
     "--json benchmarks/scale_gpu.json"),
    ("the fused acceptance kernel", f"{BENCH} kernel --json benchmarks/kernel_gpu.json"),
    ("int8 layers beside bfloat16 and Inductor",
     f"{BENCH} int8 --json benchmarks/int8_gpu.json"),
    ("length in use, length allocated", f"{BENCH} long --json benchmarks/long_gpu.json"),
    ("two real checkpoints beside transformers",
     f"{BENCH} pair --checkpoint_path … --draft_checkpoint_path … --prompts FILE.jsonl "
     "--json benchmarks/pair_gpu.json"),
    ("a judged answer over several GPUs",
     "torchrun --standalone --nproc_per_node=8 generate.py --judge --checkpoint_path … "
     "--draft_checkpoint_path … --json benchmarks/ranks_gpu.json"))
GPU_TABLES = {"int8_gpu": "int8_layers", "ranks_gpu": ""}  # where a record's table has another name
NAMES = {"draft": "draft alone", "target": "target alone", "exact": "exact rule",
         "hf_generate": "transformers `generate`", "hf_assisted": "transformers, assisted",
         "token_identity": "token identity"}
INT8_ROWS = (1, 8, 16, 32)  # of x, that the table shows; a record may hold more
HEAD_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Record:
    """benchmarks/NAME.json and what it says of itself. A missing key reads as None."""

    def __init__(self, name: str):
        self.name, self.path = name, ROOT / "benchmarks" / f"{name}.json"
        self.data = json.loads(self.path.read_text(encoding="utf-8"))

    def __call__(self, *keys: str, default=None):
        """The value below these keys."""
        value = self.data
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                return default
            value = value[key]
        return value

    def setting(self, key: str):
        """A setting of the run, wherever this record keeps it."""
        return self("settings", key, default=self(key))

    @property
    def command(self) -> str:
        said = (self.setting("machine") or {}).get("command") or self("command") or self("note")
        return said or COMMANDS.get(self.name, "not recorded")

    def about(self) -> str:
        """Command, machine, versions and record, as one line below a table."""
        machine = self.setting("machine") or {}
        facts = [machine.get("device") or self.setting("cpu")]
        facts += [f"{name} {version}" for name in ("torch", "triton", "transformers")
                  if (version := machine.get(name) or (name == "torch" and self.setting("torch")))]
        facts += [str(self.setting("dtype") or "").removeprefix("torch.")]
        facts += [f"commit {machine['commit']}"] if machine.get("commit") else []
        return (f"Command: `{self.command}`. {', '.join(filter(None, facts))}. "
                f"Record: [`{self.name}.json`]({HERE}benchmarks/{self.name}.json).")


def number(value: float | None, form: str = ".2f", scale: float = 1) -> str:
    return "–" if value is None else format(value * scale, form)


def percent(share: float | None, digits: int = 2) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def spread(entry: dict | None, key: str, form: str = ".2f", scale: float = 1) -> str:
    """Median and quartiles: "1.53 (1.47–1.62)"."""
    if not isinstance(entry, dict) or key not in entry:
        return "–"
    median, quartiles = entry[key], entry.get(f"{key}_quartiles")
    low, high = (number(each, form, scale) for each in quartiles) if quartiles else ("", "")
    return number(median, form, scale) + (f" ({low}–{high})" if quartiles else "")


def points(difference: dict) -> str:
    """A paired difference of shares, in points: "-0.80 [-1.48, -0.12]"."""
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def name_of(way: str) -> str:
    return NAMES.get(way, way)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in map(list, lines)]


def results(pair: Record, quality: Record) -> list[str]:
    """Speed of every way, and beside it what its answers are worth."""
    problems, K = quality.setting("problems"), quality.setting("speculate_k")
    rows = [(name_of(way), spread(row, "tokens_per_second", ".0f"),
             number(row.get("ratio_to_target")), number(row.get("tokens_per_round")),
             number(row.get("speculate_k"), "d"), percent(quality(way, "accuracy")))
            for way, row in pair("rows").items()]
    lines = table(("", "tokens/s (quartiles)", "x target", "tokens a round", "K", "accuracy"), rows)
    change = quality("paired", "judge - target")
    sentence = (f"Speed: greedy, {pair('num_prompts')} held-out problems in turns, each way at its "
                "own best K, compiled; transformers runs the same weights, dtype and threads. "
                f"Accuracy: {problems:,} held-out problems, K = {K}.")
    if change:
        sentence += (f" The judge less the target: {points(change)} points (95% interval, over "
                     "the same problems).")
    return [*lines, "", sentence, "", f"{pair.about()} Accuracy: {quality.about()}"]


def pair(record: Record) -> list[str]:
    """Every way to answer with a pair, in turns on the same prompts."""
    rows = [(name_of(way), number(row.get("speculate_k"), "d"),
             spread(row, "tokens_per_second", ".0f"), number(row.get("milliseconds_per_token")),
             number(row.get("seconds_to_first_token"), ".1f", 1e3),
             number(row.get("tokens_per_round")), percent(row.get("accuracy"), 0),
             percent(row.get("agrees_with_target"), 0), number(row.get("ratio_to_target")),
             number(row.get("ratio_to_hf_generate"))) for way, row in record("rows").items()]
    lines = table(("", "K", "tokens/s (quartiles)", "ms/token", "first token, ms", "tokens a round",
                   "right", "as the target", "x target", "x transformers"), rows)
    tokens = [f"{name_of(way)} {row['new_tokens'] / record('num_prompts'):.0f}"
              for way, row in record("rows").items() if "new_tokens" in row]
    return [*lines, "", f"{record('num_prompts')} prompts ({record('prompts')}), greedy, K = best "
            "of those below. *Right*: share of these prompts alone; *as the target*: answers equal "
            f"to the target's, token for token. Tokens an answer: {', '.join(tokens)}.", "",
            record.about()]


def gain(record: Record) -> list[str]:
    """What the pair's table says, in a sentence."""
    rows = record("rows")
    speed = {way: row["tokens_per_second"] for way, row in rows.items()}
    says = [f"{speed['judge'] / speed[other]:.1f} times as fast as {what}" for other, what in
            (("target", "the target alone"), ("exact", "the exact rule"),
             ("hf_assisted", "transformers' assisted generation")) if other in speed]
    return [f"The judge answers {', '.join(says)}."]


def tuning(record: Record) -> list[str]:
    """Tokens/s by K, on prompts of their own: how each way's K was chosen."""
    rows, edges = [], []
    for way, tried in record("tuning", default={}).items():
        speeds = tried.get("tokens_per_second", tried)
        best = max(speeds, key=speeds.get)
        edges += [name_of(way)] if tried.get("edge") else []
        rows.append((name_of(way), ", ".join(
            f"{'**' * (K == best)}K = {K}: {speed:.0f}{'**' * (K == best)}"
            for K, speed in speeds.items())))
    note = [f"At the edge of what was tried: {', '.join(edges)}.", ""] if edges else []
    return [*table(("", "tokens/s, medians"), rows), "", *note, record.about()]


def limit(record: Record) -> list[str]:
    """Steps against the time to read their weights and cache once."""
    rows = [(step["step"], number(step["weight_bytes"] + step["cache_bytes"], ".1f", 1e-6),
             number(step["ceiling_ms"]), spread(step, "ms"), percent(step["share"], 0),
             number(step.get("to_target_step")), spread(step, "linears_ms"),
             spread(step, "attention_ms")) for step in record("steps")]
    lines = table(("step", "MB", "ceiling, ms", "ms (quartiles)", "share", "to one step",
                   "linear layers alone, ms", "attention alone, ms"), rows)
    reads = [f"{name} {spread(entry, 'gb_per_s', '.0f')}"
             for name, entry in record("bandwidth").items()]
    beyond = record("beyond_caches_gb_per_s")
    beyond = f"; beyond the caches {beyond:.0f}" if beyond else ""
    return [*lines, "", f"{record('target')}, {record('length')} positions in use. Bandwidth "
            f"measured in the same run, GB/s, in a buffer of the size of each model's weights: "
            f"{', '.join(reads)}{beyond}.", "", record.about()]


def long(record: Record) -> list[str]:
    """A token's time against the length in use, then against the length allocated."""
    rows = [(f"{entry['in_use']:,}", f"{entry['allocated']:,}", spread(entry, "ms"),
             number(entry["to_shortest"]))
            for kind in ("in_use", "allocated") for entry in record(kind)]
    return [*table(("positions in use", "allocated", "ms/token (quartiles)", "to the first"), rows),
            "", f"{record('target')}, {record('new_tokens')} tokens a measurement.", "",
            record.about()]


def kernel(record: Record) -> list[str]:
    """The acceptance rule: the fused kernel, its torch reference eager and compiled."""
    ways = [way for way in ("triton", "eager", "compiled")
            if any(isinstance(entry.get(way), dict) for entry in record("sizes"))]
    rows = [(str(entry["K"]), f"{entry['V']:,}", f"{entry['D']:,}", entry["mode"], entry["inputs"],
             number(entry["bytes"], ".2f", 1e-6),
             *(spread(entry.get(way), "us", ".0f") for way in ways)) for entry in record("sizes")]
    return [*table(("K", "V", "D", "mode", "inputs", "MB", *(f"{way}, µs" for way in ways)), rows),
            "", record.about()]


def int8_layers(record: Record) -> list[str]:
    """int8 layers beside what else one would call."""
    ways = ("int8", "bf16", "inductor", "dequantise")
    rows = [(f"{entry['model']} {entry['matrix']}, {entry['out']} x {entry['in']}",
             str(entry["rows"]), *(spread(entry.get(way), "us", ",.0f") for way in ways),
             percent(entry["int8"].get("share"), 0))
            for entry in record("layers") if entry["rows"] in INT8_ROWS]
    lines = table(("layer, out x in", "rows", "int8, µs", "bfloat16, µs", "Inductor, same int8, µs",
                   "dequantise first, µs", "int8, share of memory"), rows)
    return [*lines, "", f"Memory: {number(record('bandwidth_gb_per_s'), '.0f')} GB/s, measured in "
            "the same run. Other sizes are in the record.", "", record.about()]


def int8_passes(record: Record) -> list[str]:
    """Whole passes of the bundled target, stored weights and int8 in turns."""
    rows = [(str(entry["rows"]), spread(entry["stored"], "ms"), spread(entry["int8"], "ms"),
             number(entry["ratio"])) for entry in record("passes")]
    return [*table(("rows", "as stored, ms", "int8, ms", "int8 to stored"), rows), "",
            record.about()]


def ranks(record: Record) -> list[str]:
    """GB of weights on a rank, MB handed to collectives: from shapes, not measured."""
    models = record("models")
    worlds = list(models[0]["rank_bytes"])
    rows = [(entry["model"], *(number(entry["rank_bytes"][world], ".2f", 1e-9)
                               for world in worlds),
             number(entry["collective_bytes"], ".1f", 1e-6)) for entry in models]
    head = ("", *(f"{world} rank{'s' * (world != '1')}, GB" for world in worlds), "MB a round")
    return [*table(head, rows), "", "Computed from shapes. *MB a round*: what a rank hands to "
            f"collectives in a greedy round of K = {record('speculate_k')}, as target or as draft. "
            f"Command: `{record.command}`."]


def scale(record: Record) -> list[str]:
    """Rounds of large models with random weights, at a forced acceptance."""
    rows = [(f"{model['draft']} for {model['model']}", entry["name"], number(entry["verify_ms"]),
             spread(entry, "round_ms"), number(entry["ceiling_ms"]), percent(entry["share"], 0),
             number(entry["tokens_per_second"], ".0f"))
            for model in record("models") for entry in model.get("rounds", ())]
    lines = table(("draft and target", "round", "verify, ms", "round, ms (quartiles)",
                   "ceiling, ms", "share", "tokens/s"), rows)
    return [*lines, "", "Random weights: acceptance is forced, speed is real, text means nothing.",
            "", record.about()]


def gpu() -> list[str]:
    """What waits for a GPU, then the tables of those records that are there."""
    rows, found = [], []
    for what, command in GPU:
        name = Path(command.rpartition(" ")[2]).stem
        there = (ROOT / "benchmarks" / f"{name}.json").is_file()
        rows.append((what, f"`{command}`", "below" if there else "open"))
        if there and (show := TABLES.get(GPU_TABLES.get(name, name.removesuffix("_gpu")))):
            found += ["", f"#### {what[0].upper()}{what[1:]}", "", *show(Record(name))]
    return [*table(("what", "command", ""), rows), *found]


def models() -> list[str]:
    """The bundled pair's sizes, from its files."""
    rows = []
    for name in ("target", "draft"):
        directory = ROOT / "checkpoints" / "demo" / name
        config = json.loads((directory / "config.json").read_text())
        weights = directory / "model.safetensors"
        with weights.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        count = sum(math.prod(entry["shape"]) for entry in header.values())
        rows.append((name, f"{count / 1e6:.1f}M", number(weights.stat().st_size, ".1f", 1e-6),
                     str(config["num_hidden_layers"]), str(config["hidden_size"]),
                     str(config["intermediate_size"]),
                     f"{config['num_attention_heads']} / {config['num_key_value_heads']}",
                     str(config["vocab_size"])))
    return table(("", "parameters", "MB", "layers", "hidden", "feed-forward",
                  "heads / key-value heads", "vocabulary"), rows)


def quality(record: Record) -> list[str]:
    """Accuracy and acceptance of every rule on held-out problems."""
    ways = [way for way, entry in record.data.items()
            if isinstance(entry, dict) and "accuracy" in entry]
    rows = [(name_of(way), percent(record(way, "accuracy")),
             "–" if way in ("draft", "target") else number(record(way, "accepted_per_round")),
             number(record(way, "tokens_per_round")), number(record(way, "mean_new_tokens"), ".1f"))
            for way in ways]
    lines = table(("", "accuracy", "accepted a round", "tokens a round", "tokens an answer"), rows)
    return [*lines, "", f"{record.setting('problems'):,} problems, greedy, K = "
            f"{record.setting('speculate_k')}, the judge's threshold {record.setting('threshold')}, "
            f"the control's {record.setting('identity_threshold')}.", "", record.about()]


def paired(record: Record) -> list[str]:
    """Differences in accuracy over the same problems, and what they say."""
    rows = [(name_of(pair.replace("token_identity", "token identity")), points(difference))
            for pair, difference in record("paired").items()]
    accuracy = {way: record(way, "accuracy") for way in ("draft", "target", "token_identity")}
    kept = {way: record(way, "accepted_per_round") for way in ("exact", "judge", "oracle")}
    closed = (accuracy["token_identity"] - accuracy["draft"]) / (
        accuracy["target"] - accuracy["draft"])
    says = (f"The judge keeps {kept['judge'] / kept['exact']:.1f} times what the exact rule keeps, "
            f"and {percent(kept['judge'] / kept['oracle'], 0)} of what the oracle does. Token "
            f"identity alone closes {percent(closed, 0)} of the gap between draft and target.")
    differs = record("exact_differs_from_target")
    if differs is not None:
        says += (f" The exact rule's text differs from the target's own in {differs} of "
                 f"{record.setting('problems'):,} answers.")
    return [*table(("accuracy", "points, 95% interval"), rows), "", says]


def sweep(record: Record) -> list[str]:
    """Accuracy and acceptance by threshold, on validation problems."""
    rows = [(name_of(row["rule"]), number(row.get("threshold"), "g"), percent(row["accuracy"], 1),
             "–" if row["rule"] in ("draft", "target") else number(row["accepted_per_round"]))
            for row in record("rows") if "accuracy" in row]
    return [*table(("", "threshold", "accuracy", "accepted a round"), rows), "",
            f"{record.setting('problems')} validation problems, K = 16.", "", record.about()]


def head(record: Record) -> list[str]:
    """Right and wrong validation tokens that the head keeps, by threshold."""
    own, curve = record("threshold"), record("rejected")
    rows = []
    for threshold in sorted({*HEAD_THRESHOLDS, own}):
        at = min(range(len(curve["thresholds"])),
                 key=lambda i: abs(curve["thresholds"][i] - threshold))
        mark = "**" if threshold == own else ""
        rows.append((f"{mark}{threshold:g}{mark}", percent(curve["kept_correct"][at], 1),
                     percent(curve["kept_wrong"][at], 1)))
    return [*table(("threshold", "right tokens kept", "wrong tokens kept"), rows), "",
            f"Among the {curve['correct']:,} right and {curve['wrong']:,} wrong validation tokens "
            f"that the exact rule rejects; ROC-AUC {curve['roc_auc']:.3f} (all tokens: "
            f"{record('all', 'roc_auc'):.3f}). Training data: {record('data')}.", "",
            record.about()]


def int8_quality(record: Record) -> list[str]:
    """The pair in int8 beside the pair as stored."""
    rows = [(label, percent(record(name, "target", "accuracy")),
             percent(record(name, "judge", "accuracy")),
             number(record(name, "judge", "accepted_per_round")))
            for name, label in (("stored", "as stored"), ("int8", "int8"))]
    rows.append(("difference, points", *(points(record("paired", way))
                                         for way in ("target", "judge")), ""))
    return [*table(("", "target alone", "judge", "accepted a round"), rows), "",
            f"{record.setting('problems'):,} held-out problems, K = "
            f"{record.setting('speculate_k')}.", "", record.about()]


def labels(record: Record) -> list[str]:
    """What each labeler calls wrong, beside the grammar and the target's answers; what it took."""
    rows = []
    for name, row in record("labelers").items():
        cost = {key: sum(part[key] for part in row["cost"]["labelers"].values())
                for key in ("decoded", "read", "seconds")} if "cost" in row else None
        if cost:
            cost["labels"] = sum(part["right"] + part["wrong"]
                                 for part in row["cost"]["labelers"].values())
        tokens, questions = row["grammar"]["tokens"], (row["grammar"], row["answer"])
        each = (number(cost[key] / cost["labels"], ".1f") for key in ("decoded", "read")) \
            if cost else ("–", "–")
        rows.append((name, f"{tokens:,}", *(percent(value, 1) for part in questions for value in (
            part["is_wrong"] / max(part["tokens"], 1), part["precision"], part["recall"])),
            *each, number(cost and cost["seconds"], ".0f")))
    head = ("labels", "tokens", *("wrong", "precision", "recall") * 2, "written", "read", "seconds")
    areas = ", ".join(f"{name} {number(row['auc_grammar'], '.3f')} and "
                      f"{number(row['auc_answer'], '.3f')}"
                      for name, row in record("labelers").items() if row.get("auc_grammar"))
    return [*table(head, rows), "",
            f"{record('problems')} problems. *Tokens*: those with a label that the exact rule "
            "rejects. The first *wrong*, *precision* and *recall* ask whether a token is wrong by "
            "the grammar, the second whether it changes the answer (of a sample). *Written*, "
            "*read*: target tokens a label, all labels counted, the target's own answers "
            "included. *Seconds*: on one thread of a machine that did other work."
            + (f" ROC-AUC of the score for both questions: {areas}." if areas else ""), "",
            record.about()]


def heads(record: Record) -> list[str]:
    """Every head at its own threshold, on the same held-out problems."""
    first, rows = record("reference"), []
    for name, row in record("rows").items():
        rows.append((name, number(row.get("roc_auc"), ".3f"), number(row.get("threshold"), "g"),
                     percent(row["accuracy"]), points(row["less_target alone"]),
                     "–" if name == first else points(row[f"less_{first}"]),
                     number(row["tokens_per_round"]), percent(row.get("gain"), 0),
                     number(row["mean_new_tokens"], ".1f")))
    return [*table(("", "AUC", "δ", "accuracy", "less the target", f"less {first}",
                    "tokens a round", "of the gain", "tokens an answer"), rows), "",
            f"{record('problems'):,} held-out problems, greedy, K = {record('speculate_k')}. "
            "*AUC*: among the draft's proposals that the exact rule rejects, labelled by the "
            "grammar, on validation problems. *Less*: accuracy in points, 95% intervals over the "
            f"same problems. *Gain*: tokens a round above the exact rule's, of {first}'s.", "",
            record.about()]


def promises(record: Record) -> list[str]:
    """How often a calibrated promise is broken."""
    rows = [(percent(each["max_regressions"]), each["sample"], each["promised"], each["broken"],
             ", ".join(f"{t:g}" for t in each["thresholds"] or ())) for each in record("results")]
    lines = table(("at most", "prompts drawn", "promises", "broken",
                   "thresholds: lowest, quartiles, highest"),
                  [map(str, row) for row in rows])
    one = record("results")[0]
    return [*lines, "", f"{one['repetitions']} repetitions, each of prompts drawn with replacement "
            f"from {one['prompts']:,} recorded ones, whose share of regressions is the truth.", "",
            record.about()]


TABLES: dict[str, Callable[..., list[str]]] = {function.__name__: function for function in (
    results, pair, gain, tuning, limit, long, kernel, int8_layers, int8_passes, ranks, scale, gpu,
    models, quality, paired, sweep, head, int8_quality, labels, heads, promises)}


def render(marker: str) -> str:
    """The text of a block, from its marker: a function of TABLES and the records that it reads."""
    name, *records = marker.split()
    if name not in TABLES:
        raise ValueError(f"got a table {name!r}, expected one of {', '.join(TABLES)}")
    missing = [record for record in records
               if not (ROOT / "benchmarks" / f"{record}.json").is_file()]
    if missing:
        return "".join(f"No record yet: `{COMMANDS.get(record, record)}`.\n" for record in missing)
    return "\n".join(TABLES[name](*map(Record, records))) + "\n"


def rewrite(page: str) -> tuple[str, str, list[str]]:
    """A page as it is and as it should be, and the markers of the blocks that differ."""
    text, stale = (ROOT / page).read_text(encoding="utf-8"), []
    if text.count("<!-- table: ") != len(BLOCK.findall(text)):
        raise ValueError(f"{page}: got a table without its <!-- end -->, or a bad name; mend the "
                         "marker")

    def fill(match: re.Match) -> str:
        body = render(match[1]).replace(HERE, "../" * page.count("/"))
        if body != match[2]:
            stale.append(match[1])
        return f"<!-- table: {match[1]} -->\n{body}<!-- end -->"

    return text, BLOCK.sub(fill, text), stale


def main(check: bool) -> int:
    """Rewrite the pages, or say what is stale; the exit status."""
    status = 0
    for page in PAGES:
        old, new, stale = rewrite(page)
        if not stale:
            continue
        print(f"{page}: {'stale' if check else 'rewrote'}: {', '.join(stale)}")
        if check:
            status = 1
        elif new != old:
            with atomic_write(ROOT / page) as aside:
                aside.write_text(new, encoding="utf-8")
    if status:
        print("run python scripts/report.py", file=sys.stderr)
    return status


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args().check))
    except (ValueError, OSError, KeyError) as error:
        print(f"report.py: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
