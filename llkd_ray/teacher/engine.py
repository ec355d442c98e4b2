"""The vLLM engine that reads labels, for labelling and for serving alike.

The same code runs on a GPU: there `cpu_kvcache_gib` and `threads` mean nothing to vLLM.
"""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llkd_ray.cluster import BRIEF_SPIN, end_children_with_actor
from llkd_ray.config import EngineSection, Example, TaskSection, VLLMTeacher
from llkd_ray.teacher.answers import Answer, Continuation, TeacherDiedError
from llkd_ray.teacher.prompt import Encoded, Prompt


class Engine:
    """A vLLM engine with the prompt and the read-out of one task.

    vLLM itself batches what is asked at the same time, so callers keep several calls open.
    """

    way: str | None = None
    """The settings say how labels are read."""

    def __init__(
        self,
        task: TaskSection,
        teacher: VLLMTeacher,
        pool: Sequence[Example],
        model: Path,
        *,
        export_metrics: bool = False,
    ) -> None:
        """Start the engine, child processes of this one; takes half a minute on a CPU.

        Args:
            task: Labels, examples and wording.
            teacher: Engine and prompt settings.
            pool: Gold examples that the prompt may show.
            model: Folder of the weights.
            export_metrics: Export vLLM's own metrics through Ray, where Prometheus finds them.
        """
        # Imported in the process that runs the engine alone: vLLM reads its environment when it is
        # imported, and takes long.
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        self._watch = end_children_with_actor()
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=str(model), **engine_arguments(teacher.engine)),
            stat_loggers=[RayPrometheusStatLogger] if export_metrics else None,
        )
        self._prompt = Prompt.of(self._engine.get_tokenizer(), task, teacher, pool)
        self._branches = [
            (
                list(branch.path),
                SamplingParams(
                    **sampling_arguments(list(branch.tokens)),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    skip_clone=True,  # Nobody changes them, so no row needs a deep copy.
                ),
            )
            for branch in self._prompt.readout.branches
        ]
        self._numbers = itertools.count()
        self._warm = False
        self._warming = asyncio.Lock()

    async def read(self, texts: Sequence[str]) -> list[Answer]:
        """Return an answer for each text; see `Teacher.read`."""
        encoded = await asyncio.to_thread(self._prompt.encode, texts)
        async with self._warming:
            # What is asked before the shared prefix is in the cache computes it for itself.
            if not self._warm:
                await self._read_one(encoded[0])
                self._warm = True
        return list(await asyncio.gather(*map(self._read_one, encoded)))

    async def write(
        self, prompt: str, *, json_schema: Mapping[str, Any] | None = None, **sampling: Any
    ) -> Continuation:
        """Go on from a prompt, or answer it; see `Author.write`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        ids = self._prompt.to_write(prompt)
        held = StructuredOutputsParams(json=dict(json_schema)) if json_schema else None
        parameters = SamplingParams(
            **sampling, structured_outputs=held, output_kind=RequestOutputKind.FINAL_ONLY
        )
        try:
            output = await self._generate(ids, [], parameters)
        except EngineDeadError as error:
            raise TeacherDiedError("vLLM's engine process has died") from error
        except (ValueError, EngineGenerateError) as error:
            return Continuation("", False, 0, len(ids), 0, f"{type(error).__name__}: {error}")
        written = output.outputs[0]
        return Continuation(
            text=written.text,
            finished=written.finish_reason == "stop",
            tokens=len(written.token_ids),
            prompt_tokens=len(ids),
            cached_tokens=output.num_cached_tokens or 0,
        )

    def check_health(self) -> None:
        """Raise if the engine's process has died."""
        if self._engine.errored:
            raise self._engine.dead_error

    async def close(self) -> None:
        """End the engine's processes."""
        self._engine.shutdown()

    async def _read_one(self, encoded: Encoded) -> Answer:
        if encoded.error is not None:
            return Answer(None, len(encoded.ids), 0, encoded.cut_tokens, encoded.error)
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            # The first pass leaves the row's own text in the cache for the others.
            outputs = [await self._generate(encoded.ids, *self._branches[0])]
            outputs += await asyncio.gather(
                *(self._generate(encoded.ids, *branch) for branch in self._branches[1:])
            )
        except EngineDeadError as error:
            raise TeacherDiedError("vLLM's engine process has died") from error
        except (ValueError, EngineGenerateError) as error:
            # What vLLM refuses about one text concerns its row alone.
            reason = f"{type(error).__name__}: {error}"
            return Answer(None, len(encoded.ids), 0, encoded.cut_tokens, reason)
        reads = [_logprobs(output) for output in outputs]
        return Answer(
            logprobs=self._prompt.readout.logprobs(reads),
            prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
            cached_tokens=sum(output.num_cached_tokens or 0 for output in outputs),
            cut_tokens=encoded.cut_tokens,
        )

    async def _generate(self, ids: list[int], path: list[int], sampling: Any) -> Any:
        *_, last = [
            output
            async for output in self._engine.generate(
                {"prompt_token_ids": ids + path}, sampling, f"{next(self._numbers)}"
            )
        ]
        return last


def _logprobs(output: Any) -> Mapping[int, float]:
    """Return the log-probabilities that an output holds, by token."""
    read = output.outputs[0].logprobs[0]
    return {token: value.logprob for token, value in read.items()}


def engine_arguments(engine: EngineSection) -> dict[str, Any]:
    """Return the keyword arguments of vLLM's engine."""
    arguments = engine.model_dump(exclude={"cpu_kvcache_gib"}, exclude_none=True)
    return {**arguments, "enable_prefix_caching": True, "trust_remote_code": False}


def engine_environment(engine: EngineSection, threads: int) -> dict[str, str]:
    """Return the environment variables that an engine's process reads at its start."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(engine.cpu_kvcache_gib),
        # vLLM's own binding reserves a core, and two engines on a node would bind the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The engine's process computes by itself. With a worker process beside it, it would spend a
        # third of a core on asking whether that has finished.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # FlashInfer's sampler is compiled at the start, by an nvcc that few machines have, and
        # read-outs sample nothing.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        **BRIEF_SPIN,
        "KMP_BLOCKTIME": "1",
    }


def sampling_arguments(token_ids: list[int]) -> dict[str, Any]:
    """Return the decoding settings that read tokens' log-probabilities in one forward pass.

    The values are over the full vocabulary, before any mask.
    """
    return {
        "max_tokens": 1,
        "temperature": 0.0,
        "logprob_token_ids": token_ids,
        "detokenize": False,
    }
