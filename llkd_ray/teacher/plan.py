"""What a labelling run would ask, and what it would take, before anything is paid for.

Only a tokenizer is needed. Lengths are measured on the first rows by row_id, which is a hash, so
they are a fair sample of the corpus.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from llkd_ray.config import ActorsSection, HTTPTeacher, ScriptedTeacher, VLLMTeacher
from llkd_ray.teacher.actor import Opening
from llkd_ray.teacher.readouts import Shard
from llkd_ray.teacher.readouts import plan as shards_of
from llkd_ray.words import words_of

_SAMPLE_ROWS = 1000
_SHOWN_PROMPTS = 3
_SHOWN_CHARS = 2400
_BINS = 10
_BAR = 40

# Without a tokenizer, English text takes about four tokens for three words.
_TOKENS_PER_WORD = 4 / 3
# What vLLM takes on a GPU where teacher.engine.block_size is not given.
_DEFAULT_BLOCK = 16


@dataclass(frozen=True)
class Measured:
    """What a teacher's actor was seen to do."""

    tokens_per_s: float
    """Uncached prompt tokens that one actor computes in a second."""
    where: str
    """What it was measured in, for people."""


@dataclass(frozen=True)
class Asked:
    """What would be asked about one row, over all of its forward passes."""

    length: int
    """Tokens of the prompt."""
    tokens: int
    """Tokens of all passes together."""
    cached: int
    """Of these, tokens that are expected from the prefix cache."""
    cut: bool
    """Its text is cut to fit."""


@dataclass(frozen=True)
class Sample:
    """The prompts of the first rows."""

    readout: str
    """How labels are read, and why so."""
    prompts: tuple[str, ...]
    """What the teacher would read for the very first rows."""
    shared: int
    """Tokens that begin every prompt."""
    passes: int
    """Forward passes of a row."""
    size: int
    """Rows that were looked at."""
    asked: tuple[Asked, ...]
    """Those of them that are not kept aside as too long."""

    @property
    def tokens_per_row(self) -> float:
        """Mean tokens of a row, over all passes."""
        return sum(row.tokens for row in self.asked) / max(self.size, 1)

    @property
    def cached_per_row(self) -> float:
        """Of these, tokens expected from the cache."""
        return sum(row.cached for row in self.asked) / max(self.size, 1)


@dataclass(frozen=True)
class Plan:
    """A labelling run, sampled and counted."""

    teacher: VLLMTeacher | HTTPTeacher | ScriptedTeacher
    sample: Sample
    rows: int
    """Rows that are up for labelling, in all splits."""
    done: int
    """Of these, rows that the teacher has been asked about already."""
    rate: Measured | None

    @property
    def left(self) -> int:
        """Rows that would be asked about now."""
        return self.rows - self.done

    @property
    def tokens(self) -> float:
        """Expected tokens of the rows left, over all passes."""
        return self.left * self.sample.tokens_per_row

    @property
    def cached_tokens(self) -> float:
        """Of these, tokens expected from the cache."""
        return self.left * self.sample.cached_per_row

    @property
    def actor_hours(self) -> float | None:
        """Expected hours of one actor for the rows left; None where no rate is known."""
        if self.rate is None:
            return None
        return (self.tokens - self.cached_tokens) / self.rate.tokens_per_s / 3600


def plan(corpus: Path, opening: Opening, done: int = 0, measured: Measured | None = None) -> Plan:
    """Sample the prompts of a labelling run and count what it would take.

    Args:
        corpus: The corpus artifact's folder.
        opening: The teacher.
        done: Rows that it has been asked about already.
        measured: What an actor was seen to do; `teacher.tokens_per_s` comes before it.

    Raises:
        TeacherError: The labels or the prompt do not suit the teacher's tokenizer.
    """
    teacher = opening.teacher
    unlabeled_first = tuple(sorted(teacher.splits, key=lambda split: split != "unlabeled"))
    shards = shards_of(corpus, Path(), unlabeled_first, teacher.max_unlabeled_rows)
    texts = _first_texts(shards)
    match teacher:
        case VLLMTeacher():
            sample = _sample_vllm(opening, teacher, texts)
            if teacher.tokens_per_s is not None:
                measured = Measured(teacher.tokens_per_s, "as teacher.tokens_per_s states")
        case HTTPTeacher():
            sample, measured = _sample_http(opening, teacher, texts), None
        case ScriptedTeacher():
            simulation = "a simulation: no model is asked, and the labels mean nothing"
            sample, measured = Sample(simulation, (), 0, 0, 0, ()), None
    return Plan(teacher, sample, sum(shard.take for shard in shards), done, measured)


