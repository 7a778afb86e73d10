"""Tokenizers: bytes as they are, and any tokenizer.json.

Documents are bytes, and bytes come back. A text is never read as a special token, and nothing is
added to it: the end of a document is for the caller to add.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dilated_factory.configs.files import read_regular
from dilated_factory.errors import InputError, missing_package

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
MOST_FILE_BYTES = 2**28
MOST_TOKENS = 2**24  # a vocabulary beyond is a mistake in the file
LEAST_VOCABULARY = 257  # of a byte-level BPE: the bytes and the end of a document
MOST_TEXT = 2**20  # characters that the library is given in one piece; it takes 200 bytes for each
# What ends a document, where the folder of a tokenizer does not say.
ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<eos>", "</s>", "<|eos|>", "[EOS]",
    "[SEP]",
)  # fmt: skip
# What to tell where decoding does not give back what was encoded.
INEXACT = (
    "the tokenizer changes texts, so the model will not write all that it reads: decoding does not "
    "give back the bytes. Bits per byte count the bytes of the files."
)


class Tokenizer(Protocol):
    """What makes tokens of documents.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        digest: SHA-256 of what defines it, in hexadecimal.
        end_of_document: the token that ends each document, if it has one.
        tokens: what each id adds to a text; nothing, for special tokens and ids without a token.
        sizes: int64 (vocab_size,), how many bytes that are.
        is_exact: whether decoding gave back all bytes that were tried.
    """

    vocab_size: int
    digest: str
    end_of_document: int | None
    tokens: Sequence[bytes]
    sizes: Tensor
    is_exact: bool

    def encode(self, documents: Sequence[bytes]) -> list[list[int]]:
        """The ids of each document, without an end of document."""

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of a text; special tokens and ids without a token add none."""


