"""Text to token ids and back: three libraries behind one face, with Llama 3.1's chat format.

A library only turns plain text into ids; bytes, special tokens and chat turns are ours: a stream
never shows half a character, text never becomes a special token unless `allow_special`. JSON is for
tokenizers, lines of `base64 rank` for tiktoken, a protobuf for sentencepiece. A `tokenizer.json`
must be byte-level BPE that keeps all text; `encode` raises ValueError where ids would lose some.

    tokenizer = Tokenizer.from_checkpoint("Llama-3.1-8B-Instruct")
    tokenizer.decode(tokenizer.encode_prompt("Hello"))  # or stream(), for ids that come in parts

Sources: Meta's llama-models (split regex, rank file, limit on runs), Llama 3.1 on Hugging Face
(special tokens), GPT-2 (byte alphabet). No normalizers, tool turns, date header or other chat.
"""

from __future__ import annotations

import base64
import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers

TOKENIZER_FILES = ("tokenizer.model", "original/tokenizer.model", "tokenizer.json")  # in this order
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in (  # by id; they follow the last rank
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id",
    "eom_id", "eot_id", "python_tag", *(f"reserved_special_token_{i}" for i in range(3, 248))))
CHAT_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# Longer runs are cut, as Meta does: tiktoken panics on 1,000,000 spaces, tokenizers on 12,000,000.
TIKTOKEN_RUN, TOKENIZERS_RUN = 25_000, 1_000_000
RUNS = re.compile(r"[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+")  # only Python sees whitespace in those four
OTHER_KIND = "Put the tokenizer.model of another kind beside this file."
NO_NORMALIZER = (None, {"type": "Sequence", "normalizers": []})


class BadTokenizer(ValueError):
    """A file that gavel can not read."""

    def __init__(self, file: Path, got: str, expected: str, mend="Download the file again."):
        super().__init__(f"{file}: got {got}, expected {expected}. {mend}")


@contextmanager
def refusing(file: Path, expected: str) -> Iterator[None]:
    """Turn whatever a library raises over `file` into BadTokenizer."""
    try:
        yield
    except (BadTokenizer, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        raise BadTokenizer(file, f"{type(error).__name__}: {error}"[:300], expected) from error


def split_long_runs(text: str, limit: int) -> list[str]:
    """Cut `text` inside runs of whitespace, or of anything else, over `limit` long; only there."""
    runs = RUNS.finditer(text) if len(text) > limit else ()
    cuts = [cut for run in runs for cut in range(run.start() + limit, run.end(), limit)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, None])]


