"""A web process of the shop: one address that spawns a burst, and one that tells the figures."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qsl

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.shop.settings")
django.setup()

import bgtasks  # noqa: E402  # after the setup
import bgtasks.asgi  # noqa: E402
from tests.shop import tasks  # noqa: E402


def burst(first: int, number: int, seconds: float) -> dict[str, int]:
    """Spawn `number` tasks as fast as the pool accepts them: a dropped one is tried again a moment later."""
    dropped = 0
    for key in range(first, first + number):
        while not bgtasks.spawn("burst", tasks.count, f"burst-{key}", seconds=seconds):
            dropped += 1
            time.sleep(0.002)
    return {"accepted": number, "dropped": dropped}


async def respond(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    """Answer /stats and /burst?first=0&number=100&seconds=0."""
    if scope["path"] == "/burst":
        query = dict(parse_qsl(scope["query_string"].decode()))
        first, number, seconds = int(query["first"]), int(query["number"]), float(query["seconds"])
        answer = await asyncio.to_thread(burst, first, number, seconds)
    else:
        answer = asdict(bgtasks.stats()["default"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


application = bgtasks.asgi.lifespan(respond)
