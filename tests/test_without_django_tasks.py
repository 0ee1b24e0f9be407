"""Django 5.2, which has no tasks of its own: the backend says so, and nothing else of bgtasks notices."""

from tests.processes import run_python

OLD_DJANGO = """
import django, sys
django.VERSION = (5, 2, 0, "final", 0)
sys.modules["django.tasks"] = None  # whoever imports it fails
django.setup()
"""


def test_the_backend_says_what_to_do() -> None:
    """Importing it fails with a sentence, not with the name of a missing module."""
    process = run_python(OLD_DJANGO + "import bgtasks.backends")

    assert process.returncode == 1
    [message] = [line for line in process.stderr.splitlines() if line.startswith("ImportError")]
    assert message.startswith("ImportError: bgtasks.backends needs django.tasks, which came with Django 6.0")
    assert "use bgtasks.spawn()" in message


def test_the_rest_does_not_notice() -> None:
    """The app starts, spawns and shuts down without Django's tasks."""
    process = run_python(
        OLD_DJANGO + "import bgtasks; print(bgtasks.spawn('x', print, 'ran'), bgtasks.drain(30))"
    )

    assert sorted(process.stdout.splitlines()) == ["True True", "ran"]
    assert process.stderr == ""
