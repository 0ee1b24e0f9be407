"""For uvicorn: ``benchmarks.asgi:application``."""

import asyncio

from django.core.asgi import get_asgi_application

import bgtasks.asgi

inner = bgtasks.asgi.lifespan(get_asgi_application())


async def application(scope: object, receive: object, send: object) -> None:
    """Note the server's loop, and go on."""
    from benchmarks import site  # once Django is set up

    site.loops[:] = [asyncio.get_running_loop()]
    await inner(scope, receive, send)
