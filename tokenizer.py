"""Text to token ids and back: tiktoken BPE and sentencepiece behind one face, with Llama 3.1's chat format.

A file is what its content says, not its name: lines of `base64 rank` are tiktoken BPE, JSON is a byte-level `tokenizer.json`, a
protobuf is sentencepiece. A `tokenizer.json` is rebuilt for tiktoken, sparing a second BPE: its ids are exactly those of
Hugging Face's tokenizers (`rank_tokens` says why), or it is refused.

Text is data: what spells a special token stays text, in chat turns always, else unless `allow_special=True`. All added tokens
of a `tokenizer.json` count as special, and each matches just its own spelling.

    tokenizer = Tokenizer.from_checkpoint("Llama-3.1-8B-Instruct")
    decoder = tokenizer.stream()
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    for block in engine.generate(ids, max_new_tokens=100):
        print(decoder.push(block.tokens), end="")  # never half a character, however the ids are cut
    print(decoder.flush())

Sources: Meta's llama-models (split regex, rank file, limit on runs), Llama 3.1 on Hugging Face (names of special tokens), GPT-2
(byte alphabet). No other pre-tokenizer, no normalizer, no tool or image turns, no date header.
"""

from __future__ import annotations

import base64
import codecs
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import tiktoken

TOKENIZER_FILES = ("tokenizer.model", "original/tokenizer.model", "tokenizer.json")  # the first one is read
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL_TOKENS = (  # in the order of their ids, which follow the last rank
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)))
CHAT_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHAT_ROLES = ("system", "user", "assistant")
# tiktoken 0.14 panics on a run of 1,000,000 spaces; older ones take a run of letters in quadratic time. Runs are cut at this
# length, as Meta's tokenizer cuts them; text without so long a run is never cut.
MAX_RUN_CHARS = 25_000
RUNS = re.compile(r"[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+")  # only for Python are those four characters whitespace


def bad_file(file: Path, got: object, expected: str, mend: str = "Download the file again.") -> ValueError:
    return ValueError(f"{file}: got {got}, expected {expected}. {mend}")


def split_long_runs(text: str) -> Iterator[str]:
    """Cut `text` inside runs of whitespace, or of anything else, over MAX_RUN_CHARS long; nowhere else."""
    start = 0
    for run in RUNS.finditer(text) if len(text) > MAX_RUN_CHARS else ():
        for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
            yield text[start:cut]
            start = cut
    yield text[start:]