def describe(plan: Plan) -> str:
    """Return a plan in words and bars, as lines."""
    lines = [
        f"teacher: {plan.teacher.kind}, {plan.teacher.model}",
        f"read-out: {plan.sample.readout}",
    ]
    for number, prompt in enumerate(plan.sample.prompts, start=1):
        lines += [f"--- prompt {number} of {len(plan.sample.prompts)}", _shortened(prompt)]
    if plan.sample.size:
        lines += ["---", *_describe_lengths(plan)]
    lines.append(
        f"rows to label: {plan.left:,} ({plan.rows:,}, less {plan.done:,} asked about already)"
    )
    match plan.teacher:
        case VLLMTeacher() as teacher:
            lines += _describe_vllm(plan, teacher)
        case HTTPTeacher() as teacher:
            lines += _describe_http(plan, teacher)
        case ScriptedTeacher(rows_per_s=rows_per_s, actors=actors) if rows_per_s:
            lines.append(_time(plan.left / rows_per_s / 3600, actors))
    return "\n".join(lines)


def _sample_vllm(opening: Opening, teacher: VLLMTeacher, texts: list[str]) -> Sample:
    prompt = opening.prompt()
    assert prompt is not None
    block = _block(teacher)
    paths = [len(branch.path) for branch in prompt.readout.branches]
    rows = []
    for encoded in prompt.encode(texts):
        if encoded.error is not None:
            continue
        length = len(encoded.ids)
        # The first pass finds what all rows share, the others find the row's own prompt as well.
        # The last token of a pass is always computed.
        found = [len(prompt.shared_ids), *[length] * (len(paths) - 1)]
        cached = sum(
            min(known, length + path - 1) // block * block
            for known, path in zip(found, paths, strict=True)
        )
        tokens = length * len(paths) + sum(paths)
        rows.append(Asked(length, tokens, cached, encoded.cut_tokens > 0))
    return Sample(
        readout=prompt.readout.why,
        prompts=tuple(prompt.render(text) for text in texts[:_SHOWN_PROMPTS]),
        shared=len(prompt.shared_ids),
        passes=len(paths),
        size=len(texts),
        asked=tuple(rows),
    )


def _sample_http(opening: Opening, teacher: HTTPTeacher, texts: list[str]) -> Sample:
    from llkd_ray.teacher.http import check_readout, fit
    from llkd_ray.teacher.shots import choose_shots
    from llkd_ray.teacher.wording import Wording

    check_readout(opening.task, teacher)
    lettered = teacher.readout == "letters"
    wording = (Wording.in_letters if lettered else Wording.in_words)(opening.task)
    shots = choose_shots(opening.task, teacher.shots, opening.pool)
    prompts, rows = [], []
    for text, own in zip(texts, shots.own(texts), strict=True):
        kept, cut, error = fit(text, teacher.prompt)
        prompt = wording.prefix((*shots.shared, *own)) + wording.question(kept)
        prompts.append(prompt)
        tokens = _tokens(prompt)
        if error is None:
            rows.append(Asked(tokens, tokens, 0, cut > 0))
    readout = (
        f"{teacher.readout}: the endpoint is tried first, to see how its answers can be read"
        if teacher.top_logprobs
        else f"votes: teacher.top_logprobs is 0, so {teacher.votes} answers are sampled for a row"
    )
    shared = _tokens(wording.prefix(shots.shared))
    shown = tuple(prompts[:_SHOWN_PROMPTS])
    return Sample(readout, shown, shared, 1, len(texts), tuple(rows))


def _block(teacher: VLLMTeacher) -> int:
    return teacher.engine.block_size or _DEFAULT_BLOCK


def _tokens(text: str) -> int:
    return round(len(words_of(text)) * _TOKENS_PER_WORD)


def _first_texts(shards: Sequence[Shard]) -> list[str]:
    """Return the texts of the first rows, as many as are sampled."""
    texts: list[str] = []
    for shard in shards:
        left = _SAMPLE_ROWS - len(texts)
        if left <= 0:
            break
        with pq.ParquetFile(shard.texts) as file:
            batch = next(file.iter_batches(left, columns=["text"]))
        texts += batch.slice(0, shard.take).column("text").to_pylist()
    return texts


