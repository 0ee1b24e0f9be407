"""What users of waitress have to write: SIGTERM becomes a SystemExit, as Ctrl-C is a KeyboardInterrupt."""

import signal
import sys

from django.core.wsgi import get_wsgi_application

signal.signal(signal.SIGTERM, lambda *_: sys.exit())

application = get_wsgi_application()
