"""gunicorn's configuration: it says when a worker can take a signal."""

from typing import Any


def post_worker_init(worker: Any) -> None:
    worker.log.info("worker is ready")
