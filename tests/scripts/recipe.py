"""Follow one section of docs/integrations.md in a project of its own: python recipe.py PAGE DATABASE."""

import sys
from pathlib import Path

import django
from django.conf import settings
from django.core.management import call_command

from tests.snippets import Reader, blocks


def project(*apps: str) -> None:
    """Set Django up, with the app of the tests and `apps`, and make the tables."""
    settings.configure(
        SECRET_KEY="not a secret",
        INSTALLED_APPS=[
            *apps,
            "django.contrib.admin",
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.messages",
            "django.contrib.sessions",
            "bgtasks",
            "tests.testapp",
        ],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": sys.argv[2],
                "OPTIONS": {"transaction_mode": "IMMEDIATE", "timeout": 20},
            }
        },
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF="tests.testapp.urls",
        STATIC_URL="static/",
        WAGTAIL_SITE_NAME="site",
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    )
    django.setup()
    call_command("migrate", run_syncdb=True, verbosity=0)


def main() -> None:
    """Do what the section says, and print the figures of the pools."""
    page = Path(sys.argv[1])
    with Reader(page, {"project": project, "__name__": "recipe"}, page.parent) as reader:
        for block in blocks(page):
            reader.do(block)

        import bgtasks  # after the section has set Django up

        figures = bgtasks.stats().values()
        succeeded, failed = (sum(getattr(each, name) for each in figures) for name in ("succeeded", "failed"))
        sys.stdout.write(f"{succeeded} {failed}\n")


if __name__ == "__main__":
    main()