def _describe_lengths(plan: Plan) -> list[str]:
    """Return the sample's token histogram and what becomes of long texts."""
    sample = plan.sample
    lengths = [row.length for row in sample.asked]
    mean = sum(lengths) / max(len(lengths), 1)
    counted = "" if isinstance(plan.teacher, VLLMTeacher) else ", taken for 4/3 of its words"
    return [
        f"tokens of a prompt{counted}, over {sample.size:,} rows: "
        f"mean {mean:,.0f}, longest {max(lengths, default=0):,}",
        *histogram(lengths),
        f"of these rows {sum(row.cut for row in sample.asked):,} are cut to fit and "
        f"{sample.size - len(lengths):,} kept aside",
    ]


def histogram(lengths: Sequence[int]) -> list[str]:
    """Draw a line for each of ten ranges of whole numbers, or fewer where they are few.

    Returns:
        Lines `FIRST - LAST BAR COUNT`; no line without lengths.
    """
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = (high - low) // _BINS + 1
    counts = Counter((length - low) // width for length in lengths)
    most = max(counts.values())
    return [
        f"  {low + at * width:>7,} - {low + at * width + width - 1:>7,} "
        f"{'#' * -(-_BAR * counts[at] // most):{_BAR}} {counts[at]:,}"
        for at in range((high - low) // width + 1)
    ]


def _describe_vllm(plan: Plan, teacher: VLLMTeacher) -> list[str]:
    block, sample, actors = _block(teacher), plan.sample, teacher.actors
    cached = plan.cached_tokens / plan.tokens if plan.tokens else 0.0
    lines = [
        f"shared by all prompts: {sample.shared:,} tokens, "
        f"{sample.shared // block * block:,} of them in whole blocks of {block}",
        f"forward passes of a row: {sample.passes:,}",
        f"tokens: about {plan.tokens:,.0f}; {cached:.1%} of them expected from the cache, "
        f"{plan.tokens - plan.cached_tokens:,.0f} to be computed",
    ]
    hours = plan.actor_hours
    if plan.rate is None or hours is None:
        unknown = (
            "time and cost: no rate is known yet; label 1,000 rows with "
            "teacher.max_unlabeled_rows=1000 to have it measured, or state teacher.tokens_per_s"
        )
        return [*lines, unknown]
    if actors.num_gpus:
        machine = f"{hours * actors.num_gpus * teacher.engine.tensor_parallel_size:,.3g} GPU-hours"
    else:
        machine = f"{hours * actors.num_cpus:,.3g} CPU-hours"
    return [
        *lines,
        f"rate: {plan.rate.tokens_per_s:,.0f} uncached tokens/s of one actor, {plan.rate.where}",
        f"cost: {hours:,.3g} actor-hours, {machine}, {_usd(hours * teacher.usd_per_actor_hour)}",
        _time(hours, actors),
    ]


def _describe_http(plan: Plan, teacher: HTTPTeacher) -> list[str]:
    said = plan.left * (1 if teacher.top_logprobs else teacher.votes)
    sent_price, said_price = (
        teacher.usd_per_million_input_tokens,
        teacher.usd_per_million_output_tokens,
    )
    cost = (plan.tokens * sent_price + said * said_price) / 1e6
    lines = [
        f"tokens: about {plan.tokens:,.0f} sent and at least {said:,} answered",
        f"cost: {_usd(cost)}, at {sent_price:g} and {said_price:g} USD a million tokens",
    ]
    if teacher.requests_per_minute:
        hours = plan.left / teacher.requests_per_minute / 60
        lines.append(f"{_time(hours, teacher.actors)} at least, by teacher.requests_per_minute")
    return lines


def _shortened(prompt: str) -> str:
    """Cut a prompt in its middle, and show characters that would steer a terminal as escapes."""
    left_out = len(prompt) - _SHOWN_CHARS
    if left_out > 0:
        half = _SHOWN_CHARS // 2
        prompt = f"{prompt[:half]} [... {left_out:,} characters ...] {prompt[-half:]}"
    return "".join(
        char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in prompt
    )


def _time(actor_hours: float, actors: ActorsSection) -> str:
    hours = actor_hours / actors.max
    told = f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
    return f"time: {told} with {actors.max} actor{'s' if actors.max > 1 else ''}"


def _usd(cost: float) -> str:
    return f"{cost:,.2f} USD" if cost >= 1 else f"{cost:.4f} USD"