def read_tiktoken(file: Path, data: bytes) -> Tokenizer:
    """A file of ranks, `base64 rank` a line; the special tokens of Llama 3.1 follow the last."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise BadTokenizer(file, f"line {number}: {line[:60]!r}",
                               "a token in base64 and its rank") from None
    pieces = {rank: token for token, rank in ranks.items()}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise BadTokenizer(file, f"{len(ranks)} tokens with ranks {min(pieces)} to {max(pieces)}",
                           "each from 0 on once")
    if missing := [hex(byte) for byte in range(256) if bytes([byte]) not in ranks]:  # else a panic
        raise BadTokenizer(file, f"no token for {len(missing)} bytes ({missing[0]} …)",
                           "one for each of the 256")
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    bpe = tiktoken.Encoding("gavel", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(pieces, special, lambda text: [
        i for part in split_long_runs(text, TIKTOKEN_RUN) for i in bpe.encode_ordinary(part)])


def gpt2_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: itself if printable, else a character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def check_byte_level(file: Path, raw: dict) -> None:
    """BadTokenizer unless `raw` is byte-level BPE that keeps all text."""
    model, pre_tokenizer = raw["model"], raw.get("pre_tokenizer") or {}
    splits = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    keeps = [one.get("type") for one in splits].count("ByteLevel") == 1 and all(
        one["type"] in ("Split", "Punctuation", "Digits", "ByteLevel")  # they can keep all text
        and one.get("behavior") != "Removed" and not one.get("add_prefix_space") for one in splits)
    kind, normalizer, decoder = model.get("type", "BPE"), raw.get("normalizer"), raw.get("decoder")
    unused = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    for name, got, fine, expected in (
            ("model.type", kind, kind == "BPE", "BPE"),
            *((f"model.{key}", model.get(key), not model.get(key), "none") for key in unused),
            ("normalizer", normalizer, normalizer in NO_NORMALIZER, "none"),
            ("pre_tokenizer", pre_tokenizer, keeps, "one ByteLevel, no added space, all text kept"),
            ("decoder", decoder, decoder and decoder.get("type") == "ByteLevel", "a ByteLevel")):
        if not fine:
            raise BadTokenizer(file, f"{name} {json.dumps(got)[:200]}", expected, OTHER_KIND)


def read_tokenizer_json(file: Path, data: bytes) -> Tokenizer:
    """The byte-level BPE in a Hugging Face `tokenizer.json`, by the tokenizers library."""
    raw = json.loads(data)
    check_byte_level(file, raw)
    vocab, added = raw["model"]["vocab"], raw.get("added_tokens") or []
    special_tokens = {token["content"]: token["id"] for token in added}
    # A special token is no part of the BPE, even where the vocabulary lists it.
    plain = {name: i for name, i in vocab.items() if name not in special_tokens}
    ids = [*plain.values(), *special_tokens.values()]
    if (not all(type(i) is int and 0 <= i < 2**31 for i in ids)
            or len(set(ids)) < len(plain) + len(added)
            or any(vocab.get(name, i) != i for name, i in special_tokens.items())):
        raise BadTokenizer(file, "ids that are negative, huge, no integers or not unique",
                           "one for each token, 0 to 2147483647")
    if not all(map(str.strip, special_tokens)):  # as in GPT-NeoX
        raise BadTokenizer(file, "a blank added token", "none: it would match text", OTHER_KIND)
    alphabet = gpt2_alphabet()
    if foreign := sorted(set("".join(plain)) - alphabet.keys()):
        raise BadTokenizer(file, f"{foreign[:4]} in model.vocab", "GPT-2's alphabet", OTHER_KIND)
    pieces = {i: bytes([alphabet[char] for char in name]) for name, i in plain.items()}
    # Nothing else: no added token that text could match, no post-processor's BOS, no truncation.
    backend = tokenizers.Tokenizer.from_str(json.dumps({
        "version": "1.0", "pre_tokenizer": raw["pre_tokenizer"],
        "model": {**raw["model"], "type": "BPE", "vocab": plain, "unk_token": None}}))

    def encode_text(text: str) -> list[int]:
        with refusing(file, "a pre_tokenizer that can split this text"):
            ids = [i for part in split_long_runs(text, TOKENIZERS_RUN)
                   for i in backend.encode(part, add_special_tokens=False).ids]
        spelled, expected = b"".join([pieces[i] for i in ids]), text.encode()
        if spelled != expected:  # tokenizers drops a byte without a token
            start = len(os.path.commonprefix([spelled, expected]).decode(errors="ignore"))
            raise ValueError(f"got {text[start:start + 1]!r} in a text, expected characters that "
                             f"{file} has tokens for. Leave it out.")
        return ids

    return Tokenizer(pieces, special_tokens, encode_text)


def read_sentencepiece(data: bytes) -> Tokenizer:
    """A sentencepiece model, BPE or unigram. Its control tokens are the special tokens."""
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces, special_tokens = {}, {}
    for i, piece in enumerate(model.id_to_piece(list(range(len(model))))):
        if model.is_control(i):
            special_tokens[piece] = i
        elif model.is_byte(i):
            pieces[i] = bytes.fromhex(piece[3:5])  # "<0xE4>"
        else:
            text = model.decode([i]) if model.is_unknown(i) else piece.replace("\u2581", " ")
            pieces[i] = text.encode()
    return Tokenizer(pieces, special_tokens, model.encode, bos_id=model.bos_id(),
                     adds_space=model.encode_as_pieces("a")[0].startswith("\u2581"))


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a tokenizer of any kind, told by its first bytes; BadTokenizer if it is none."""
    data = file.read_bytes()
    with refusing(file, "a whole tokenizer"):
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
            return read_tiktoken(file, data)
        if data.lstrip()[:1] == b"{":
            return read_tokenizer_json(file, data)
        if data[:1] == b"\n":  # the protobuf tag of a sentencepiece model's first piece
            return read_sentencepiece(data)
    raise BadTokenizer(file, repr(data[:40]), "tiktoken's ranks, a sentencepiece model or a "
                       "tokenizer.json", "Download the file itself, not just its git-lfs pointer.")


