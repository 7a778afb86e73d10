"""`LongNetEncoder` as transformers' models: states, masked tokens, classes."""

# Shapes: B batch, N length, E embed_dim, V vocab_size, L labels.

from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from dilated_factory.configs.models import LongNetEncoderConfig
from dilated_factory.interop.transformers_base import (
    LongNetPreTrainedConfig,
    LongNetPreTrainedModel,
    token_loss,
)
from dilated_factory.models.encoder import LongNetEncoder
from dilated_factory.models.longnet import LeftAligned

Pooling = Literal["mean", "token"]
OutputT = TypeVar("OutputT", MaskedLMOutput, SequenceClassifierOutput, TokenClassifierOutput)


class LongNetEncoderPreTrainedConfig(LongNetPreTrainedConfig):
    """Configuration of `LongNetModel` and of what is built on it.

    The fields of a `LongNetEncoderConfig` are under ``longnet``, without a head. ``pooling`` says
    what a sequence's embedding is: the "mean" of its real tokens' states, or that of its first
    real "token". A `LongNetForMaskedLM` ties its head to the embedding by ``tie_word_embeddings``.
    """

    model_type = "dilated_longnet_encoder"
    shape = LongNetEncoderConfig

    def __init__(
        self, longnet: dict[str, Any] | None = None, *, pooling: Pooling = "mean", **options: Any
    ) -> None:
        if pooling not in ("mean", "token"):
            raise ValueError(f"pooling must be 'mean' or 'token'. Got {pooling!r}.")
        if (longnet or {}).get("head"):
            raise ValueError("longnet.head must be False: the models have their own. Got True.")
        self.pooling = pooling
        options.setdefault("tie_word_embeddings", True)
        super().__init__(longnet, **options)


class LongNetModel(LongNetPreTrainedModel):
    """`LongNetEncoder` as one of transformers' models; the encoder itself is in ``.encoder``.

    With padding on either side each row gives what it gives alone: positions and segments count
    from its first real token.
    """

    config_class = LongNetEncoderPreTrainedConfig

    def __init__(self, config: LongNetEncoderPreTrainedConfig) -> None:
        super().__init__(config)
        self.encoder = LongNetEncoder(LongNetEncoderConfig.model_validate(config.longnet))
        self.finish()

    @property
    def stack(self) -> LongNetEncoder:
        """The `LongNetEncoder`."""
        return self.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unserved: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """States (B, N, E) after the last norm, and the embedding (B, E) of each sequence.

        Args:
            input_ids: (B, N) int64, where there is a vocabulary.
            attention_mask: (B, N), 0 = ignore. States of what it hides mean nothing.
            inputs_embeds: (B, N, E), where there is no vocabulary.
            output_hidden_states: also return what enters the first layer and what leaves each, the
                last after the last norm.
            return_dict: False returns a tuple.
            **unserved: what other models take, such as ``token_type_ids``; None or False.

        Raises:
            TypeError: something unserved is asked for.
            ValueError: not the one input that there can be is given, or a mask of another shape.
        """
        self.refuse(unserved)
        names = ("input_ids", "inputs_embeds")
        taken, other = names if self.encoder.embedding is not None else names[::-1]
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        inputs = given[taken]
        if inputs is None or given[other] is not None:
            raise ValueError(f"{taken} must be given to this model, and {other} must not.")
        if attention_mask is not None and attention_mask.shape != inputs.shape[:2]:
            raise ValueError(
                f"attention_mask must have shape {tuple(inputs.shape[:2])}. "
                f"Got {tuple(attention_mask.shape)}."
            )
        real = None if attention_mask is None else attention_mask.to(torch.bool)
        states = self._states(inputs, real, every=bool(output_hidden_states))
        output = BaseModelOutputWithPooling(
            last_hidden_state=states[-1], pooler_output=self._pool(states[-1], real)
        )
        if output_hidden_states:
            output.hidden_states = tuple(states)
        return output.to_tuple() if return_dict is False else output

    def _states(self, inputs: Tensor, real: Tensor | None, *, every: bool) -> list[Tensor]:
        if real is None:
            return self._encode(inputs, None, every=every)
        rows = LeftAligned(~real)
        inputs = inputs.gather(
            1, rows.index.view(*rows.index.shape, *[1] * (inputs.ndim - 2)).expand(inputs.shape)
        )
        columns = torch.arange(inputs.shape[1], device=inputs.device)
        hidden = columns >= rows.lengths[:, None]
        if rows.between is not None:
            hidden = hidden | rows.between
        if not self.encoder.config.count_padding:
            return [rows.back(state) for state in self._encode(inputs, hidden, every=every)]
        # Slots without a row count by the length of the whole, so each row has to come alone.
        parts = [
            self._encode(row[None, :length], mask[None, :length], every=every)
            for row, mask, length in zip(inputs, hidden, rows.lengths.tolist(), strict=True)
        ]
        missing = [inputs.shape[1] - part[0].shape[1] for part in parts]
        return [
            rows.back(
                torch.cat([F.pad(s, (0, 0, 0, n)) for s, n in zip(layer, missing, strict=True)])
            )
            for layer in zip(*parts, strict=True)
        ]

    def _encode(self, inputs: Tensor, hidden: Tensor | None, *, every: bool) -> list[Tensor]:
        if not every:
            return [self.encoder.hidden_states(inputs, key_padding_mask=hidden)]
        states = self.encoder.layer_states(inputs, key_padding_mask=hidden)
        return [*states[:-1], self.encoder.norm(states[-1])]

    def _pool(self, states: Tensor, real: Tensor | None) -> Tensor:
        if real is None:
            return states.mean(1) if self.config.pooling == "mean" else states[:, 0]
        if self.config.pooling == "mean":
            total = states.masked_fill(~real.unsqueeze(-1), 0).sum(1)
            return total / real.sum(1, keepdim=True).clamp(min=1)
        return states[torch.arange(len(states), device=states.device), real.int().argmax(1)]


