"""Who signed up, and which welcome mails went out."""

from django.db import models


class Member(models.Model):
    """A person on the guest list."""

    class How(models.TextChoices):
        """The code that started the member's welcome mail."""

        SYNC_VIEW = "sync", "sync view"
        ASYNC_VIEW = "async", "async view"
        THREAD = "thread", "a thread each"
        EXECUTOR = "executor", "ThreadPoolExecutor(64)"
        EXECUTOR_8 = "executor-8", "ThreadPoolExecutor(8)"
        BGTASKS = "bgtasks", "bgtasks"
        FRESH = "fresh", "bgtasks, fresh"
        STALE = "stale", "bgtasks, stale"

    name = models.CharField(max_length=80)
    email = models.EmailField()
    how = models.CharField(max_length=10, choices=How.choices)
    burst = models.UUIDField(
        null=True, blank=True, db_index=True, help_text="the burst this sign-up was part of"
    )
    joined_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"{self.name} <{self.email}>"


class Delivery(models.Model):
    """The receipt of a welcome mail. A member without one has had no mail: the task is waiting, or lost."""

    member = models.OneToOneField(Member, on_delete=models.CASCADE, related_name="delivery")
    member_id: int  # that of the field, for type checkers
    seconds = models.FloatField(help_text="how long the task took")
    delivered_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        verbose_name_plural = "deliveries"

    def __str__(self) -> str:
        return f"mail to {self.member_id} in {self.seconds:.2f} s"
