"""The ASGI application: Django, its static files, and the orderly end of the background tasks."""

import os

from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application

from bgtasks.asgi import lifespan

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "demo_project.settings")

# `lifespan` is outermost: it answers the server's shutdown message once the background tasks have ended.
application = lifespan(ASGIStaticFilesHandler(get_asgi_application()))
