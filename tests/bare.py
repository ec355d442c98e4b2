"""An endpoint's web application on a real socket, without Ray."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from untrained import LABELS

from llkd_ray.config import ServeSection
from llkd_ray.serving.access import Observer
from llkd_ray.serving.application import application
from llkd_ray.serving.protocol import model_card
from llkd_ray.serving.student import StudentClassifier

TOKEN = "correct horse battery staple"  # noqa: S105 - of the tests alone
NAME = "student-test"


@contextlib.contextmanager
def answering(app: ASGIApp) -> Iterator[str]:
    """Answer on a free port for the length of the block; yields the base URL."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)


def bare_student(
    folder: Path, config: ServeSection, digest: bytes | None = None, *observers: Observer
) -> ASGIApp:
    """Load an exported student and return its web application."""
    card = model_card("student", NAME, LABELS, config)
    return application(card, StudentClassifier(folder, 128, config), digest, observers)
