"""A site that spawns a task while it is being loaded."""

from django.core.wsgi import get_wsgi_application

import bgtasks

application = get_wsgi_application()

bgtasks.spawn("early", print)
