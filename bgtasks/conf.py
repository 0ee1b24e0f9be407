"""The setting BGTASKS: one pool a key, in the shape of DATABASES and CACHES."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypedDict, TypeGuard

from django.conf import settings

from bgtasks.exceptions import InvalidSettings
from bgtasks.text import encodable

OVERFLOW, ALWAYS = "overflow", "always"  # HANDOFF_WHEN
POOL, INLINE = "pool", "inline"  # MODE
DROP_NEWEST, DROP_OLDEST = "drop_newest", "drop_oldest"  # ON_FULL

DEFAULT_POOL = "default"  # exists even if BGTASKS does not mention it
SNAPSHOT_INTERVAL_MIN = 0.1  # seconds
SHUTDOWN_TIMEOUT_MIN = 1  # seconds


class PoolOptions(TypedDict, total=False):
    """The type of one entry of BGTASKS, for settings that a type checker reads.

    >>> BGTASKS: dict[str, PoolOptions] = {"default": {"CONN_MAX": 4}}
    """

    CAPACITY: int
    CONN_MAX: int
    TASK_TIMEOUT: float | None
    SHUTDOWN_TIMEOUT: float
    EXPIRES: float | None
    ON_FULL: Literal["drop_newest", "drop_oldest"]
    RETRIES: int
    RETRY_DELAY: float
    HANDOFF_TO: str | None
    HANDOFF_WHEN: Literal["overflow", "always"]
    MODE: Literal["pool", "inline"]


class PoolConfig(NamedTuple):
    """The options of one pool, which are the keys of its entry in BGTASKS in lower case.

    Attributes:
        capacity: Tasks that may wait.
        conn_max: Tasks that may run at once, and connections they may hold per database alias.
        task_timeout: Seconds after which an asynchronous task is cancelled, and a plain function reported.
        shutdown_timeout: Seconds that accepted tasks have to finish when the process shuts down.
        expires: Seconds that a task may wait before it is too old to run.
        on_full: ``"drop_newest"``, or ``"drop_oldest"`` to give up the oldest waiting task for a new one.
        retries: How many times a failed task is retried.
        retry_delay: Seconds before the first of these tries, doubled with each.
        handoff_to: The alias in TASKS of the engine that waiting tasks are moved to.
        handoff_when: ``"overflow"``, when the queue is nearly full and at shutdown, or ``"always"``.
        mode: ``"pool"``, or ``"inline"`` to run every task at once in the code that spawns it.
    """

    capacity: int = 1024
    conn_max: int = 8
    task_timeout: float | None = None
    shutdown_timeout: float = 8
    expires: float | None = None
    on_full: str = DROP_NEWEST
    retries: int = 0
    retry_delay: float = 1.0
    handoff_to: str | None = None
    handoff_when: str = OVERFLOW
    mode: str = POOL


class SnapshotConfig(NamedTuple):
    """The setting BGTASKS_SNAPSHOT: how a process publishes its figures for the other processes.

    Attributes:
        interval: Seconds between two snapshots while tasks are spawned or run.
        cache: Alias in CACHES of the cache they are published in.
    """

    interval: float = 1.0
    cache: str = "default"


class _Read(NamedTuple):
    """A value of BGTASKS without a mistake, and what it says."""

    value: object
    configs: Mapping[str, PoolConfig]


_NO_POOLS: Mapping[str, Any] = {}  # the setting of a project that has none
_last: _Read | None = None  # what was read last; whoever finds another value replaces it


class Problem(NamedTuple):
    """One mistake in BGTASKS, as a system check reports it."""

    id: str
    message: str
    hint: str


def configured() -> Mapping[str, Any]:
    """Return the setting as the project wrote it, with the default pool added if it is left out."""
    value: Any = getattr(settings, "BGTASKS", _NO_POOLS)
    if _is_mapping(value) and DEFAULT_POOL not in value:
        return {DEFAULT_POOL: {}, **value}
    whatever: Any = value  # problems() says what is wrong with it
    return whatever  # type: ignore[no-any-return]


def pool_names() -> list[str]:
    """Return the names of all pools.

    Raises:
        InvalidSettings: BGTASKS has a mistake.
    """
    return list(_configs())


def pool_config(name: str) -> PoolConfig | None:
    """Return the options of the pool `name`, or None if there is no such pool.

    Raises:
        InvalidSettings: BGTASKS has a mistake.
    """
    return _configs().get(name)


def longest_shutdown() -> float:
    """Return the longest SHUTDOWN_TIMEOUT of the pools that have a queue, in seconds.

    Raises:
        InvalidSettings: BGTASKS has a mistake.
    """
    queued = [config for config in _configs().values() if config.mode != INLINE]
    return max((config.shutdown_timeout for config in queued), default=0)


def handoff_aliases() -> list[str]:
    """Return the aliases of the engines that pools hand off to, as far as their mistakes let it tell."""
    pools = configured()
    options = [options for options in pools.values() if _is_mapping(options)] if _is_mapping(pools) else []
    aliases = [pool.get("HANDOFF_TO") for pool in options]
    return [alias for alias in aliases if isinstance(alias, str)]


def _configs() -> Mapping[str, PoolConfig]:
    """Return the options of all pools by name.

    Each value of the setting is checked once: a check for each pool would make a start quadratic.
    """
    global _last
    last, value = _last, getattr(settings, "BGTASKS", _NO_POOLS)
    if last is None or last.value is not value:
        pools = configured()
        for problem in problems(pools):
            raise InvalidSettings(f"{problem.message} {problem.hint} ({problem.id})")
        _last = last = _Read(value, {name: _config(options) for name, options in pools.items()})
    return last.configs


def _config(options: Mapping[str, Any]) -> PoolConfig:
    return PoolConfig(**{key.lower(): value for key, value in options.items()})


def forget() -> None:
    """Read the setting anew when it is asked for: it may have been changed in place."""
    global _last
    _last = None


def problems(pools: Any) -> Iterator[Problem]:
    """Yield every mistake in `pools`, the value of the setting BGTASKS."""
    if not _is_mapping(pools):
        yield Problem(
            "bgtasks.E001",
            f"BGTASKS is {pools!r}, not a dictionary of pools.",
            'Write BGTASKS = {"default": {"CAPACITY": 1024, "CONN_MAX": 8}}.',
        )
        return
    for name, options in pools.items():
        if not isinstance(name, str) or not name or encodable(name) != name:
            yield Problem(
                "bgtasks.E002",
                f"BGTASKS has the pool name {name!r}, which is not a non-empty Unicode string.",
                'Name the pool by a string, such as "email".',
            )
        elif not _is_mapping(options):
            yield Problem(
                "bgtasks.E003",
                f"BGTASKS[{name!r}] is {options!r}, not a dictionary of options.",
                f"Options belong to a pool: write BGTASKS = {{'default': {{{name!r}: {options!r}}}}}."
                if name in _OPTIONS
                else "Write {} for a pool with the default options.",
            )
        else:
            yield from _pool_problems(name, options)


def snapshot_config() -> SnapshotConfig | None:
    """Return how snapshots are published; None if they are not, or if the setting has a mistake."""
    value = getattr(settings, "BGTASKS_SNAPSHOT", {})
    if value is None or any(snapshot_problems(value)):
        return None
    return SnapshotConfig(**{key.lower(): option for key, option in value.items()})


def snapshot_problems(value: Any) -> Iterator[Problem]:
    """Yield every mistake in `value`, the setting BGTASKS_SNAPSHOT."""
    if value is None:
        return
    if not _is_mapping(value):
        yield Problem(
            "bgtasks.E020",
            f"BGTASKS_SNAPSHOT is {value!r}, not a dictionary of options.",
            'Write BGTASKS_SNAPSHOT = {"INTERVAL": 1.0, "CACHE": "default"}, or None to publish nothing.',
        )
        return
    for key, option in value.items():
        where = f"BGTASKS_SNAPSHOT[{key!r}]"
        if key == "INTERVAL":
            if not _OPTIONS["SHUTDOWN_TIMEOUT"].has_type(option) or option < SNAPSHOT_INTERVAL_MIN:
                yield Problem(
                    "bgtasks.E022",
                    f"{where} is {option!r}, which is not {SNAPSHOT_INTERVAL_MIN} seconds or more.",
                    "INTERVAL is the time between two snapshots: 1.0 by default.",
                )
        elif key == "CACHE":
            if not isinstance(option, str) or option not in settings.CACHES:
                yield Problem(
                    "bgtasks.E023",
                    f"{where} is {option!r}, which is not an alias in CACHES.",
                    f"CACHES defines: {', '.join(map(repr, settings.CACHES))}.",
                )
        else:
            yield Problem(
                "bgtasks.E021",
                f"{where} is not an option of the snapshots.",
                "The options are 'INTERVAL', 'CACHE'.",
            )


def _is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping)


def _pool_problems(pool: str, options: Mapping[Any, Any]) -> Iterator[Problem]:
    for key, value in options.items():
        yield from _option_problems(pool, key, value)
    if options.get("HANDOFF_TO") is not None and options.get("CONN_MAX") == 1:
        yield Problem(
            "bgtasks.E008",
            f"BGTASKS[{pool!r}] has HANDOFF_TO, and CONN_MAX is 1: no slot is left to run tasks.",
            "One of the CONN_MAX slots is kept for moving tasks to the engine; write 2 or more.",
        )


def _option_problems(pool: str, key: Any, value: Any) -> Iterator[Problem]:
    where = f"BGTASKS[{pool!r}][{key!r}]"
    option = _OPTIONS.get(key) if isinstance(key, str) else None
    if option is None:
        yield Problem("bgtasks.E004", f"{where} is not an option of a pool.", _suggestion(key))
    elif not option.has_type(value):
        yield Problem("bgtasks.E005", f"{where} is {value!r}, which is not {option.expected}.", option.hint)
    elif option.choices and value not in option.choices:
        yield Problem(
            "bgtasks.E007",
            f"{where} is {value!r}, which is none of {', '.join(map(repr, option.choices))}.",
            option.hint,
        )
    elif not option.is_in_range(value):
        yield Problem(
            "bgtasks.E006", f"{where} is {value!r}, which is less than {option.least}.", option.hint
        )


def _suggestion(key: Any) -> str:
    close = difflib.get_close_matches(str(key).upper(), _OPTIONS, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"The options are {', '.join(map(repr, _OPTIONS))}."


class _Option(NamedTuple):
    """What values an option may have. There is no special zero: no value means "unlimited"."""

    expected: str
    hint: str
    types: tuple[type, ...]
    least: float | None = None
    choices: tuple[str, ...] = ()

    def has_type(self, value: Any) -> bool:
        """Tell whether `value` has a right type. A bool is an int to Python, but not to a person."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return isinstance(value, self.types) and not isinstance(value, bool)

    def is_in_range(self, value: Any) -> bool:
        """Tell whether `value`, of a right type, is large enough."""
        return value is None or self.least is None or value >= self.least


