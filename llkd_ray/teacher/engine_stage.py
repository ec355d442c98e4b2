"""The engine stage of `ray.data.llm`, with one figure more per row.

Imported in a teacher actor and where a labelling run is put together, nowhere else.
"""

from dataclasses import dataclass
from typing import Any

from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF


@dataclass
class CachedTokens:
    """What replaces vLLM's per-request timings, which a labelling run has no use for."""

    num_cached_tokens: int


class CountingEngine(vLLMEngineStageUDF):
    """Report how many prompt tokens of each row came from the prefix cache.

    vLLM says it with each answer, but ray.data.llm (2.60) drops it: its output has a `metrics`
    dictionary and no such key. When it has one, this class can go.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        generate = self.llm._generate_async

        async def generate_and_count(request: Any) -> Any:
            output = await generate(request)
            output.metrics = CachedTokens(output.num_cached_tokens or 0)
            return output

        self.llm._generate_async = generate_and_count  # type: ignore[method-assign]
