from django.db import models


class Done(models.Model):
    """What a task has done. The key is unique, so a task that is run twice fails the second time."""

    key = models.CharField(max_length=100, unique=True)
    process = models.IntegerField()
    language = models.CharField(max_length=10)
    detail = models.CharField(max_length=200, default="")

    def __str__(self) -> str:
        return self.key


class Run(models.Model):
    """One run of a task that survives a restart of the database: its number is unique, its key is not."""

    run = models.UUIDField(unique=True)
    key = models.CharField(max_length=100)

    def __str__(self) -> str:
        return self.key


class Again(models.Model):
    """Every run of a task, for the proof that there was one."""

    key = models.CharField(max_length=100)

    def __str__(self) -> str:
        return self.key
