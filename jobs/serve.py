"""Serve the student over HTTP until interrupted; serve.target: teacher or cascade instead."""

import os
import signal
import sys
import threading
from types import FrameType

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment


def serve(experiment: Experiment) -> None:
    # A supervisor's SIGTERM ends the job as Ctrl-C does: the endpoint is taken down in order.
    signal.signal(signal.SIGTERM, _interrupt)

    from llkd_ray.serving.ingress import environment_of

    config = experiment.serve
    os.environ.update(environment_of(config))  # Serve reads it when it is imported.

    from llkd_ray.cluster import ray_session
    from llkd_ray.lineage import Lineage
    from llkd_ray.serving.deploy import running
    from llkd_ray.serving.targets import application_of

    app = application_of(config.target, Lineage(experiment), config)
    with ray_session(experiment.ray):
        signal.signal(signal.SIGTERM, _interrupt)  # Ray has put its own in place.
        with running(app, config) as url:
            token = f'-H "Authorization: Bearer ${config.token_env}" ' if config.token_env else ""
            print(
                f"serve: the {config.target} answers at {url} until Ctrl-C; try: "
                f'curl {url}/v1/classify {token}-d \'{{"texts": ["Where is Lima?"]}}\'',
                flush=True,
            )
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                # A second Ctrl-C would leave processes behind.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("serve: stopped")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), serve))
