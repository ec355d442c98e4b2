"""The OpenAPI document, held against what a real student answers to fuzzed requests."""

import hashlib

import pytest
import schemathesis
from bare import TOKEN, answering, bare_student
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from untrained import untrained_student

from llkd_ray.config import ServeSection

pytestmark = pytest.mark.slow

CONFIG = ServeSection(
    cpus_per_replica=1, max_texts_per_request=4, max_text_chars=60, max_body_bytes=20_000
)
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
GETS, POSTS = {"/v1/model", "/healthz"}, {"/v1/classify", "/classify", "/predict"}
VALID, INVALID = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    folder = untrained_student(tmp_path_factory.mktemp("student"))
    digest = hashlib.sha256(TOKEN.encode()).digest()
    with answering(bare_student(folder, CONFIG, digest)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json", headers=AUTHORIZED)


def test_every_operation_of_the_document_is_fuzzed_below(described):
    described.validate()
    # schemathesis leaves out the path of the document itself.
    assert {found.ok().path for found in described.get_all_operations()} == GETS | POSTS


@pytest.mark.parametrize(
    ("path", "mode"),
    [(path, VALID) for path in sorted(GETS)]
    + [(path, mode) for path in sorted(POSTS) for mode in (VALID, INVALID)],
)
def test_fuzzed_requests_are_answered_as_the_document_says(described, path, mode):
    operation = described[path]["get" if path in GETS else "post"]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    def fuzz(case):
        # Among what is checked: no 5xx, only documented statuses and bodies, invalid requests
        # refused, valid ones answered, nothing told without the token.
        case.call_and_validate(headers=AUTHORIZED, timeout=120)

    fuzz()