class Bytes:
    """A token for each byte: the default."""

    vocab_size = 256
    digest = hashlib.sha256(b"bytes").hexdigest()
    end_of_document: int | None = None
    tokens: Sequence[bytes] = tuple(bytes([byte]) for byte in range(256))
    sizes = torch.ones(256, dtype=torch.int64)
    is_exact = True

    def encode(self, documents: Sequence[bytes]) -> list[list[int]]:
        """The bytes themselves."""
        return [list(document) for document in documents]

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes themselves."""
        return bytes(ids)


BYTES = Bytes()


class FileTokenizer:
    """The tokenizer of a tokenizer.json, by the library `tokenizers`.

    Truncation, padding and dropout that the file asks for are left out. Bytes that are not UTF-8
    are tokens where the vocabulary has tokens of single bytes, and U+FFFD elsewhere; a tokenizer
    that puts a space before a text puts another one behind them.

    Args:
        path: the file, or a folder that holds tokenizer.json. The "eos_token" of a
            tokenizer_config.json beside it ends documents; without one, a special token of one of
            the usual names does.

    Attributes:
        path: the file.
        read: the content of each file that was read, by name.

    Raises:
        InputError: the file is no tokenizer, or its vocabulary is empty or has an id out of range.
        MissingPackageError: `tokenizers` is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise missing_package("a tokenizer.json", "tokenizers") from None
        self.path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        self.read: dict[str, bytes] = {}
        try:
            content = self._read(self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"a tokenizer must be a tokenizer.json or the folder of one. Got {str(path)!r}."
            ) from None
        with _told(self.path):
            values = json.loads(content)
            self._library: Any = tokenizers.Tokenizer.from_str(content.decode())
            self._library.no_truncation()
            self._library.no_padding()
            if getattr(self._library.model, "dropout", None) is not None:
                self._library.model.dropout = None
            self._library.encode_special_tokens = True
            vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise InputError(f"the vocabulary of a tokenizer must not be empty. Got {self._name}.")
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > MOST_TOKENS:
            raise InputError(
                f"the ids of a tokenizer must be below {MOST_TOKENS:,}. Got {self.vocab_size - 1:,}"
                f" in {self._name}."
            )
        added = {int(each["id"]): each for each in values.get("added_tokens") or ()}
        special = {id: each["content"] for id, each in added.items() if each.get("special")}
        self.end_of_document = self._end(vocabulary, special)
        defining = content + f"\0{self.end_of_document}".encode()
        self.digest = hashlib.sha256(defining).hexdigest()
        self._bytes = _byte_tokens(values, vocabulary)
        with _told(self.path):
            self.tokens: Sequence[bytes] = self._read_tokens(values, vocabulary, added)
        self.sizes = torch.tensor([len(token) for token in self.tokens])
        self.is_exact = all(map(self._gives_back, _PROBES))

    @property
    def _name(self) -> str:
        return repr(str(self.path))

    def _read(self, path: Path) -> bytes:
        self.read[path.name] = content = read_regular(path, most=MOST_FILE_BYTES)
        return content

    def _end(self, vocabulary: Mapping[str, int], special: Mapping[int, str]) -> int | None:
        settings = self.path.with_name(SETTINGS)
        said: Any = None
        if settings.exists():
            with _told(settings):
                said = json.loads(self._read(settings)).get("eos_token")
        name = said.get("content") if isinstance(said, dict) else said
        if name is not None:
            if not isinstance(name, str) or name not in vocabulary:
                raise InputError(
                    f"eos_token in {str(settings)!r} must be in the vocabulary of {self._name}. "
                    f"Got {name!r}."
                )
            return vocabulary[name]
        usual = [vocabulary[name] for name in ENDS if name in special.values()]
        return usual[0] if usual else None

    def _read_tokens(
        self, values: Any, vocabulary: Mapping[str, int], added: Mapping[int, Any]
    ) -> list[bytes]:
        """What each id adds in the middle of a text."""
        tokens = [b""] * self.vocab_size
        by_byte = _has_part(values.get("decoder"), "ByteLevel") or _has_part(
            values.get("pre_tokenizer"), "ByteLevel"
        )
        single = {id: bytes([byte]) for byte, id in self._bytes.items()}
        plain = []
        for token, id in vocabulary.items():
            if id in added:
                tokens[id] = b"" if added[id].get("special") else token.encode()
            elif id in single:
                tokens[id] = single[id]
            elif by_byte and all(character in _BYTE_OF for character in token):
                tokens[id] = bytes(_BYTE_OF[character] for character in token)
            elif by_byte:
                tokens[id] = token.encode()
            else:
                plain.append(id)
        if plain:
            # The library may treat the first token of a text in another way, so none is the first.
            anchor = min(plain)
            start = len(self._library.decode([anchor]))
            pairs = self._library.decode_batch([[anchor, id] for id in plain])
            for id, text in zip(plain, pairs, strict=True):
                tokens[id] = text[start:].encode()
        self._firsts = frozenset(plain)
        return tokens

    def files(self) -> dict[str, bytes]:
        """What to write into a folder, by name, so that it is a folder of this tokenizer."""
        content = self.read[self.path.name]
        if self.end_of_document is None:
            return {FILE: content}
        end = self._library.id_to_token(self.end_of_document)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        return {FILE: content, SETTINGS: (json.dumps(settings, indent=2) + "\n").encode()}

    def encode(self, documents: Sequence[bytes]) -> list[list[int]]:
        """The ids of each document; nothing is added, and no text is read as a special token.

        Raises:
            InputError: the vocabulary lacks a token and has none for what is unknown.
        """
        pieces = [list(self._pieces(document)) for document in documents]
        texts = [piece for parts in pieces for piece in parts if isinstance(piece, str)]
        try:
            encodings = iter(self._library.encode_batch_fast(texts, add_special_tokens=False))
        except Exception as error:  # the library's own, of vocabularies without an unknown token
            reason = " ".join(str(error).split())
            raise InputError(f"{self._name} has no tokens for a document: {reason}") from None
        return [
            [
                id
                for piece in parts
                for id in (next(encodings).ids if isinstance(piece, str) else piece)
            ]
            for parts in pieces
        ]

    def _gives_back(self, text: bytes) -> bool:
        try:
            return self.decode(self.encode([text])[0]) == text
        except InputError:
            return False

    def _pieces(self, document: bytes) -> Iterator[str | list[int]]:
        """Texts that the library can take, and ids of the bytes that are none."""
        while document:
            try:
                text, bad, document = document.decode(), b"", b""
            except UnicodeDecodeError as error:
                text = document[: error.start].decode()
                bad, document = document[error.start : error.end], document[error.end :]
            yield from cut(text)
            ids = [self._bytes[byte] for byte in bad if byte in self._bytes]
            if len(ids) == len(bad):
                yield ids
            else:
                yield "\N{REPLACEMENT CHARACTER}"

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of a text; special tokens and ids without a token add none."""
        if not ids:
            return b""
        first = ids[0]
        begin = self._library.decode([first]).encode() if first in self._firsts else None
        return (self.tokens[first] if begin is None else begin) + b"".join(
            self.tokens[id] for id in ids[1:]
        )


def load_tokenizer(path: str | Path | None) -> Tokenizer:
    """The tokenizer of a file or folder, `BYTES` for None; raises as `FileTokenizer`.

    Examples:
        >>> tokenizer = load_tokenizer(None)  # a token is a byte
        >>> tokenizer.decode(tokenizer.encode([b"any"])[0])
        b'any'
    """
    return BYTES if path is None else FileTokenizer(path)


def rounded(vocab_size: int) -> int:
    """The size of a model's vocabulary: a multiple of 64, since matrices of others are slower."""
    return -(-vocab_size // 64) * 64


def cut(text: str) -> Iterator[str]:
    """A text in pieces that are not too long, each but the last ending with a line if one ends."""
    while len(text) > MOST_TEXT:
        end = MOST_TEXT
        while (end := text.rfind("\n", 0, end)) > 0 and text[end + 1].isspace():
            pass
        end = end + 1 if end > 0 else MOST_TEXT
        yield text[:end]
        text = text[end:]
    if text:
        yield text


def _has_part(value: Any, kind: str) -> bool:
    """Whether a decoder, or what stands there in a tokenizer.json, is or contains one of a kind."""
    if not isinstance(value, dict):
        return False
    parts = [*(value.get("decoders") or ()), *(value.get("pretokenizers") or ())]
    return value.get("type") == kind or any(_has_part(part, kind) for part in parts)


def _byte_characters() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (GPT-2's)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF = _byte_characters()


def _byte_tokens(values: Any, vocabulary: Mapping[str, int]) -> dict[int, int]:
    """The ids of single bytes, by byte; empty where not all have one."""
    by_byte = _has_part(values.get("decoder"), "ByteLevel")
    names = {byte: character for character, byte in _BYTE_OF.items()}
    if not by_byte:
        names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    found = {byte: vocabulary[name] for byte, name in names.items() if name in vocabulary}
    return found if len(found) == 256 else {}


# Spaces, cases, composed and other characters, line ends, no UTF-8: what tokenizers lose.
_PROBES = (
    b"a", b" a  b ", b"A\tb\r\n\n", "\u00e9 e\u0301 \ufb01 \uff21 \u65e5\u672c \U0001f600".encode(),
    b"a\x00 \xff\xfe\x80", b"don't , [x] ##y.",
)  # fmt: skip


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever the library makes of a file is an error about the file."""
    try:
        yield
    except (InputError, OSError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{str(path)!r} is no tokenizer: {reason}") from None
