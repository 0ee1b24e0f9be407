"""The site for ASGI servers, wrapped as a project has to."""

from django.core.asgi import get_asgi_application

import bgtasks.asgi

application = bgtasks.asgi.lifespan(get_asgi_application())