def bpe_encoder(file: Path, tokens: list[bytes], ids: list[int], split: str) -> Callable[[str], list[int]]:
    """Plain text to ids by tiktoken. `tokens` come in the order of their ranks; `ids` are theirs."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    missing = [hex(byte) for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise bad_file(file, f"no token for {len(missing)} bytes ({missing[0]} …)", "one for each of the 256")
    # tokenizers keeps what the regex leaves out as a piece of its own; tiktoken would drop it.
    pattern = rf"(?:{split})|(?:(?!{split})[\s\S])+"
    try:
        core = tiktoken.Encoding("gavel", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise bad_file(file, f"the split regex {split!r}", f"one that tiktoken compiles ({error})") from None
    return lambda text: [ids[rank] for part in split_long_runs(text) for rank in core.encode_ordinary(part)]


def read_tiktoken(file: Path, data: bytes) -> Tokenizer:
    """A file of ranks, one `base64 rank` per line; the special tokens of Llama 3.1 follow the last."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise bad_file(file, f"line {number}: {line[:60]!r}", "a token in base64 and its rank") from None
    tokens = sorted(ranks, key=ranks.__getitem__)
    ids = [ranks[token] for token in tokens]
    if ids != list(range(len(ids))):
        raise bad_file(file, f"{len(ids)} tokens with ranks {ids[0]} to {ids[-1]}", "each from 0 on once")
    special_tokens = {name: len(ids) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    return Tokenizer(dict(enumerate(tokens)), special_tokens, bpe_encoder(file, tokens, ids, LLAMA3_SPLIT))


def gpt2_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones are themselves, the others the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def merge(token: bytes, pair_ranks: dict[tuple[bytes, bytes], int]) -> tuple[list[bytes], float]:
    """Byte-pair merging by the book: the parts that the bytes of `token` end in, and the last merge."""
    parts, last = [token[i:i + 1] for i in range(len(token))], -1.0
    while len(parts) > 1:
        ranks = [pair_ranks.get(pair, math.inf) for pair in zip(parts, parts[1:])]
        i = ranks.index(min(ranks))
        if ranks[i] == math.inf:
            break
        parts[i:i + 2], last = [parts[i] + parts[i + 1]], ranks[i]
    return parts, last


def rank_tokens(
    tokens: Iterable[bytes], merges: list[tuple[bytes, bytes]], *, ignore_merges: bool,
) -> list[bytes]:
    """The tokens in an order which, taken as ranks, makes tiktoken cut any text as the merges do.

    Merges rank pairs; tiktoken ranks tokens, joins any two neighbours that spell one, and takes a whole word that is one (as
    `ignore_merges` does). Rank each token by the last merge on its own way from bytes to itself. What is merged inside a span
    does not depend on its surroundings; so, as long as both have gone alike, neighbours that spell a token are the last two
    parts on its way, and both join such pairs in the same order.

    A token that the merges do not make of its own bytes never occurs and is left out, or with `ignore_merges` stays, as a whole
    word only. If its bytes end in just two parts, tiktoken would join them: a ValueError.
    """
    pair_ranks = {pair: rank for rank, pair in enumerate(merges)}
    last_merge: dict[bytes, float] = {}
    for token in tokens:
        parts, last = merge(token, pair_ranks)
        if len(parts) == 1:
            last_merge[token] = last
        elif ignore_merges and len(parts) == 2:
            raise ValueError(f"ignore_merges, and a token {token!r} without a merge of {parts}")
        elif ignore_merges:
            last_merge[token] = math.inf
    return sorted(last_merge, key=last_merge.__getitem__)


def read_tokenizer_json(file: Path, data: bytes) -> Tokenizer:
    """The byte-level BPE in a `tokenizer.json` that splits text as Llama 3's does; ValueError for another."""
    other_kind = "gavel reads BPE as in Llama 3; put the tokenizer.model of another kind beside this file."
    try:
        raw = json.loads(data)
        model, vocab = raw["model"], dict(raw["model"]["vocab"])
        special_tokens = {token["content"]: token["id"] for token in raw.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError) as error:
        raise bad_file(file, f"{type(error).__name__}: {error}", "JSON of a Hugging Face tokenizer") from None
    if model.get("type", "BPE") != "BPE":
        raise bad_file(file, f"model.type {model['type']!r}", "'BPE'", other_kind)
    unused = {key: model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")}
    for key, got in {**unused, "normalizer": raw.get("normalizer")}.items():
        if got:
            raise bad_file(file, f"{key} {json.dumps(got)[:200]}", "none", other_kind)
    match raw.get("pre_tokenizer"):
        case {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(split)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}:
            pass
        case got:
            raise bad_file(file, f"pre_tokenizer {json.dumps(got)[:200]}",
                           "a Split by Regex, Isolated, then a ByteLevel without space and regex", other_kind)
    alphabet = gpt2_alphabet()
    try:  # a special token is no part of the BPE, even where the vocabulary lists it
        spelled = {name: bytes(alphabet[c] for c in name) for name in vocab if name not in special_tokens}
    except KeyError as char:
        raise bad_file(file, f"{char} in model.vocab", "only GPT-2's alphabet of bytes", other_kind) from None
    ids = {token: vocab[name] for name, token in spelled.items()}
    all_ids = [*ids.values(), *special_tokens.values()]
    if not all(type(i) is int and i >= 0 for i in all_ids) or len(set(all_ids)) < len(all_ids):
        raise bad_file(file, "ids that are negative, no integers or not unique", "an id for each token")
    # Older files have "a b", newer ones ["a", "b"].
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ())]
    unknown = {name for pair in pairs for name in (*pair, "".join(pair))} - spelled.keys()
    if unknown:
        raise bad_file(file, f"merges with {sorted(unknown)[:4]}", "tokens of model.vocab in all merges")
    try:
        merges = [(spelled[left], spelled[right]) for left, right in pairs]
        tokens = rank_tokens(ids, merges, ignore_merges=bool(model.get("ignore_merges")))
    except ValueError as error:
        raise bad_file(file, error, "a merge for each token", "Add the merge or remove the token.") from None
    encode_text = bpe_encoder(file, tokens, [ids[token] for token in tokens], split)
    return Tokenizer({i: token for token, i in ids.items()}, special_tokens, encode_text)


