"""The two classifiers that transformers has no name for: mean pooling, and static vectors.

They are called, saved and loaded like its own. Importing this module registers them with its Auto
classes, so that no folder needs remote code.

Shape legend: B rows, L tokens of a batch, D dimensions of a vector, C classes.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed.
    """Any encoder's configuration, and the head's dropout."""

    model_type = "llkd_ray_mean_pooled"
    sub_configs = {"encoder": AutoConfig}  # noqa: RUF012  Read by transformers as it stands.
    has_no_defaults_at_init = True

    head_dropout: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        """Make the encoder's configuration of what config.json says of it."""
        encoder = dict(kwargs.pop("encoder"))
        self.encoder = AutoConfig.for_model(encoder.pop("model_type"), **encoder)
        super().__post_init__(**kwargs)


class MeanPooledClassifier(PreTrainedModel):  # type: ignore[misc]
    """The mean of an encoder's last layer over a text's tokens, and a linear head."""

    config_class = MeanPooledConfig
    config: Any

    def __init__(self, config: Any, encoder: Any = None) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder) if encoder is None else encoder
        if hasattr(self.encoder, "pooler"):
            self.encoder.pooler = None  # Weights that nothing would train.
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.encoder.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any
    ) -> SequenceClassifierOutput:
        """Return logits [B, C] of tokens [B, L]; what else a tokenizer says is not read."""
        encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        hidden = encoded.last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(mean)))


class StaticConfig(PreTrainedConfig):  # type: ignore[misc]
    """The sizes of a static student."""

    model_type = "llkd_ray_static"

    vocab_size: int = 1
    dimensions: int = 256
    head_units: int = 256
    head_dropout: float = 0.1


class StaticClassifier(PreTrainedModel):  # type: ignore[misc]
    """A vector for each token, the direction of their sum, and a small head."""

    config_class = StaticConfig
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding = nn.EmbeddingBag(config.vocab_size, config.dimensions, mode="sum")
        width, hidden = config.dimensions, []
        if config.head_units:
            hidden, width = [nn.Linear(width, config.head_units), nn.ReLU()], config.head_units
        self.head = nn.Sequential(
            *hidden, nn.Dropout(config.head_dropout), nn.Linear(width, config.num_labels)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave torch's own first weights: BERT's are too small for inputs of length 1."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any
    ) -> SequenceClassifierOutput:
        """Return logits [B, C] of tokens [B, L]; what else a tokenizer says is not read."""
        weights = attention_mask.to(self.embedding.weight.dtype)
        bag = self.embedding(input_ids, per_sample_weights=weights)
        return SequenceClassifierOutput(logits=self.head(nn.functional.normalize(bag, dim=-1)))


OURS = (StaticConfig.model_type, MeanPooledConfig.model_type)
"""Values of `model_type` in config.json that transformers knows only from here."""

for _config, _model in (
    (MeanPooledConfig, MeanPooledClassifier),
    (StaticConfig, StaticClassifier),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForSequenceClassification.register(_config, _model)
