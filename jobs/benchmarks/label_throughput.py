"""Is labelling as fast as vLLM itself, and how far is it from what the processor can do?

Four rates over the same questions on this machine, none while another runs:

- the labelling stage, from its first answered batch to its last;
- `vllm.LLM.generate` with the same engine arguments on the same prompts, all handed over at once as
  text, in the processes that it starts by itself. It runs before and after each run of the stage,
  so that a drift of the machine meets both; once more for the prompts as token ids, where the stage
  has the tokenizing to do and bare vLLM has not;
- the same engine with the block size that vLLM takes on this machine by itself and with the row's
  text first in the prompt, as most people write one;
- a matrix product, which bounds what any engine could do: FLOPs of the uncached tokens over the
  rate of `torch.matmul`.

The prompt shows three examples of each of the six labels, and its shared part fills whole cache
blocks by its own words, so that its text and its token ids are the same to vLLM.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import figures
from companion import Companion, answer

from llkd_ray.config import Experiment, VLLMTeacher, load_experiment
from llkd_ray.errors import LLKDError

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.toml"
# Makes the part that all prompts share a whole number of cache blocks, without filler.
_LAST_WORDS = " Read it with care and give the best label."


def experiment_in(folder: str, rows: int) -> Experiment:
    """Return the quickstart with three examples of each label and a number of rows to label."""
    instruction = load_experiment(QUICKSTART).task.instruction + _LAST_WORDS
    return load_experiment(
        QUICKSTART,
        [
            f"runs={folder}",
            f"task.instruction={json.dumps(instruction)}",
            'teacher.splits=["unlabeled"]',
            f"teacher.max_unlabeled_rows={rows}",
            "teacher.shots.kind=balanced",
            "teacher.shots.per_label=3",
            "corpus.test_fraction=0.0",
            "corpus.validation_fraction=0.0",
        ],
    )


def measure(rows: int, default_rows: int, rounds: int) -> dict[str, Any]:
    """Measure all four and return the ratios."""
    from llkd_ray.cluster import ray_session
    from llkd_ray.corpus import prepare, read_shards
    from llkd_ray.teacher.actor import Opening

    with tempfile.TemporaryDirectory() as folder:
        experiment = experiment_in(folder, rows)
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        prepare(experiment.corpus, experiment.task, corpus)
        opening = Opening.of(experiment)
        prompt = opening.prompt()
        assert prompt is not None
        texts = _texts(read_shards(corpus / "unlabeled"), rows)
        prompts = [encoded.ids for encoded in prompt.encode(texts)]
        written = _written(opening, prompts)
        tokens = list(prompt.readout.branches[0].tokens)
        print(f"{len(texts)} rows, {len(prompts[0])} tokens in the first prompt", flush=True)
        stage_rates, bare_rates, tokenized_rates, stage_tokens = [], [], [], 0.0
        alone = bare(experiment, {"prompts": prompts, "texts": written, "tokens": tokens})
        try:
            for number in range(rounds):
                bare_rates.append(alone.ask("texts"))
                with ray_session(experiment.ray):
                    answered = _stage(Path(folder), number, corpus, opening)
                stage_rates.append(answered.rows_per_s)
                stage_tokens = answered.tokens_per_s / answered.rows_per_s
                hit_rate = answered.cached_tokens / answered.prompt_tokens
                bare_rates.append(alone.ask("texts"))
                tokenized_rates.append(alone.ask("prompts"))
                print(
                    f"round {number + 1}: stage {stage_rates[-1]:.1f} rows/s, bare vLLM before and "
                    f"after {bare_rates[-2]:.1f} and {bare_rates[-1]:.1f}, from token ids "
                    f"{tokenized_rates[-1]:.1f}",
                    flush=True,
                )
        finally:
            alone.close()
        default = default_layout_rate(experiment, texts[:default_rows], tokens)
        flops_per_s = matmul_flops_per_s(experiment)
    stage, plain, tokenized = map(_mean, (stage_rates, bare_rates, tokenized_rates))
    flops_per_row = model_flops_per_row(opening, stage_tokens, _mean(list(map(len, prompts))))
    print(
        figures.table(
            ["", "rows/s", "stage over it"],
            [
                ["labelling stage", stage, 1.0],
                ["vllm.LLM.generate, same engine and prompts", plain, stage / plain],
                ["the same from token ids", tokenized, stage / tokenized],
                ["default block size, text first", default, stage / default],
                ["matrix product of the same FLOPs", flops_per_s / flops_per_row, None],
            ],
        )
    )
    return {
        "stage_over_vllm": round(stage / plain, 3),
        "stage_over_vllm_from_ids": round(stage / tokenized, 3),
        "over_default_layout": round(stage / default, 2),
        "cache_hit_rate": round(hit_rate, 3),
        "over_flops_limit": round(stage * flops_per_row / flops_per_s, 3),
        "stage_rows_per_s": round(stage, 2),
        "bare_rows_per_s": round(plain, 2),
        "bare_from_ids_rows_per_s": round(tokenized, 2),
        "default_layout_rows_per_s": round(default, 2),
        "uncached_tokens_per_row": round(stage_tokens, 1),
        "matmul_gflops_per_s": round(flops_per_s / 1e9, 1),
        "rounds": rounds,
        "rows": rows,
    }


def _stage(folder: Path, number: int, corpus: Path, opening: Any) -> Any:
    from llkd_ray.teacher.ledger import Ledger
    from llkd_ray.teacher.readouts import read_out

    ledger = Ledger(folder / f"ledger-{number}", len(opening.task.labels))
    ledger.open({})
    readouts = folder / f"readouts-{number}"
    readouts.mkdir()
    return read_out(corpus, readouts, opening, ledger)


def _texts(shards: list[Path], rows: int) -> list[str]:
    import pyarrow.parquet as pq

    texts: list[str] = []
    for shard in shards:
        texts += pq.read_table(shard, columns=["text"]).column("text").to_pylist()
    return texts[:rows]


def _written(opening: Any, prompts: list[list[int]]) -> list[str]:
    """Return the prompts as text, after proof that vLLM will read the same tokens from it.

    Raises:
        LLKDError: It would not, so that two different things would be compared.
    """
    from transformers import AutoTokenizer

    from llkd_ray.teacher.pretrained import teacher_folder

    folder = teacher_folder(opening.teacher.model, opening.cache)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    written = [tokenizer.decode(ids) for ids in prompts]
    other = sum(
        tokenizer(text)["input_ids"] != ids for text, ids in zip(written, prompts, strict=True)
    )
    if other:
        raise LLKDError(
            f"{other} of {len(prompts)} prompts are other tokens when they are read as text: adapt "
            "_LAST_WORDS to the wording of the quickstart"
        )
    return written


def bare(experiment: Experiment, work: dict[str, Any], **engine: Any) -> Companion:
    """Start vLLM by itself; it answers with rows/s for the form in which it gets the prompts.

    Args:
        experiment: The teacher.
        work: Prompts as token ids (`prompts`), perhaps as text (`texts`), and label tokens.
        engine: Arguments in place of the experiment's; None for vLLM's own.
    """
    from llkd_ray.teacher.engine import engine_arguments, engine_environment
    from llkd_ray.teacher.pretrained import teacher_folder

    teacher = experiment.teacher
    assert isinstance(teacher, VLLMTeacher)
    arguments = {**engine_arguments(teacher.engine), **engine}
    work = {
        **work,
        "model": str(teacher_folder(teacher.model, experiment.cache)),
        "engine": {key: value for key, value in arguments.items() if value is not None},
    }
    environment = engine_environment(teacher.engine, teacher.actors.threads)
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return Companion([__file__, "--bare"], work, environment)


def open_bare(work: dict[str, Any]) -> Callable[[str], float]:
    """Get vLLM ready in the process behind `bare`."""
    from vllm import LLM, SamplingParams

    from llkd_ray.teacher.engine import sampling_arguments

    llm = LLM(model=work["model"], **work["engine"])
    sampling = SamplingParams(**sampling_arguments(work["tokens"]))
    forms: dict[str, Any] = {
        "prompts": [{"prompt_token_ids": ids} for ids in work["prompts"]],
        "texts": work.get("texts"),
    }
    llm.generate(forms["prompts"][:64], sampling, use_tqdm=False)

    def rate(form: str) -> float:
        """Return rows per second, with what the prompts share in the cache alone."""
        prompts = forms[form]
        llm.reset_prefix_cache()
        llm.generate(prompts[:1], sampling, use_tqdm=False)
        started = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return len(prompts) / (time.perf_counter() - started)

    return rate


def default_layout_rate(experiment: Experiment, texts: list[str], tokens: list[int]) -> float:
    """Return rows per second with the text first and vLLM's own block size."""
    from transformers import AutoTokenizer

    from llkd_ray.teacher.actor import pool_of
    from llkd_ray.teacher.pretrained import teacher_folder
    from llkd_ray.teacher.shots import choose_shots
    from llkd_ray.teacher.wording import Wording

    task = experiment.task
    folder = teacher_folder(experiment.teacher.model, experiment.cache)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    wording = Wording.in_words(task)
    shots = choose_shots(task, experiment.teacher.shots, pool_of(experiment))
    prefix = wording.prefix(shots.shared)
    prompts = [
        tokenizer(f"{task.text_prefix} {text}\n\n{prefix}{task.label_prefix}")["input_ids"]
        for text in texts
    ]
    alone = bare(experiment, {"prompts": prompts, "tokens": tokens}, block_size=None)
    try:
        return alone.ask("prompts")
    finally:
        alone.close()


