"""The tokens of bases: the vocabulary of HyenaDNA and Caduceus, in which a base is a token."""

from typing import Any, Literal

import numpy as np

Case = Literal["upper", "keep"]

# The number of a token is its place. Behind those of both projects, bases in lower case.
VOCABULARY = (
    *("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"),
    *"ACGTN",
    *"acgtn",
)
SEP, PAD, UNK = (VOCABULARY.index(name) for name in ("[SEP]", "[PAD]", "[UNK]"))
UNKNOWN_BASES = VOCABULARY.index("N"), VOCABULARY.index("n")
_UPPER = VOCABULARY.index("a")  # how many there are without lower case
_MULTIPLE = 8

# Each IUPAC letter and the one that stands for the complements of its bases.
_COMPLEMENTS = str.maketrans("ACGTURYSWKMBDHVNacgturyswkmbdhvn", "TGCAAYRSWMKVHDBNtgcaayrswmkvhdbn")


def vocab_size(case: Case) -> int:
    """How many rows an embedding has: 16, or 24 where lower case has tokens of its own.

    Both are what there is, rounded up to a multiple of 8.
    """
    count = len(VOCABULARY) if case == "keep" else _UPPER
    return -(-count // _MULTIPLE) * _MULTIPLE


def encode(sequence: str, case: Case = "upper") -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The tokens of bases, uint8 (len(sequence),), without special ones at the ends.

    With "upper" lower case, which is the soft mask of repeats, is what upper case is; with "keep"
    it has tokens of its own, 12 to 16. All other letters, those of IUPAC among them, are [UNK].
    """
    return _TABLES[case][np.frombuffer(sequence.encode("latin-1", "replace"), dtype=np.uint8)]


def reverse_complement(sequence: str) -> str:
    """The other strand, read in its direction; IUPAC letters and lower case stay what they are.

    What is no letter of IUPAC's stays as it is. U becomes A.
    """
    return sequence.translate(_COMPLEMENTS)[::-1]


def _table(case: Case) -> np.ndarray[Any, np.dtype[np.uint8]]:
    table = np.full(256, UNK, dtype=np.uint8)
    for base in "ACGTN":
        table[ord(base)] = VOCABULARY.index(base)
        table[ord(base.lower())] = VOCABULARY.index(base.lower() if case == "keep" else base)
    return table


_TABLES: dict[Case, np.ndarray[Any, np.dtype[np.uint8]]] = {
    "upper": _table("upper"),
    "keep": _table("keep"),
}
