"""The protocols that an endpoint may speak, from the client's side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llkd_ray.config import ProtocolName


@dataclass(frozen=True)
class Protocol:
    """How texts are asked about, and where the answer has their labels."""

    path: str
    body: Callable[[Sequence[str]], dict[str, Any]]
    labels: Callable[[Any], list[Any]]
    """Takes the parsed answer; raises KeyError, TypeError or ValueError where it is another."""


PROTOCOLS: Mapping[ProtocolName, Protocol] = {
    "llkd": Protocol(
        "/v1/classify",
        lambda texts: {"texts": texts},
        lambda answer: [item["label"] for item in answer["predictions"]],
    ),
    # Source: vllm/entrypoints/pooling/classify/protocol.py of vLLM 0.32.
    "vllm": Protocol(
        "/classify",
        lambda texts: {"input": texts},
        lambda answer: [
            item["label"] for item in sorted(answer["data"], key=lambda item: item["index"])
        ],
    ),
    # A flat list of two texts would be one pair there, so each text is a list of its own.
    "tei": Protocol(
        "/predict",
        lambda texts: {"inputs": [[text] for text in texts]},
        lambda answer: [max(row, key=lambda item: item["score"])["label"] for row in answer],
    ),
}
