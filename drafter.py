"""Decoding steps, and the drafters that propose tokens with them or without.

A drafter proposes K tokens a round, on the device and in fixed shapes. `ModelDrafter` is a smaller
model of the target's vocabulary; `LookupDrafter` needs none: it proposes what followed the last
tokens when the text held them before. A drafter that draws from a distribution q hands q over, as
sampling stays lossless only against the q that was really drawn from; a deterministic one counts as
a one-hot q.

Shapes: K draft length, S new tokens, D model dim, V vocabulary.

    drafter = ModelDrafter(Transformer.from_checkpoint("Llama-3.1-8B-Instruct"))
    drafter.setup(target, speculate_k=16, rows=4096, compile=False)     # Engine does this

A new drafter is a class with `propose` and a row in DRAFTERS (docs/hacking.md). Sources: Leviathan
et al. (arXiv 2211.17192); prompt lookup as in transformers' `prompt_lookup_num_tokens`. No trees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import cpu
from judge import greedy, probs, sample
from model import Transformer

PREFILL_CHUNK = 512  # tokens a prefill pass reads at most: bounds its activations
# a tiny draft's step is cheaper than its call: unroll several, of up to so many layers
CHUNK_LAYERS = 8


class State(NamedTuple):
    """All that one round hands to the next, on the device."""

    last_two: Tensor  # int64 [2]: the last two committed tokens
    pos: Tensor  # int64 []: position of the last one


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn on the device. keep_probs: a greedy drafter keeps q too."""

    temperature: Tensor | None  # float32 []; None: greedy
    top_k: int | None
    generator: torch.Generator
    keep_probs: bool = False

    def draw(self, kind: str, *shape: int) -> Tensor | None:
        """float32 of `shape`, 'exponential' (Exp(1)) or 'uniform' (on [0, 1)); None when greedy."""
        if self.temperature is None:
            return None
        numbers = torch.empty(shape, device=self.generator.device)
        return getattr(numbers, f"{kind}_")(generator=self.generator)


