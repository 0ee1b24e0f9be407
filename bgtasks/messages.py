"""The copy of a mail that a task sends: an object, or fields of JSON that travel to a worker."""

from __future__ import annotations

import base64
import email
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from email.message import Message, MIMEPart
from email.mime.base import MIMEBase
from email.policy import Compat32, compat32, default
from typing import Any, cast

from django.core.mail import EmailAlternative, EmailAttachment, EmailMessage, EmailMultiAlternatives
from django.utils.functional import Promise

from bgtasks.handoff.payload import why_not_json

KINDS = {kind.__name__: kind for kind in (EmailMessage, EmailMultiAlternatives)}  # which travel
CONNECTIONS = frozenset({"connection", "_connection"})  # attributes that say who sends it: we do


def fixed_headers(message: EmailMessage) -> dict[str, str]:
    """Render `message`, and return the headers that would be others each time it is rendered.

    Raises:
        ValueError: A header has a line break, or says what no header can.
    """
    rendered = message.message()
    return {name: str(rendered[name]) for name in ("Date", "Message-ID") if name in rendered}


@contextmanager
def fixed(message: EmailMessage, headers: Mapping[str, str]) -> Generator[EmailMessage]:
    """Give a copy of `message` that is rendered with these headers.

    Its attributes stay as they are. The API of a mail service is given those, and sets such headers itself.
    """
    twin = copied(message)
    render = twin.message

    def render_fixed(*args: Any, **kwargs: Any) -> Any:
        rendered = render(*args, **kwargs)
        for name, value in headers.items():
            del rendered[name]
            rendered[name] = value
        return rendered

    vars(twin)["message"] = render_fixed
    try:
        yield twin
    finally:
        # It refers to itself, so it would be kept, with its attachments, until Python looks for cycles.
        del vars(twin)["message"]


def copied(message: EmailMessage) -> EmailMessage:
    """Return a copy that nothing changes of what its owner does to `message`, whatever its class."""
    twin = copy(message)
    for name, value in vars(twin).items():
        vars(twin)[name] = None if name in CONNECTIONS else _copied(value)
    return twin


def _copied(value: Any) -> Any:
    if isinstance(value, list | dict):
        twin: Any = copy(cast(Any, value))  # of the same class
        keys: Any = list(twin) if hasattr(twin, "keys") else range(len(twin))
        for key in keys:
            twin[key] = _copied(twin[key])
        return twin
    # Two threads that write the same part out at once would also mix up its boundaries.
    return deepcopy(cast(Any, value)) if isinstance(value, Message) else value


# Fields of JSON.


def to_fields(message: EmailMessage, headers: Mapping[str, str]) -> dict[str, Any] | None:
    """Return `message` as JSON can hold it; None if it is of a class of its own, or holds something else."""
    kind = type(message)
    if kind not in KINDS.values():
        return None
    attributes = {name: value for name, value in vars(message).items() if name not in CONNECTIONS}
    parts: dict[str, Any] = {
        name: [_packed(part) for part in attributes.pop(name)]
        for name in ("attachments", "alternatives")
        if name in attributes
    }
    fields: dict[str, Any] = {
        "kind": kind.__name__,
        "attributes": _plain(attributes),
        "headers": dict(headers),
        **parts,
    }
    return fields if why_not_json(fields) is None else None


def from_fields(fields: Mapping[str, Any]) -> EmailMessage:
    """Return the message that `to_fields` was given."""
    message = KINDS[fields["kind"]]()
    vars(message).update(fields["attributes"])
    message.attachments = [_unpacked(part, EmailAttachment) for part in fields["attachments"]]
    if isinstance(message, EmailMultiAlternatives):
        message.alternatives = [_unpacked(part, EmailAlternative) for part in fields["alternatives"]]
    return message


def _plain(value: Any) -> Any:
    """Return `value` with plain text in place of text that is translated later, or marked as safe."""
    if isinstance(value, str | Promise):
        return str.__str__(str(value))
    if type(value) is list:
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    if type(value) is dict:
        return {_plain(key): _plain(item) for key, item in cast("dict[str, Any]", value).items()}
    return value


def _packed(part: Any) -> Any:
    """Return an attachment or alternative as JSON holds it: the bytes of a MIME part, or a list."""
    if isinstance(part, MIMEPart | MIMEBase):
        key = "old_part" if isinstance(part, MIMEBase) else "part"
        return {key: _base64(part.as_bytes())}
    return [{"bytes": _base64(item)} if type(item) is bytes else _plain(item) for item in part]


def _unpacked(packed: Any, kind: Any) -> Any:
    if isinstance(packed, list):
        return kind(*map(_unpacked_item, cast("Sequence[Any]", packed)))
    old = "old_part" in packed
    data = base64.b64decode(packed["old_part" if old else "part"])
    return email.message_from_bytes(data, _OldPart, policy=compat32) if old else _new_part(data)


def _unpacked_item(item: Any) -> Any:
    return base64.b64decode(cast("dict[str, str]", item)["bytes"]) if isinstance(item, dict) else item


def _new_part(data: bytes) -> Message[Any, Any]:
    return email.message_from_bytes(data, policy=default)


class _OldPart(MIMEBase):
    """A part of Python's older interface, as the parser makes it: without headers yet."""

    def __init__(self, policy: Compat32 = compat32) -> None:
        Message.__init__(self, policy=policy)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
