"""Language models of torchscale's recipe for fairseq: their shape, and their dictionary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dilated_factory.configs.files import open_regular
from dilated_factory.configs.models import LongNetConfig
from dilated_factory.errors import InputError
from dilated_factory.interop.checkpoints import Source, layer_count, read_checkpoint
from dilated_factory.interop.torchscale import load_torchscale
from dilated_factory.models.longnet import LongNetLM

# What stands before the words of a dictionary, in fairseq's order.
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_OVERWRITE = " #fairseq:overwrite"
_WORDS = 2**24


def load_fairseq(source: Source, given: LongNetConfig | None = None) -> LongNetLM:
    """The language model of a checkpoint, its shape told by tensors and the settings beside them.

    Args:
        source: as of `load_torchscale`.
        given: fields that are set in it take the place of what is told; those that neither the
            tensors nor the settings tell must be set.

    Raises:
        InputError: the checkpoint is no language model of LongNet, or does not tell enough.
        pickle.UnpicklingError: as of `load_torchscale`.
    """
    tensors, settings = read_checkpoint(source)
    told = _shape(tensors, settings)
    if given is not None:
        told |= given.model_dump(include=given.model_fields_set - {"kind"})
    if "num_heads" not in told:
        raise InputError("num_heads must be given: the checkpoint has no settings that tell it.")
    return load_torchscale(source, LongNetConfig(**told)).float()


def _shape(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    words = [name for name in tensors if name.endswith("embed_tokens.weight")]
    if len(words) != 1 or tensors[words[0]].ndim != 2:
        raise InputError(
            "a checkpoint of a language model must have one embed_tokens.weight. "
            f"Got {len(words)} among {len(tensors)} tensors."
        )
    prefix = words[0].removesuffix("embed_tokens.weight")
    rows, width = tensors[words[0]].shape
    inner = tensors.get(f"{prefix}layers.0.ffn.fc1.weight")
    told: dict[str, Any] = {
        "vocab_size": rows,
        "embed_dim": width,
        "num_layers": max(1, layer_count(tensors, f"{prefix}layers.")),
        "ffn_dim": None if inner is None else len(inner),
    }
    for field, names in (
        ("num_heads", ("decoder_attention_heads",)),
        ("context", ("tokens_per_sample", "max_target_positions")),
    ):
        found = [settings[name] for name in names if type(settings.get(name)) is int]
        if found and found[0] > 0:
            told[field] = found[0]
    return told


def read_dictionary(path: str | Path) -> list[str]:
    """The words of a fairseq dict.txt by their number, special ones included.

    Raises:
        InputError: a line is not a word and its count, or a word is there twice.
        OSError: there is no such file.
    """
    words = dict.fromkeys(SPECIAL)
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{str(path)!r}, line {number}"
            try:
                text = line.decode("utf-8").rstrip()
            except UnicodeDecodeError:
                raise InputError(f"{where} must be UTF-8.") from None
            again = text.endswith(_OVERWRITE)
            word, _, count = text.removesuffix(_OVERWRITE).rpartition(" ")
            if not word or not count.isdecimal():
                raise InputError(f"{where} must be a word and its count. Got {text[:80]!r}.")
            if word in words:
                raise InputError(
                    f"{where} must be a word that is not there yet. Got {word[:80]!r}"
                    f"{', to be overwritten, which is not supported' if again else ''}."
                )
            words[word] = None
            if len(words) > _WORDS:
                raise InputError(f"{str(path)!r} must hold at most {_WORDS:,} words.")
    return list(words)


def dictionary_tokenizer(words: list[str]) -> dict[str, Any]:
    """What a dictionary is as the content of a tokenizer.json.

    As fairseq does it, words are what stands between white space, and the end of a line is
    ``</s>``; what is no word is ``<unk>``. So lines have to be of words already, as the binarised
    corpus was made of.
    """
    end = SPECIAL[2]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": "\n"}, "content": f" {end} "},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                # Puts a space before each word but the first; no word begins with its prefix.
                {"type": "WordPiece", "prefix": "\x00", "cleanup": False},
                {"type": "Replace", "pattern": {"String": f" {end}"}, "content": "\n"},
            ],
        },
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": SPECIAL[3],
        },
    }
