"""The served teacher, without its engine; tests/test_serving_cascade.py asks a real one."""

import pytest

from llkd_ray.serving.protocol import Refusal
from llkd_ray.serving.teacher import refuse_unread
from llkd_ray.teacher.answers import Answer


def test_a_request_with_a_text_that_is_not_read_is_refused_with_its_position_and_reason():
    read = Answer([-0.1, -2.4], 1, 0, 0)
    unread = Answer(None, 0, 0, 0, "the text takes about 3900 tokens")
    refuse_unread([read, read])
    with pytest.raises(Refusal) as refusal:
        refuse_unread([read, unread, unread])
    told = refusal.value
    assert (told.status, told.reason) == (422, "texts[1]: the text takes about 3900 tokens")
