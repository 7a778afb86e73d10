"""What our models share as transformers' models: configuration, initialisation, embeddings."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from dilated_factory.configs.models import LongNetConfig, StackConfig
from dilated_factory.models.encoder import LongNetEncoder
from dilated_factory.models.head_loss import IGNORED, head_loss
from dilated_factory.models.longnet import LongNetLM


class LongNetPreTrainedConfig(PreTrainedConfig):
    """Configuration of `LongNetForCausalLM`: the fields of a `LongNetConfig` under ``longnet``.

    With ``loss_in_chunks``, in training, a model that is given labels returns no logits: its loss
    is made from a few of them at a time, so a large vocabulary costs no memory.
    """

    model_type = "dilated_longnet"
    shape: ClassVar[type[StackConfig]] = LongNetConfig

    def __init__(
        self, longnet: dict[str, Any] | None = None, *, loss_in_chunks: bool = False, **options: Any
    ) -> None:
        config = self.shape.model_validate(longnet or {})
        self.longnet = config.model_dump(mode="json")
        self.loss_in_chunks = loss_in_chunks
        if isinstance(config, LongNetConfig):
            options["tie_word_embeddings"] = config.tie_embeddings
        # Names by which transformers asks every configuration.
        self.vocab_size, self.hidden_size = self.longnet["vocab_size"], config.embed_dim
        self.num_hidden_layers, self.num_attention_heads = config.num_layers, config.num_heads
        options.pop("vocab_size", None)
        options.setdefault("initializer_range", config.embed_dim**-0.5)
        super().__init__(**options)


class LongNetPreTrainedModel(PreTrainedModel):
    """The base of `LongNetForCausalLM`, `LongNetModel` and what is built on that."""

    config_class = LongNetPreTrainedConfig
    base_model_prefix = "longnet"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer then gives num_items_in_batch

    @property
    def stack(self) -> LongNetLM | LongNetEncoder:
        """The model of this project."""
        raise NotImplementedError

    def finish(self) -> None:
        """Let transformers do what it does when a model is made, but for drawing our weights."""
        stack = self.stack
        # They are drawn already, as their papers say; on meta they wait for `_init_weights`.
        stack._is_hf_initialized = not next(stack.parameters()).is_meta  # type: ignore[assignment] # a flag of transformers'
        self.post_init()  # type: ignore[no-untyped-call] # it has no types

    def _init_weights(self, module: nn.Module) -> None:
        stack = self.stack
        if not any(module is part for part in stack.modules()):
            super()._init_weights(module)  # type: ignore[no-untyped-call] # it has no types
        elif not stack._is_hf_initialized:
            # Once for all parts; transformers spares the tensors that were loaded.
            stack.reset_parameters()
            stack._is_hf_initialized = True  # type: ignore[assignment] # as above

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether backward computes each layer again; transformers and its Trainer set it."""
        return self.stack.activation_checkpointing is True

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.stack.activation_checkpointing = value

    def get_input_embeddings(self) -> Any:
        """The embedding of tokens; None where embeddings are the input."""
        return self.stack.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Take another embedding of tokens."""
        self.stack.embedding = value  # type: ignore[assignment] # adapters wrap it

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> nn.Embedding:
        """As transformers': a vocabulary of another size, in the configurations too."""
        if self.stack.embedding is None:
            raise ValueError("resize_token_embeddings must have a vocabulary to change. Got none.")
        embedding = super().resize_token_embeddings(*arguments, **options)
        size = embedding.num_embeddings
        self.stack.config = self.stack.config.model_copy(update={"vocab_size": size})
        self.config.longnet = {**self.config.longnet, "vocab_size": size}
        return embedding

    def refuse(self, unserved: dict[str, Any]) -> None:
        """Raise a TypeError for arguments that others' models take, unless they ask for nothing."""
        for name, value in unserved.items():
            if value is not None and value is not False:
                raise TypeError(
                    f"{name} must be None for {type(self).__name__}, which does not serve it. "
                    f"Got {type(value).__name__}."
                )


def token_loss(
    hidden: Tensor,
    head: nn.Module | None,
    logits: Tensor | None,
    targets: Tensor,
    num_items_in_batch: int | Tensor | None,
) -> Tensor:
    """Cross-entropy in nats of predicting targets (B, N), from logits or, chunk by chunk, states.

    Its mean, or its sum divided by ``num_items_in_batch``.
    """
    if logits is None and type(head) is not nn.Linear:
        assert head is not None  # an adapter is in it, which its weight knows nothing of
        logits = head(hidden)
    if logits is None:
        assert isinstance(head, nn.Linear)
        total = head_loss(hidden.flatten(0, 1), head.weight, targets.flatten())
    else:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = nn.functional.cross_entropy(
            wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
    return total / (
        (targets != IGNORED).sum().clamp(min=1) if num_items_in_batch is None
        else torch.as_tensor(num_items_in_batch, device=total.device)
    )  # fmt: skip
