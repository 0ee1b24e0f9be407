from django.db import models


class Note(models.Model):
    """A row that a background task writes, for a test to find."""

    text = models.CharField(max_length=200)
    created = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.text


class Enqueued(models.Model):
    """A task that the engine of tests/testapp/engines.py has."""

    id = models.UUIDField(primary_key=True)
    path = models.CharField(max_length=200)
    queue_name = models.CharField(max_length=50)
    arguments = models.TextField()

    def __str__(self) -> str:
        return self.path
