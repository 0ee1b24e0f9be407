"""The demo site as a Django app: its models, templates, static files and the two commands."""

from django.apps import AppConfig


class DemoConfig(AppConfig):
    """`demo_project` is project and app in one, so that there is one place to copy from."""

    name = "demo_project"
    verbose_name = "Guestlist"
    default_auto_field = "django.db.models.BigAutoField"
