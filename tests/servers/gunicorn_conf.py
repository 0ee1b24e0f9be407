"""What a project writes that closes in `worker_exit` what its tasks use."""

from typing import Any


def worker_exit(server: Any, worker: Any) -> None:
    import bgtasks

    assert bgtasks.shutdown()
    assert all(stats.queued == stats.running == 0 for stats in bgtasks.stats().values())
    worker.log.info("the pools are shut down")
