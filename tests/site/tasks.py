"""Tasks of the tests' site. A module of its own: Django demands that its tasks are importable functions."""

from typing import Any

import django

if django.VERSION >= (6, 0):  # pragma: no branch  # only where that exists does anybody import this
    from django.tasks import task

    @task
    def django_task(ran: list[Any], *, value: Any) -> None:
        ran.append(value)

    @task
    async def async_django_task(ran: list[Any], *, value: Any) -> None:
        ran.append(value)

    @task(takes_context=True)
    def django_task_with_context(context: Any, contexts: Any, *, value: Any) -> None:
        contexts.append(context)

    @task(takes_context=True)
    async def async_django_task_with_context(context: Any, contexts: Any, *, value: Any) -> None:
        contexts.append(context)
