"""The Celery application of the shop, as Celery's own guide for Django has it."""

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.shop.settings")

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@app.task  # type: ignore[untyped-decorator]  # celery has no types
def spawn_receipts(number: int) -> None:
    """Do what the job of that name does."""
    from tests.shop import jobs  # which needs the models

    jobs.spawn_receipts(number)
