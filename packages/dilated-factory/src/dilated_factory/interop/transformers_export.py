"""A `LongNetLM` as a folder that transformers loads: weights, configurations, tokenizer."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from dilated_core import DilatedAttention
from dilated_factory.corpora.tokens import FileTokenizer
from dilated_factory.errors import InputError
from dilated_factory.interop.transformers import LongNetForCausalLM, LongNetPreTrainedConfig
from dilated_factory.models.generation import drawable
from dilated_factory.models.longnet import LongNetLM

TOKENIZER = "tokenizer.json"
# Code for trust_remote_code: what is imported is this package, which has to be installed.
REMOTE_FILE = "modeling_dilated_longnet.py"
REMOTE_CODE = f'''"""LongNet of dilated-factory, which has to be installed."""

from dilated_factory.interop.transformers import {LongNetForCausalLM.__name__}
from dilated_factory.interop.transformers import {LongNetPreTrainedConfig.__name__}

__all__ = ["{LongNetForCausalLM.__name__}", "{LongNetPreTrainedConfig.__name__}"]
'''


def export(model: LongNetLM, folder: Path, tokenizer: Path | None, *, remote_code: bool) -> None:
    """Write a folder; see `export_to_transformers`."""
    for layer in model.layers():
        attention = layer.attention.attention
        if type(attention) is not DilatedAttention or attention.pattern != model.config.pattern:
            raise InputError(
                "model must have the attention of its configuration, which is all that a folder "
                f"can tell. Got {type(attention).__name__}."
            )
    if folder.is_symlink() or folder.exists():
        if not folder.is_dir() or any(folder.iterdir()):
            raise InputError(f"folder must not exist yet, or be empty. Got {str(folder)!r}.")
    elif not folder.parent.is_dir():
        raise InputError(f"folder must be in one that exists. Got {str(folder)!r}.")
    words, unknown = load_tokenizer(model, tokenizer)
    # Beside it, so that a rename is all that is left to do.
    there = folder.resolve()
    temporary = Path(tempfile.mkdtemp(prefix=f".{there.name}.", suffix=".tmp", dir=there.parent))
    try:
        write(model, words, temporary, unknown, remote_code=remote_code)
        mask = os.umask(0)
        os.umask(mask)
        for path in temporary.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
            _sync(path)
        temporary.chmod(0o777 & ~mask)
        _sync(temporary)
        if there.exists() and os.name == "nt":
            there.rmdir()  # Windows renames onto nothing
        temporary.replace(there)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(there.parent)


def write(
    model: LongNetLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    unknown: list[int],
    *,
    remote_code: bool,
) -> None:
    """Write the files of a model, as it stands, and of its tokenizer, which has unknown ids."""
    config = LongNetPreTrainedConfig(model.config.model_dump(mode="json"))
    end = tokenizer.eos_token_id
    config.eos_token_id = end
    if remote_code:
        module = REMOTE_FILE.removesuffix(".py")
        config.auto_map = {
            "AutoConfig": f"{module}.{LongNetPreTrainedConfig.__name__}",
            "AutoModelForCausalLM": f"{module}.{LongNetForCausalLM.__name__}",
        }
        (folder / REMOTE_FILE).write_text(REMOTE_CODE, encoding="utf-8")
    with torch.random.fork_rng([]):
        exported: Any = LongNetForCausalLM(config)
    exported.longnet.load_state_dict(model.state_dict())
    exported.to(next(model.parameters()).dtype)
    exported.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=end, suppress_tokens=unknown or None
    )
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        exported.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)


def load_tokenizer(
    model: LongNetLM, path: Path | None
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer of a tokenizer.json, or of bytes, and the model's ids that stand for nothing.

    Raises:
        InputError: it cannot be read, or has tokens that the model does not know.
    """
    size = model.config.vocab_size
    if path is None:
        if size != 256:
            raise InputError(f"tokenizer must be given with a vocabulary of {size}. Got none.")
        return fast(byte_tokenizer(), None), []
    found = FileTokenizer(path)
    if found.vocab_size > size:
        raise InputError(
            f"tokenizer must have ids below the model's vocab_size={size}. "
            f"Got {found.vocab_size - 1} in {str(path)!r}."
        )
    tokenizer, end = Tokenizer.from_file(str(found.path)), found.end_of_document
    unknown = (~drawable(found, size)).nonzero().flatten().tolist()
    return fast(tokenizer, None if end is None else tokenizer.id_to_token(end)), unknown


def fast(tokenizer: Tokenizer, end: str | None) -> PreTrainedTokenizerFast:
    """As transformers takes it; the model has no use for token_type_ids."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **({} if end is None else {"eos_token": end, "pad_token": end}),
    )


def byte_tokenizer() -> Tokenizer:
    """Bytes as tokens, each its own id: any text comes back as it was."""
    # In a tokenizer.json a byte is a character: itself where that is printable and no space, else
    # the next one from 256 on, in the order of the bytes. So GPT-2 began it.
    themselves = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    names = [chr(byte if byte in themselves else next(others)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