def read_sentencepiece(file: Path, data: bytes) -> Tokenizer:
    """A sentencepiece model, BPE or unigram. Its control tokens are the special tokens."""
    import sentencepiece  # only who has such a model needs it

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise bad_file(file, f"no sentencepiece model ({error})", "one, or tiktoken's ranks") from None
    pieces: dict[int, bytes] = {}
    special_tokens: dict[str, int] = {}
    for i in range(model.get_piece_size()):
        piece = model.id_to_piece(i)
        if model.is_control(i):
            special_tokens[piece] = i
        elif model.is_byte(i):
            pieces[i] = bytes.fromhex(piece[3:5])  # "<0xE4>"
        else:
            pieces[i] = (model.decode([i]) if model.is_unknown(i) else piece.replace("\u2581", " ")).encode()
    bos_id = model.bos_id() if model.bos_id() >= 0 else None
    adds_space = model.encode_as_pieces("a")[0].startswith("\u2581")
    return Tokenizer(pieces, special_tokens, model.encode, bos_id=bos_id, adds_space=adds_space)


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a tokenizer of any kind, told by its first bytes; ValueError if it is none."""
    data = file.read_bytes()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
        return read_tiktoken(file, data)
    if data.lstrip()[:1] == b"{":
        return read_tokenizer_json(file, data)
    if data[:1] == b"\n":  # the protobuf tag of a sentencepiece model's first piece
        return read_sentencepiece(file, data)
    raise bad_file(file, repr(data[:40]), "tiktoken's ranks, a sentencepiece model or a tokenizer.json",
                   "Download the file itself (a git-lfs pointer only names it).")


class StreamDecoder:
    """Ids to text as they come: bytes wait until they are a whole UTF-8 character, or can become none."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._special_ids = set(tokenizer.special_tokens.values())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.adds_space

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete. ValueError for an id outside the vocabulary."""
        data = []
        for i in ids:
            piece = self._tokenizer.token_bytes(i)
            if i not in self._special_ids:
                data.append(piece.removeprefix(b" ") if self._drop_space else piece)
                self._drop_space = False
            elif not self._skip_special:
                data.append(piece)
        return self._utf8.decode(b"".join(data))

    def flush(self) -> str:
        """What still waits: U+FFFD for half a character, else nothing. The next push begins a new text."""
        self._drop_space = self._tokenizer.adds_space
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """Text to ids and back; ids are 0 to `vocab_size` - 1, special tokens included.

    pieces: the bytes of each id that is not special; an id in a gap is no token, and decodes to nothing. encode_text: ids of
    plain text, no special tokens among them. adds_space: it puts a space before the text (sentencepiece's dummy prefix), which
    decoding drops.
    """

    def __init__(self, pieces: dict[int, bytes], special_tokens: dict[str, int],
                 encode_text: Callable[[str], list[int]], *, bos_id: int | None = None,
                 adds_space: bool = False) -> None:
        self._pieces = pieces | {i: name.encode() for name, i in special_tokens.items()}
        self._encode_text = encode_text
        names = sorted(special_tokens, key=len, reverse=True)  # the longest first: one may begin another
        self._special = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self.special_tokens = special_tokens
        self.vocab_size = max(self._pieces) + 1
        self.bos_id = special_tokens.get("<|begin_of_text|>") if bos_id is None else bos_id
        self.adds_space = adds_space
        self.has_chat = all(name in special_tokens for name in CHAT_TOKENS)

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> Tokenizer:
        """Read the tokenizer of a checkpoint directory. FileNotFoundError if none, ValueError if bad."""
        for name in TOKENIZER_FILES:
            if (Path(path) / name).is_file():
                return read_tokenizer(Path(path) / name)
        got = "a directory with none of them" if Path(path).is_dir() else "no such directory"
        raise FileNotFoundError(f"{path}: got {got}, expected {', '.join(TOKENIZER_FILES)}. "
                                "Copy the checkpoint's tokenizer there.")

    @cached_property
    def fingerprint(self) -> tuple:
        """Equal if and only if each id is the same bytes and is as special or not."""
        special = set(self.special_tokens.values())
        return tuple((i, i in special, piece) for i, piece in sorted(self._pieces.items()))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, at times half a character. ValueError for an id outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"got token id {token_id}, expected 0 to {self.vocab_size - 1}. "
                             "Is this the tokenizer of this model?")
        return self._pieces.get(token_id, b"")

    def encode(self, text: str, *, bos: bool = False, allow_special: bool = False) -> list[int]:
        """The ids of `text`, after BOS if asked for (and if there is one).

        With `allow_special` the name of a special token becomes that token: not for text of strangers. A lone surrogate, which
        UTF-8 can not spell, becomes U+FFFD.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for i, part in enumerate(self._special.split(text) if allow_special else [text]):
            ids += [self.special_tokens[part]] if i % 2 else self._encode_text(part)  # text and name by turns
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`, special tokens by name; bytes that are no UTF-8 become U+FFFD."""
        decoder = self.stream(skip_special=skip_special)
        return decoder.push(ids) + decoder.flush()

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that come in parts; all it returns, joined, is `decode` of all the ids."""
        return StreamDecoder(self, skip_special)

    def encode_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """A chat as Llama 3 has seen it: BOS, a turn for each `{"role": …, "content": …}`, and an open one.

        Without `add_generation_prompt` the assistant's turn is not opened. ValueError as `encode_turn`.
        """
        ids = [] if self.bos_id is None else [self.bos_id]
        for message in messages:
            if not isinstance(message.get("content"), str):
                raise ValueError(f"got a message with content {message.get('content')!r}, expected text.")
            ids += self.encode_turn(message.get("role", ""), message["content"])
        return ids + self.encode_turn("assistant") if add_generation_prompt else ids

    def encode_turn(self, role: str, content: str | None = None) -> list[int]:
        """One turn without BOS, for a chat that keeps its cache; without content, its header alone.

        ValueError for a role other than system, user and assistant, or if there are no header tokens.
        """
        if not self.has_chat:
            raise ValueError(f"got a tokenizer without {', '.join(CHAT_TOKENS)}, expected all. "
                             "Encode the prompt as raw text.")
        if role not in CHAT_ROLES:
            raise ValueError(f"got the role {role!r}, expected one of {', '.join(CHAT_ROLES)}.")
        start, end, eot = (self.special_tokens[name] for name in CHAT_TOKENS)
        body = self.encode("\n\n") if content is None else [*self.encode(f"\n\n{content.strip()}"), eot]
        return [start, *self.encode(role), end, *body]
