"""Sentence embeddings: where a text lies among others, by an encoder that no one has fine-tuned.

Shape legend: N texts, D numbers in an embedding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llkd_ray.errors import TeacherError
from llkd_ray.teacher.pretrained import encoder_folder, no_tokenizer

_BATCH = 32
# Sentence encoders are trained on a few sentences; what comes after changes the mean little.
_MAX_TOKENS = 256

Floats = npt.NDArray[np.float32]


class Encoder:
    """Embeds texts, in float32 on the CPU."""

    def __init__(self, name: str, setting: str) -> None:
        """Load an encoder.

        Args:
            name: An embedded encoder by name, or a folder.
            setting: That names it, for the error.

        Raises:
            TeacherError: It is not there, or it has no tokenizer.
        """
        # Heavy, and few runs need them.
        import torch
        from tokenizers import Tokenizer
        from transformers import AutoModel, AutoTokenizer

        folder = encoder_folder(name, setting)
        loading: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **loading)
        except (OSError, ValueError) as error:
            raise TeacherError(no_tokenizer(f"{setting} = {folder}", error)) from None
        # A copy whose settings never change again, so that threads can share it.
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.enable_truncation(min(_MAX_TOKENS, tokenizer.model_max_length))
        self._tokenizer.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
        self._model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, **loading
        ).eval()

    def embed(self, texts: Sequence[str]) -> Floats:
        """Return the mean of each text's last hidden states, scaled to length 1 [N, D]."""
        embeddings = np.empty((len(texts), self._model.config.hidden_size), dtype=np.float32)
        # Texts of like length stand together, so that little is computed for padding.
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        for start in range(0, len(texts), _BATCH):
            of_batch = order[start : start + _BATCH]
            embeddings[of_batch] = self._means([texts[at] for at in of_batch])
        return embeddings

    def _means(self, texts: list[str]) -> Floats:
        import torch

        rows = self._tokenizer.encode_batch(texts)
        mask = torch.tensor([row.attention_mask for row in rows])
        with torch.inference_mode():
            states = self._model(
                input_ids=torch.tensor([row.ids for row in rows]), attention_mask=mask
            ).last_hidden_state
            means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            scaled: Floats = torch.nn.functional.normalize(means, dim=1).numpy()
        return scaled