def matmul_flops_per_s(experiment: Experiment) -> float:
    """Return the best rate of float32 matrix products of a transformer's shapes."""
    import torch

    assert isinstance(experiment.teacher, VLLMTeacher)
    torch.set_num_threads(experiment.teacher.actors.threads)
    best = 0.0
    for rows, inner, columns in ((1024, 576, 1536), (1024, 1536, 576), (2048, 2048, 2048)):
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        left @ right
        started, runs = time.perf_counter(), 0
        while time.perf_counter() - started < 2:
            left @ right
            runs += 1
        seconds = time.perf_counter() - started
        best = max(best, 2 * rows * inner * columns * runs / seconds)
    return best


def model_flops_per_row(opening: Any, uncached_tokens: float, prompt_tokens: float) -> float:
    """Count the multiplications and additions that a row needs in the teacher of an opening."""
    from transformers import AutoConfig

    from llkd_ray.teacher.pretrained import teacher_folder

    folder = teacher_folder(opening.teacher.model, opening.cache)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return flops_per_row(config, uncached_tokens, prompt_tokens)


def flops_per_row(config: Any, uncached_tokens: float, prompt_tokens: float) -> float:
    """Count the multiplications and additions that a row needs in a Llama of a configuration.

    Two for every weight of the layers and every uncached token; scores and values of attention,
    each over the whole prompt; the output layer for the last token alone.
    """
    hidden, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    attention = hidden * (2 * hidden + 2 * head * config.num_key_value_heads)
    weights = config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)
    scores = 2 * config.num_hidden_layers * hidden * prompt_tokens
    return float(uncached_tokens * 2 * (weights + scores) + 2 * hidden * config.vocab_size)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> int:
    parser = figures.parser_of(__doc__, "one round on fewer rows, within four minutes")
    parser.add_argument("--bare", action="store_true", help="internal: vLLM by itself")
    arguments = parser.parse_args()
    if arguments.bare:
        answer(open_bare)
        return 0
    rows, default_rows, rounds = (960, 24, 1) if arguments.quick else (1920, 256, 3)
    return figures.run(lambda: measure(rows, default_rows, rounds))


if __name__ == "__main__":
    sys.exit(main())