_OPTIONS = {
    "CAPACITY": _Option(
        "a whole number",
        "CAPACITY is the number of tasks that may wait: 1 or more, 1024 by default.",
        (int,),
        1,
    ),
    "CONN_MAX": _Option(
        "a whole number",
        "CONN_MAX is the number of tasks that may run at once: 1 or more, 8 by default.",
        (int,),
        1,
    ),
    "TASK_TIMEOUT": _Option(
        "a number of seconds or None",
        "TASK_TIMEOUT is in seconds: 1 or more, or None, the default, for no limit.",
        (int, float, type(None)),
        1,
    ),
    "SHUTDOWN_TIMEOUT": _Option(
        "a number of seconds",
        f"SHUTDOWN_TIMEOUT is in seconds: {SHUTDOWN_TIMEOUT_MIN} or more, 8 by default.",
        (int, float),
        SHUTDOWN_TIMEOUT_MIN,
    ),
    "EXPIRES": _Option(
        "a number of seconds or None",
        "EXPIRES is in seconds: 1 or more, or None, the default, for tasks that are never too old.",
        (int, float, type(None)),
        1,
    ),
    "ON_FULL": _Option(
        "a string",
        f"ON_FULL is {DROP_NEWEST!r}, the default, or {DROP_OLDEST!r}.",
        (str,),
        choices=(DROP_NEWEST, DROP_OLDEST),
    ),
    "RETRIES": _Option(
        "a whole number",
        "RETRIES is how many times a failed task is retried: 0 by default.",
        (int,),
        0,
    ),
    "RETRY_DELAY": _Option(
        "a number of seconds",
        "RETRY_DELAY is in seconds: 0 or more, 1.0 by default.",
        (int, float),
        0,
    ),
    "HANDOFF_TO": _Option(
        "the name of an alias in TASKS or None",
        "HANDOFF_TO is the alias in TASKS of a durable engine, or None, the default.",
        (str, type(None)),
    ),
    "HANDOFF_WHEN": _Option(
        "a string",
        f"HANDOFF_WHEN is {OVERFLOW!r}, the default, or {ALWAYS!r}.",
        (str,),
        choices=(OVERFLOW, ALWAYS),
    ),
    "MODE": _Option(
        "a string",
        f"MODE is {POOL!r}, the default, or {INLINE!r}, which runs tasks in the code that spawns them.",
        (str,),
        choices=(POOL, INLINE),
    ),
}
