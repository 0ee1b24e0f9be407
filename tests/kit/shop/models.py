"""The model of the shop."""

from django.db import models


class Order(models.Model):
    """What the tasks of the shop write."""

    reference = models.CharField(max_length=100)
    confirmed = models.BooleanField(default=False)

    class Meta:
        app_label = "shop"

    def __str__(self) -> str:
        return self.reference