class StreamDecoder:
    """Ids to text as they come: bytes wait until they are a UTF-8 character, or can be none."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._drop_space = tokenizer, tokenizer.adds_space
        self._special_ids = set(tokenizer.special_tokens.values())
        self._skipped = self._special_ids if skip_special else ()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete. ValueError for an id outside the vocabulary."""
        data = []
        for i in ids:
            piece = self._tokenizer.token_bytes(i)
            if self._drop_space and i not in self._special_ids:
                piece, self._drop_space = piece.removeprefix(b" "), False
            data.append(b"" if i in self._skipped else piece)
        return self._utf8.decode(b"".join(data))

    def flush(self) -> str:
        """What still waits: U+FFFD for half a character, else nothing. Then a new text begins."""
        self._drop_space = self._tokenizer.adds_space
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """Text to ids and back; ids are 0 to `vocab_size` - 1, special tokens included.

    pieces: bytes of each plain id; a gap decodes to nothing. encode_text: plain text to plain ids.
    adds_space: it puts a space before the text (sentencepiece's dummy prefix); decoding drops it.
    """

    def __init__(self, pieces: dict[int, bytes], special_tokens: dict[str, int],
                 encode_text: Callable[[str], list[int]], *, bos_id: int = -1, adds_space=False):
        self._pieces = pieces | {i: name.encode() for name, i in special_tokens.items()}
        names = sorted(special_tokens, key=len, reverse=True)  # one may begin another
        self._special = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self._encode_text, self.special_tokens = encode_text, special_tokens
        self.vocab_size, self.adds_space = max(self._pieces) + 1, adds_space
        self.bos_id = bos_id if bos_id >= 0 else special_tokens.get("<|begin_of_text|>")
        self.has_chat = all(name in special_tokens for name in CHAT_TOKENS)

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> Tokenizer:
        """Read a checkpoint's tokenizer. FileNotFoundError if it has none, ValueError if bad."""
        for name in TOKENIZER_FILES:
            if (Path(path) / name).is_file():
                return read_tokenizer(Path(path) / name)
        got = "a directory with none of them" if Path(path).is_dir() else "no such directory"
        raise FileNotFoundError(f"{path}: got {got}, expected {', '.join(TOKENIZER_FILES)}. "
                                "Copy the checkpoint's tokenizer there.")

    @property
    def fingerprint(self) -> tuple:
        """Equal if and only if each id is the same bytes and is as special or not."""
        return tuple(sorted(self._pieces.items())), frozenset(self.special_tokens.values())

    def check_same(self, draft: Tokenizer) -> None:
        """ValueError where the draft's tokenizer reads the same ids as different text."""
        if self.fingerprint != draft.fingerprint:
            names = sorted(dict(self.special_tokens.items() ^ draft.special_tokens.items()))
            got = (f"special tokens of draft and target differ ({', '.join(names[:3])}, "
                   f"{len(names)} in all)" if names else f"vocabularies of draft "
                   f"({draft.vocab_size} tokens) and target ({self.vocab_size}) differ")
            raise ValueError(f"{got}; expected the same text for every id; "
                             "take two models of one family and generation")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, at times half a character. ValueError outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"got token id {token_id}, expected 0 to {self.vocab_size - 1}. "
                             "Is this the tokenizer of this model?")
        return self._pieces.get(token_id, b"")

    def encode(self, text: str, *, bos: bool = False, allow_special: bool = False) -> list[int]:
        """The ids of `text`, after BOS if asked for and known; a lone surrogate becomes U+FFFD.

        allow_special: special tokens may match; not for strangers' text. ValueError: no token fits.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for i, part in enumerate(self._special.split(text) if allow_special else [text]):
            ids += [self.special_tokens[part]] if i % 2 else self._encode_text(part)  # by turns
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`, special tokens by name; bytes that are no UTF-8 become U+FFFD."""
        decoder = self.stream(skip_special=skip_special)
        return decoder.push(ids) + decoder.flush()

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that come in parts; all it returns, joined, is `decode` of them."""
        return StreamDecoder(self, skip_special)

    def encode_chat(self, messages: list[dict], *, add_generation_prompt: bool = True) -> list[int]:
        """BOS, turns of `{"role", "content"}`, an open one. ValueError as `encode_turn`."""
        ids = [] if self.bos_id is None else [self.bos_id]
        for message in messages:
            if not isinstance(content := message.get("content"), str):
                raise ValueError(f"got a message with content {content!r}, expected text.")
            ids += self.encode_turn(message.get("role", ""), content)
        return ids + self.encode_turn("assistant") if add_generation_prompt else ids

    def encode_turn(self, role: str, content: str | None = None) -> list[int]:
        """One turn, no BOS; without content its header. ValueError: other roles, no chat tokens."""
        if not self.has_chat:
            raise ValueError(f"got a tokenizer without {', '.join(CHAT_TOKENS)}, expected all. "
                             "Encode the prompt as raw text.")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"got the role {role!r}, expected one of system, user, assistant.")
        start, end, eot = (self.special_tokens[name] for name in CHAT_TOKENS)
        body = self.encode("\n\n" if content is None else f"\n\n{content.strip()}")
        return [start, *self.encode(role), end, *body, *([] if content is None else [eot])]

    def encode_prompt(self, prompt: str, *, raw=False, system: str | None = None) -> list[int]:
        """A user turn; if `raw` or without chat tokens, BOS and text (ValueError for `system`)."""
        if raw or not self.has_chat:
            if system:
                raise ValueError("got --system, but this prompt is raw text (no chat tokens, or "
                                 "--raw); leave one of them out")
            return self.encode(prompt, bos=True)
        turns = [{"role": "system", "content": system}] if system else []
        return self.encode_chat([*turns, {"role": "user", "content": prompt}])
