from django.core.asgi import get_asgi_application

from bgtasks.asgi import lifespan

unwrapped = get_asgi_application()
application = lifespan(unwrapped)
