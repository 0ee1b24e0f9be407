"""What a project writes for ``gunicorn -k gevent --preload``: the patch comes before the application."""

from gevent import monkey

monkey.patch_all()
