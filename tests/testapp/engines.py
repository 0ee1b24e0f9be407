"""An engine in the database, for the tests of the handoff: it lies in an app that has models."""

import json
import uuid
from typing import Any

from django.tasks.backends.base import BaseTaskBackend
from django.tasks.base import TaskResult, TaskResultStatus
from django.tasks.exceptions import TaskResultDoesNotExist
from django.tasks.signals import task_enqueued
from django.utils import timezone

from tests.testapp.models import Enqueued


def make_result(task: Any, alias: str, args: Any, kwargs: Any, result_id: str) -> Any:
    return TaskResult(
        task=task,
        id=result_id,
        status=TaskResultStatus.READY,
        enqueued_at=timezone.now(),
        started_at=None,
        last_attempted_at=None,
        finished_at=None,
        args=args,
        kwargs=kwargs,
        backend=alias,
        errors=[],
        worker_ids=[],
    )


class TableBackend(BaseTaskBackend):
    """Writes a row for each task, as django-tasks-db does."""

    supports_async_task = True
    supports_get_result = True
    runs_by_path = True

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        self.validate_task(task)
        result = make_result(task, self.alias, args, kwargs, str(uuid.uuid4()))
        Enqueued.objects.create(
            id=result.id,
            path=task.module_path,
            queue_name=task.queue_name,
            arguments=json.dumps({"args": args, "kwargs": kwargs}),
        )
        task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id: str) -> Any:
        try:
            row = Enqueued.objects.get(id=result_id)
        except Enqueued.DoesNotExist:
            raise TaskResultDoesNotExist(result_id) from None
        result = make_result(None, self.alias, [], {}, str(row.id))
        object.__setattr__(result, "status", TaskResultStatus.RUNNING)
        return result
