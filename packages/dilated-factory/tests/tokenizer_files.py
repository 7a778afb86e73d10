"""Small tokenizers of several kinds, as files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = ["def hello(world):\n    return self.hello, world\n", "Été à la mer, don't 日本 <x>. "] * 9
END = "<|endoftext|>"


def byte_level(size: int = 300, normalizer: Any = None, special: tuple[str, ...] = (END,)) -> Any:
    """As GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(TEXT, trainer)
    return made


def single_bytes() -> Any:
    """A vocabulary of the bytes alone, whose ids are their values."""
    values = json.loads(byte_level(256, special=()).to_str())
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    vocabulary = {chr(byte): byte for byte in shown}
    vocabulary |= {chr(256 + index): byte for index, byte in enumerate(hidden)}
    values["model"] |= {"vocab": vocabulary, "merges": []}
    return Tokenizer.from_str(json.dumps(values))


def word_piece() -> Any:
    """As BERT's: lower case, spaces lost, no bytes."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=90, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def byte_fallback() -> Any:
    """As Llama 2's: spaces are marks, and bytes stand in for what is unknown."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False,
        special_tokens=names + [f"<0x{byte:02X}>" for byte in range(256)],
    )  # fmt: skip
    made.train_from_iterator(TEXT, trainer)
    return changed(made, added_tokens=lambda added: added[: len(names)])


def changed(made: Any, **parts: Callable[[Any], Any]) -> Any:
    """A tokenizer whose file has parts changed."""
    values = json.loads(made.to_str())
    for name, change in parts.items():
        values[name] = change(values[name])
    return Tokenizer.from_str(json.dumps(values))


def saved(made: Any, folder: Path) -> Path:
    """The folder, with the tokenizer in it."""
    folder.mkdir(exist_ok=True, parents=True)
    made.save(str(folder / "tokenizer.json"))
    return folder
