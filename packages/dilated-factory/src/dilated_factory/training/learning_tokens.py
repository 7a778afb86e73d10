"""Byte-level BPE, learned from the files that a run would train on."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dilated_factory.corpora.tokens import ENDS, LEAST_VOCABULARY, MOST_TOKENS, cut
from dilated_factory.errors import InputError, missing_package
from dilated_factory.training.corpus import Corpus, Reading, load_corpus


class Learned(NamedTuple):
    """The text of a tokenizer.json, and what it was learned from, files as of a `Corpus`."""

    text: str
    bytes_read: int
    readings: tuple[Reading, ...]


def learn_tokenizer(
    paths: Sequence[str | Path],
    vocab_size: int,
    *,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
    **options: Any,
) -> Learned:
    """Learn a tokenizer of so many tokens: 256 bytes, the end of a document, and merges.

    Args:
        paths: files and folders; those that `load_corpus` holds out are not learned from.
        vocab_size: 257 or more.
        on_progress: is told what is done, and which share of the reading is.
        options: of `load_corpus`, such as ``text_field``.

    Raises:
        InputError: no tokenizer of this size can be learned from these files.
        CorpusError: a path does not exist, or there is nothing to read.
        MissingPackageError: `tokenizers` is not installed.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("text").write_bytes(b"Any bytes will do. " * 100)
        >>> learned = learn_tokenizer(["text"], 264)
        >>> _ = Path("tokenizer.json").write_text(learned.text, encoding="utf-8")
        >>> len(load_tokenizer("tokenizer.json").encode([b"Any bytes"])[0]) < 9
        True
    """
    if not LEAST_VOCABULARY <= vocab_size <= MOST_TOKENS:
        raise InputError(
            f"vocab_size must be from {LEAST_VOCABULARY} to {MOST_TOKENS}. Got {vocab_size}."
        )
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise missing_package("`dilated tokenize`", "tokenizers") from None
    corpus = load_corpus(paths, **options)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[ENDS[0]], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(_texts(corpus, on_progress), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise InputError(
            f"vocab_size must be at most {found} for this corpus, which holds no more pairs to "
            f"merge. Got {vocab_size}."
        )
    return Learned(tokenizer.to_str(pretty=True), len(corpus.train), corpus.readings)


def _texts(corpus: Corpus, on_progress: Callable[[str, float], None]) -> Iterator[str]:
    """The documents to train on; what is not UTF-8 in them teaches nothing."""
    length = len(corpus.train)
    ends = corpus.ends[corpus.ends < length].tolist()
    for start, stop in pairwise(sorted({0, length, *ends})):
        on_progress("reading", start / length)
        yield from cut(corpus.train[start:stop].numpy().tobytes().decode("utf-8", "ignore"))
    on_progress("learning what to merge", 1.0)
