"""An endpoint's web application on a real socket: other clients' shapes, the page, what is told."""

import hashlib
import json
import shutil
import time

import httpx
import numpy as np
import pytest
from bare import NAME, TOKEN, answering, bare_student
from huggingface_hub import InferenceClient
from untrained import LABELS, untrained_student

from llkd_ray.config import ServeSection
from llkd_ray.serving.access import print_line
from llkd_ray.serving.application import application
from llkd_ray.serving.dialects import read_tei, read_vllm
from llkd_ray.serving.protocol import Classification, Refusal, model_card, read_classify

CONFIG = ServeSection(cpus_per_replica=1, max_texts_per_request=3)
CARD = model_card("student", NAME, LABELS, CONFIG)
TEXTS = ["Who wrote Hamlet ?", "Where is Lima ?", "a\x00b"]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    seen = []
    folder = untrained_student(tmp_path_factory.mktemp("student"))
    digest = hashlib.sha256(TOKEN.encode()).digest()
    with answering(bare_student(folder, CONFIG, digest, seen.append)) as url:
        yield url, seen


@pytest.fixture(scope="module")
def client(endpoint):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=endpoint[0], headers=headers, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def expected(client):
    """The answers of the endpoint's own protocol, which other tests hold against the model."""
    response = client.post("/v1/classify", json={"texts": TEXTS})
    assert response.status_code == 200, response.text
    return response.json()["predictions"]


def watched(endpoint, send):
    """Send a request; return its response and what observers were told, which may come later."""
    _, seen = endpoint
    before = len(seen)
    response = send()
    deadline = time.monotonic() + 10
    while len(seen) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    return response, seen[-1]


def scores(expected):
    return [list(item["probabilities"].values()) for item in expected]


@pytest.mark.slow  # vLLM's modules take their time, and what they import is partly deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_classes_of_vllm_write_our_requests_and_read_our_answers(client, expected):
    from vllm.entrypoints.pooling.classify.protocol import (
        ClassificationCompletionRequest,
        ClassificationResponse,
    )

    for given, texts in ((TEXTS, TEXTS), (TEXTS[0], TEXTS[:1])):
        request = ClassificationCompletionRequest(input=given, model=NAME)
        response = client.post("/classify", json=request.model_dump())
        assert response.status_code == 200, response.text
        answer = ClassificationResponse.model_validate_json(response.content)
        assert answer.model == NAME
        assert [item.index for item in answer.data] == list(range(len(texts)))
        assert [item.label for item in answer.data] == [
            item["label"] for item in expected[: len(texts)]
        ]
        probabilities = [item.probs for item in answer.data]
        np.testing.assert_allclose(probabilities, scores(expected[: len(texts)]), atol=1e-5)
        assert {item.num_classes for item in answer.data} == {len(LABELS)}


def test_the_hugging_face_client_reads_the_likeliest_label(client, expected, monkeypatch):
    # The gate keeps it from the hub; our own endpoint is none.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # Of a flat list it takes the first item, here as from text-embeddings-inference itself.
    asking = InferenceClient(model=f"{client.base_url}/predict", token=TOKEN)
    best = asking.text_classification(TEXTS[0])
    assert best.label == expected[0]["label"]
    assert best.score == pytest.approx(expected[0]["confidence"], abs=1e-5)


def test_predict_answers_one_text_flat_and_a_batch_as_a_list_of_lists(client, expected):
    flat = [client.post("/predict", json={"inputs": given}).json() for given in ("a", ["a"])]
    assert flat[0] == flat[1]
    body = {"inputs": [[text] for text in TEXTS], "truncate": True, "truncation_direction": "right"}
    batch = client.post("/predict", json=body).json()
    for answered in (flat[0], *batch):
        found = [item["score"] for item in answered]
        assert found == sorted(found, reverse=True)
        assert {item["label"] for item in answered} == set(LABELS)
    for answered, own in zip(batch, expected, strict=True):
        assert answered[0]["label"] == own["label"]
        assert answered[0]["score"] == pytest.approx(own["confidence"], abs=1e-5)


def test_logits_that_are_asked_for_have_the_probabilities_as_their_softmax(client, expected):
    body = {"inputs": [[text] for text in TEXTS], "raw_scores": True}
    rows = client.post("/predict", json=body).json()
    by_label = [{item["label"]: item["score"] for item in row} for row in rows]
    tei = np.array([[row[label] for label in LABELS] for row in by_label])
    body = {"input": TEXTS, "use_activation": False}
    data = client.post("/classify", json=body).json()["data"]
    for logits in (tei, np.array([item["probs"] for item in data])):
        softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(softmax, scores(expected), atol=1e-5)