def next_token(model: Transformer, tokens: Tensor, input_pos: Tensor,
               temperature: Tensor | None = None, top_k: int | None = None,
               exponentials: Tensor | None = None, *, keep_probs: bool = False,
               rows: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """One step: tokens [1, S] at input_pos [S] -> next token int64 [], q float32 [V], top logit [].

    Greedy without a temperature; else a draw of softmax(logits / temperature) over the top_k, made
    with exponentials [V]. q is None when greedy, unless keep_probs. A top logit that is not finite
    says that the logits are not. rows: see Transformer.forward.
    """
    hidden = model(tokens, input_pos, rows)[0, -1:]  # [1, D]
    logits = model.logits(hidden)[0].float()  # [V], of this rank
    if temperature is None:
        token, top = greedy(logits, model.shard, model.first_token)
        return token, probs(model.shard.gather(logits), 1.0) if keep_probs else None, top
    logits = model.shard.gather(logits)
    q = probs(logits, temperature, top_k)
    return sample(q, exponentials), q, logits.amax()


def draft_steps(model: Transformer, tokens: Tensor, input_pos: Tensor,
                temperature: Tensor | None = None, top_k: int | None = None,
                exponentials: Tensor | None = None, *, steps: int, keep_probs: bool = False,
                rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Steps that each read the token before: e [steps, V] -> tokens [steps], q [steps, V]."""
    drafted, distributions = [], []
    for i in range(steps):
        token, q, _ = next_token(model, tokens, input_pos, temperature, top_k,
                                 None if exponentials is None else exponentials[i],
                                 keep_probs=keep_probs, rows=rows)
        drafted.append(token)
        distributions.append(q)
        tokens, input_pos = token[None, None], input_pos[-1:] + 1
    return torch.stack(drafted), None if q is None else torch.stack(distributions)


def device_step(function: Callable, model: Transformer, compile: bool, *, dynamic: bool = False):
    """A step as the device runs it best: CUDA by the model's compiled parts, a CPU by cpu.Step."""
    if model.device.type == "cpu":
        return cpu.Step(function, compile=compile, dynamic=dynamic)
    return function


class Reader:
    """Reads prompts into a model's caches in chunks; on CUDA uncompiled: a length comes once."""

    def __init__(self, model: Transformer, rows: int, compile: bool, step: Callable = next_token):
        self.model = model
        cpu.prepare(model)
        if model.max_seq_length < rows:
            model.setup_caches(max_batch_size=1, max_seq_length=rows)
        if compile and model.device.type == "cuda":  # one block: a whole pass compiles for minutes
            model.compile_parts()
        self.step = device_step(step, model, compile, dynamic=True)

    def __call__(self, ids: Tensor, begin: int, *sampling) -> tuple:
        """ids int64 [N] from position `begin` on; what `step` returns for the last chunk."""
        input_pos = torch.arange(len(ids), device=ids.device)
        for start in range(begin, len(ids), PREFILL_CHUNK):
            chunk = slice(start, start + PREFILL_CHUNK)
            with self.model.uncompiled_parts():
                result = self.step(self.model, ids[chunk][None], input_pos[chunk], *sampling)
        return result


class Drafter:
    """Proposes K tokens a round. `cached`: the tokens that it need not read again (a chat's next
    turn)."""

    model: Transformer | None = None

    def setup(self, target: Transformer, speculate_k: int, rows: int, compile: bool) -> None:
        """Called by the engine first. rows: as many positions as it writes, rounds in flight
        included."""
        self.K, self.cached = speculate_k, []

    def prefill(self, ids: Tensor, begin: int) -> None:
        """Read the prompt: ids int64 [N], of which those before `begin` are known."""

    def propose(self, state: State, draws: Sampling) -> tuple[Tensor, Tensor | None]:
        """-> drafted int64 [K], and q float32 [K, V] that they were drawn from; None:
        deterministic."""
        raise AssertionError(f"{type(self).__name__} lacks propose")


class ModelDrafter(Drafter):
    """A smaller model. Its first step reads two tokens: of a block that was accepted whole, it has
    never read the last one. A fixed shape, no special case."""

    cached = property(lambda self: self.model.cached,
                      lambda self, tokens: setattr(self.model, "cached", tokens))

    def __init__(self, model: Transformer):
        self.model = model

    def setup(self, target: Transformer, speculate_k: int, rows: int, compile: bool) -> None:
        self.K, model = speculate_k, self.model
        self.prefill = Reader(model, rows, compile)
        self.steps = device_step(draft_steps, model, compile)
        self.offsets = torch.arange(-1, speculate_k + 1, device=model.device)
        self.chunk = max(1, CHUNK_LAYERS // model.config.num_layers)

    def propose(self, state: State, draws: Sampling) -> tuple[Tensor, Tensor | None]:
        tokens, input_pos = state.last_two[None], state.pos + self.offsets[:2]
        e = draws.draw("exponential", self.K, self.model.config.vocab_size)
        drafted, distributions = [], []
        for start in range(0, self.K, self.chunk):
            end = min(start + self.chunk, self.K)
            new, q = self.steps(self.model, tokens, input_pos, draws.temperature, draws.top_k,
                                None if e is None else e[start:end], steps=end - start,
                                keep_probs=draws.keep_probs)
            drafted.append(new)
            distributions.append(q)
            tokens, input_pos = new[None, -1:], state.pos + self.offsets[end + 1:end + 2]
        return torch.cat(drafted), None if q is None else torch.cat(distributions)


class LookupDrafter(Drafter):
    """Prompt lookup: what followed the last tokens when prompt or answer held them before. No
    model.

    Of all places whose last tokens agree with the text's, in up to NGRAM tokens, the longest match
    wins, then the latest. What runs into the present goes round in circles. The history is a buffer
    by position, as a cache is: what is proposed is written behind `pos`, and stays if it is kept.
    """

    NGRAM = 3

    def setup(self, target: Transformer, speculate_k: int, rows: int, compile: bool) -> None:
        super().setup(target, speculate_k, rows, compile)
        self.history = torch.zeros(rows, dtype=torch.int64, device=target.device)
        self.rows = torch.arange(rows, device=target.device)

    def prefill(self, ids: Tensor, begin: int) -> None:
        self.history[begin:len(ids)] = ids[begin:]

    def propose(self, state: State, draws: Sampling) -> tuple[Tensor, None]:
        pos, history, rows, ahead = state.pos, self.history, self.rows, self.rows[:self.K]
        history[torch.stack((pos - 1, pos))] = state.last_two
        alike, length = rows < pos, torch.zeros_like(rows)  # of the match that ends in each row
        for back in range(self.NGRAM):
            same = history[(rows - back).clamp(min=0)] == history[(pos - back).clamp(min=0)]
            alike = alike & same & (rows >= back)
            length = length + alike
        best = (length * len(rows) + rows).where(rows < pos, -1).argmax()
        drafted = history[best + 1 + ahead % (pos - best)]
        history[pos + 1 + ahead] = drafted
        return drafted, None


DRAFTERS: dict[str, Callable[[], Drafter]] = {"lookup": LookupDrafter}