class LongNetHeadedModel(LongNetPreTrainedModel):
    """A `LongNetModel` and what is put on it."""

    config_class = LongNetEncoderPreTrainedConfig
    longnet: LongNetModel

    @property
    def stack(self) -> LongNetEncoder:
        """The `LongNetEncoder`."""
        return self.longnet.encoder


class LongNetForMaskedLM(LongNetHeadedModel):
    """`LongNetModel` that predicts tokens which are masked in its input."""

    _tied_weights_keys = {"head.weight": "longnet.encoder.embedding.weight"}  # noqa: RUF012 # theirs

    def __init__(self, config: LongNetEncoderPreTrainedConfig) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("longnet.vocab_size must be given for LongNetForMaskedLM. Got None.")
        self.longnet = LongNetModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.finish()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take another head."""
        self.head = new_embeddings  # type: ignore[assignment] # adapters wrap it

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **unserved: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits (B, N, V), and with labels the mean loss in nats of the tokens that are there.

        Args:
            input_ids: (B, N) int64.
            attention_mask: (B, N), 0 = ignore.
            labels: (B, N) int64; -100 leaves a token out.
            output_hidden_states: as in `LongNetModel`.
            return_dict: False returns a tuple.
            num_items_in_batch: as in `LongNetForCausalLM`.
            **unserved: None or False.
        """
        base = self.longnet(input_ids, attention_mask, None, output_hidden_states, **unserved)
        logits = loss = None
        if labels is None or not (self.training and self.config.loss_in_chunks):
            logits = self.head(base.last_hidden_state)
        if labels is not None:
            loss = token_loss(base.last_hidden_state, self.head, logits, labels, num_items_in_batch)
        return _finished(MaskedLMOutput(loss=loss, logits=logits), base, return_dict)


class LongNetClassifier(LongNetHeadedModel):
    """A `LongNetModel` and a linear layer with an output for each label."""

    def __init__(self, config: LongNetEncoderPreTrainedConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None  # transformers says 2 where nothing is said
        self.longnet = LongNetModel(config)
        self.dropout = nn.Dropout(config.longnet["dropout"])
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.finish()


class LongNetForSequenceClassification(LongNetClassifier):
    """`LongNetModel` with a linear layer on the embedding of a sequence."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **unserved: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits (B, L), and with labels the mean loss.

        Args:
            input_ids: as in `LongNetModel`.
            attention_mask: as in `LongNetModel`.
            inputs_embeds: as in `LongNetModel`.
            labels: (B,) int64 classes; (B, L) of a floating dtype for labels that do not exclude
                each other; (B,) or (B, L) numbers for a regression, as ``config.problem_type`` says
                or, where it says nothing, L and their dtype, as in transformers.
            output_hidden_states: as in `LongNetModel`.
            return_dict: False returns a tuple.
            num_items_in_batch: what the sum of losses is divided by, instead of the labels' number.
            **unserved: None or False.
        """
        base = self.longnet(
            input_ids, attention_mask, inputs_embeds, output_hidden_states, **unserved
        )
        logits = self.classifier(self.dropout(base.pooler_output))
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        return _finished(SequenceClassifierOutput(loss=loss, logits=logits), base, return_dict)

    def _loss(self, logits: Tensor, labels: Tensor, count: int | Tensor | None) -> Tensor:
        problem = self.config.problem_type
        if problem is None:
            whole = not labels.is_floating_point()
            problem = "single_label_classification" if whole else "multi_label_classification"
            problem = "regression" if self.config.num_labels == 1 else problem
        if problem == "single_label_classification":
            return token_loss(logits, None, logits[:, None], labels.view(-1, 1), count)
        one = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
        total = one(logits, labels.to(logits.dtype).view(logits.shape), reduction="sum")
        return total / (logits.numel() if count is None else count)


class LongNetForTokenClassification(LongNetClassifier):
    """`LongNetModel` with a linear layer on the state of each token."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **unserved: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits (B, N, L), and with labels (B, N) int64, -100 = left out, the mean loss.

        All else is as in `LongNetForSequenceClassification`.
        """
        base = self.longnet(
            input_ids, attention_mask, inputs_embeds, output_hidden_states, **unserved
        )
        logits = self.classifier(self.dropout(base.last_hidden_state))
        loss = None
        if labels is not None:
            loss = token_loss(base.last_hidden_state, None, logits, labels, num_items_in_batch)
        return _finished(TokenClassifierOutput(loss=loss, logits=logits), base, return_dict)


def _finished(output: OutputT, base: Any, return_dict: bool | None) -> OutputT | tuple[Any, ...]:
    if base.hidden_states is not None:
        output.hidden_states = base.hidden_states
    return output.to_tuple() if return_dict is False else output
