"""The strictest policy that a page of the admin can live under."""

from collections.abc import Callable
from typing import Any


def strict_policy(get_response: Callable[..., Any]) -> Any:
    def middleware(request: Any) -> Any:
        response = get_response(request)
        response["Content-Security-Policy"] = (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
            "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        )
        return response

    return middleware