def test_a_probability_of_zero_has_a_logit_that_json_can_write():
    found = Classification(np.array([[1.0] + [0.0] * (len(LABELS) - 1)]))
    answer = read_tei(b'{"inputs": "a", "raw_scores": true}', CARD).answer(found)
    assert "null" not in answer.model_dump_json()


@pytest.mark.parametrize(
    ("read", "body", "status", "reason"),
    [
        (read_vllm, {"input": "a", "model": "gpt-4"}, 404, f"'{NAME}' answers here"),
        (read_vllm, {"input": [1, 2]}, 422, "input[0]"),
        (read_vllm, {"input": "a", "truncate_prompt_tokens": 3}, 422, "truncate_prompt_tokens"),
        (read_vllm, {"input": "a", "truncation_side": "left"}, 422, "truncation_side"),
        (read_vllm, {"input": "a", "add_special_tokens": False}, 422, "add_special_tokens"),
        (read_tei, {"inputs": "a", "truncation_direction": "Left"}, 422, "truncation_direction"),
        (read_vllm, {"input": 1}, 422, "a text or a list of texts"),
        (read_vllm, {"input": []}, 422, "empty"),
        (read_vllm, {"messages": [{"role": "user", "content": "a"}]}, 422, "input: field required"),
        (read_vllm, {"input": ["a"] * 4}, 422, "at most 3"),
        (read_tei, {"inputs": ["a", "b"]}, 422, "pairs of texts are not read"),
        (read_tei, {"inputs": [["a"], ["b", "c"]]}, 422, "pairs of texts are not read"),
        (read_tei, {"inputs": [["a"], [1]]}, 422, "inputs: a text or a batch"),
        (read_tei, {"inputs": []}, 422, "inputs: a text or a batch"),
        (read_tei, {"inputs": [["a"]] * 4}, 422, "at most 3"),
        (read_tei, {"inputs": [["a"], [" "]]}, 422, "inputs[1]: the text is empty"),
        (read_tei, {"inputs": "a", "raw_scores": "yes"}, 422, "raw_scores"),
    ],
)
def test_other_shapes_are_refused_in_one_sentence(read, body, status, reason):
    with pytest.raises(Refusal) as refusal:
        read(json.dumps(body).encode(), CARD)
    assert refusal.value.status == status
    assert reason in refusal.value.reason


def test_the_answer_says_who_gave_it_where_more_than_one_could():
    rows = np.full((3, len(LABELS)), 1 / len(LABELS))
    rows[:, 2] += 0.1
    found = Classification(rows, by=("student", "teacher", None))
    for read, key, inner in ((read_classify, "texts", "predictions"), (read_vllm, "input", "data")):
        body = json.dumps({key: TEXTS}).encode()
        answer = read(body, CARD).answer(found).model_dump(exclude_unset=True)[inner]
        assert [item["by"] for item in answer] == ["student", "teacher", None]
        assert [item["label"] for item in answer] == [LABELS[2], LABELS[2], None]
        alone = read(body, CARD).answer(Classification(rows)).model_dump(exclude_unset=True)[inner]
        assert all("by" not in item and item["label"] == LABELS[2] for item in alone)


def test_a_sane_request_id_is_kept_and_any_other_is_replaced(client, endpoint):
    for given, kept in (
        ("trace-1:a/b@c", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ('{"forged": "line"}', False),
        (b"\xff", False),
    ):
        headers = {"X-Request-Id": given}
        response, told = watched(endpoint, lambda: client.get("/healthz", headers=headers))  # noqa: B023
        assert (told.id == given) == kept
        # What was kept, Serve's proxy echoes.
        assert response.headers.get("x-request-id") == (None if kept else told.id)
    response, told = watched(endpoint, lambda: client.get("/healthz"))
    assert response.headers["x-request-id"] == told.id


def test_observers_are_told_what_came_of_each_request_and_never_its_texts(client, endpoint, capfd):
    def told(method, path, **options):
        return watched(endpoint, lambda: client.request(method, path, **options))[1]

    good = told("POST", "/predict", json={"inputs": [["a secret text"], ["another"]]})
    assert (good.path, good.routed, good.status, good.texts) == ("/predict", True, 200, 2)
    assert good.classification.probabilities.shape == (2, len(LABELS))
    assert 0 < good.seconds < 60
    assert "secret" not in repr(good)
    assert TOKEN not in repr(good)
    refused = told("POST", "/predict", json={"inputs": [["a", "b"]]})
    assert (refused.status, refused.texts, refused.classification) == (422, 0, None)
    lost = told("GET", "/no/such%0apath")
    assert (lost.path, lost.status, lost.routed) == ("/no/such\npath", 404, False)
    for answered in (good, refused, lost):
        print_line(answered)
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["status"] for line in lines] == [200, 422, 404]
    assert lines[0].keys() == {"time", "id", "method", "path", "status", "ms", "texts"}


