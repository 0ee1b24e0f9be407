"""The tables of the demo site."""

from typing import ClassVar

import django.db.models.deletion
from django.db import migrations, models
from django.db.migrations.operations.base import Operation


class Migration(migrations.Migration):
    initial = True

    dependencies: ClassVar[list[tuple[str, str]]] = []

    operations: ClassVar[list[Operation]] = [
        migrations.CreateModel(
            name="Member",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("name", models.CharField(max_length=80)),
                ("email", models.EmailField(max_length=254)),
                (
                    "how",
                    models.CharField(
                        choices=[
                            ("sync", "sync view"),
                            ("async", "async view"),
                            ("thread", "a thread each"),
                            ("executor", "ThreadPoolExecutor(64)"),
                            ("executor-8", "ThreadPoolExecutor(8)"),
                            ("bgtasks", "bgtasks"),
                            ("fresh", "bgtasks, fresh"),
                            ("stale", "bgtasks, stale"),
                        ],
                        max_length=10,
                    ),
                ),
                (
                    "burst",
                    models.UUIDField(
                        blank=True, db_index=True, help_text="the burst this sign-up was part of", null=True
                    ),
                ),
                ("joined_at", models.DateTimeField(auto_now_add=True)),
            ],
        ),
        migrations.CreateModel(
            name="Delivery",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("seconds", models.FloatField(help_text="how long the task took")),
                ("delivered_at", models.DateTimeField(auto_now_add=True)),
                (
                    "member",
                    models.OneToOneField(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="delivery",
                        to="demo_project.member",
                    ),
                ),
            ],
            options={
                "verbose_name_plural": "deliveries",
            },
        ),
    ]
