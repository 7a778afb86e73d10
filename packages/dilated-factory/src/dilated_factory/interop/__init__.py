"""Checkpoints and models of other projects: torchscale, GigaPath, Hugging Face."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from dilated_factory.errors import missing_package
from dilated_factory.interop.replacing import Replaced, ReplacedModule, replace_attention
from dilated_factory.interop.visible import Visible

__all__ = ["Replaced", "ReplacedModule", "register_with_transformers", "replace_attention"]

if TYPE_CHECKING:
    from dilated_factory.models.longnet import LongNetLM


def register_with_transformers(
    pattern: Visible,
    name: str = "dilated",
    *,
    group: ProcessGroup | DeviceMesh | None = None,
) -> None:
    """Make dilated attention available to transformers' models as ``attn_implementation=name``.

    Then ``AutoModelForCausalLM.from_pretrained(..., attn_implementation=name)``, or
    ``model.set_attn_implementation(name)`` later, trains and generates with the pattern: any model
    that takes its attention from transformers' AttentionInterface, causal or not, with padding on
    either side. A row padded on the left gives what it gives alone. Generation uses transformers'
    DynamicCache, which keeps all keys. A model without a dense branch in its pattern is not the
    model that its weights were trained for: fine-tune it.

    Each pattern needs a name of its own; registering the same again changes nothing.

    Args:
        pattern: which keys a query sees: a DilatedPattern, or a BlockLayout (dilated-sparse), which
            is taken at the lengths of each call, also while generating.
        name: what the implementation is called.
        group: the ranks that share each sequence, each with a contiguous part, as in
            `ring_attention`; `shard_for_transformers` makes what a model takes on each. There is no
            cache then, and no padding on the left. Without a group each rank has whole sequences.

    Raises:
        TypeError: ``pattern`` is neither.
        ValueError: the name is taken, or a BlockLayout comes with a group. Later, from the model:
            it asks for what dilated attention does not serve, which the message names (sliding
            windows, chunks, packed sequences, caches of fixed size, biases and sinks, attention
            weights).
        MissingPackageError: transformers is not installed, or dilated-ring with a group.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> register_with_transformers(DilatedPattern([64, 256], [1, 4]), "far")
        >>> # and then, with a model: model.set_attn_implementation("far")
    """
    if group is not None and find_spec("dilated_ring") is None:
        raise missing_package("register_with_transformers(group=...)", "dilated-ring")
    if find_spec("transformers") is None:
        raise missing_package("register_with_transformers", "transformers")
    # Only now: it takes seconds to import.
    from dilated_factory.interop.transformers import register

    register(pattern, name, group)


def export_to_transformers(
    model: "LongNetLM",
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    remote_code: bool = False,
) -> None:
    """Write a model as a folder that transformers loads: weights, configurations, tokenizer.

    After one call of `dilated_factory.interop.transformers.register_longnet`, AutoConfig,
    AutoModelForCausalLM and AutoTokenizer load it. The folder is complete or absent.

    Args:
        model: a language model with the attention of its configuration, in any dtype.
        folder: a new folder, or an empty one, in one that exists.
        tokenizer: its tokenizer.json; None is one of bytes, for a vocabulary of 256. The
            "eos_token" of a tokenizer_config.json beside it ends documents, or else a special
            token of a usual name, and pads.
        remote_code: also write a file of code by which ``trust_remote_code=True`` loads the folder
            without that call; it imports this package, which must be installed there too.

    Raises:
        InputError: (a ValueError) the folder is not empty or has no parent, the model has another
            attention, or the tokenizer is none or has tokens that the model does not know.
        MissingPackageError: transformers is not installed.

    Examples:
        >>> shape = LongNetConfig(embed_dim=16, num_heads=2, num_layers=1, context=32)
        >>> export_to_transformers(LongNetLM(shape), "exported")
        >>> from pathlib import Path
        >>> Path("exported/config.json").is_file()
        True
    """
    if find_spec("transformers") is None:
        raise missing_package("export_to_transformers", "transformers")
    from dilated_factory.interop.transformers_export import export

    export(
        model, Path(folder), None if tokenizer is None else Path(tokenizer), remote_code=remote_code
    )