class Broken:
    """A classifier whose model fails, or whose queue is full."""

    async def classify(self, texts):
        if texts == ["full"]:
            raise Refusal(429, "too many wait", {"Retry-After": "1"})
        raise ValueError(f"cannot read {texts}")

    def check_health(self):
        raise RuntimeError("the model is gone")

    async def close(self):
        pass


def test_what_a_classifier_raises_is_answered_in_the_shape_of_every_refusal(caplog):
    with answering(application(CARD, Broken(), None)) as url:
        full = httpx.post(f"{url}/v1/classify", json={"texts": ["full"]})
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert full.json() == {"detail": "too many wait"}
        for response in (
            httpx.post(f"{url}/v1/classify", json={"texts": ["a"]}),
            httpx.get(f"{url}/healthz"),
        ):
            assert response.status_code == 500
            assert response.headers["x-request-id"] in response.json()["detail"]
            assert response.headers["x-request-id"] in caplog.text
            assert "cannot read" not in response.text


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no browser is installed: neither chromium nor google-chrome")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found)
        yield opened
        opened.close()


def test_the_page_shows_the_probabilities_in_a_real_browser(browser, endpoint, expected):
    url, _ = endpoint
    problems, asked = [], []
    tab = browser.new_page()
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: problems.append(message.text))
    tab.goto(url)
    # Without the token nothing is told, and the page asks for it.
    tab.get_by_label("Token").wait_for()
    tab.get_by_text("asks for a token").wait_for()
    tab.get_by_label("Token").fill(TOKEN)
    tab.get_by_label("Text").fill(TEXTS[0])
    tab.get_by_role("button").click()
    tab.get_by_text(NAME).wait_for()
    assert tab.get_by_role("status").inner_text() == expected[0]["label"]
    best = sorted(expected[0]["probabilities"].items(), key=lambda item: -item[1])
    rows = [row.inner_text().split() for row in tab.locator("tr").all()]
    assert rows == [[label, f"{100 * share:.1f}", "%"] for label, share in best]
    bars = [bar.evaluate("bar => bar.value") for bar in tab.locator("meter").all()]
    np.testing.assert_allclose(bars, [share for _, share in best], atol=1e-5)
    tab.get_by_label("Text").fill(" ")
    tab.get_by_role("button").click()
    tab.get_by_text("the text is empty").wait_for()
    assert tab.locator("tr").count() == 0
    # The browser reports the two refusals, and nothing of its policy or of the script.
    assert [text.partition("status of ")[2][:3] for text in problems] == ["401", "422"]
    assert all(address.startswith((url, "data:")) for address in asked)
    tab.close()


class Unsure:
    """A cascade that answers the first label, or gives none."""

    async def classify(self, texts):
        by = [None if text == "strange" else "teacher" for text in texts]
        return Classification(np.array([[0.75, 0.25]] * len(texts)), by)

    def check_health(self):
        pass

    async def close(self):
        pass


def test_the_page_shows_labels_as_text_and_says_who_answered(browser):
    markup = "<img src=x onerror=document.title='owned'>"
    card = model_card("student", NAME, (markup, "other"), CONFIG)
    with answering(application(card, Unsure(), None)) as url:
        tab = browser.new_page()
        tab.goto(url)
        for text, told in (("a", f"{markup}, says the teacher"), ("strange", "nobody is sure")):
            tab.get_by_label("Text").fill(text)
            tab.get_by_role("button").click()
            tab.get_by_role("status").get_by_text(told).wait_for()
        assert markup in tab.locator("tr").first.inner_text()
        assert tab.locator("img").count() == 0
        assert tab.title() == "Classify a text"
        assert tab.get_by_label("Token").is_hidden()
        tab.close()
