"""The vLLM engine's settings, for labelling and for serving alike.

The same code runs on a GPU: there `cpu_kvcache_gib` and `threads` mean nothing to vLLM.
"""

from llkd_ray.config import EngineSection


def engine_arguments(engine: EngineSection) -> dict[str, object]:
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
        "GOMP_SPINCOUNT": "2000",
        "KMP_BLOCKTIME": "1",
    }


def sampling_arguments(token_ids: list[int]) -> dict[str, object]:
    """Return the decoding settings that read the labels' log-probabilities in one forward pass.

    The values are over the full vocabulary, before any mask.
    """
    return {
        "max_tokens": 1,
        "temperature": 0.0,
        "logprob_token_ids": token_ids,
        "detokenize": False,
    }
