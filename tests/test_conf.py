"""The setting BGTASKS: its defaults, and what is said of every mistake in it."""

import math
from types import MappingProxyType
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from pytest_django import Settings

import bgtasks
from bgtasks import conf
from bgtasks.checks import check_database_pools
from bgtasks.conf import PoolConfig
from bgtasks.core.drainer import START_SLOTS_AT_ONCE
from bgtasks.exceptions import InvalidSettings, PoolDoesNotExist
from tests.processes import run_python

NO_NUMBERS: list[int] = []


def problem_of(pools: Any) -> Any:
    """The one mistake in a setting."""
    (problem,) = conf.problems(pools)
    return problem


# What the options mean.


def test_defaults_are_those_of_the_readme() -> None:
    """A pool without options has the documented ones."""
    assert PoolConfig() == PoolConfig(capacity=1024, conn_max=8, task_timeout=None, shutdown_timeout=8)


@pytest.mark.parametrize("pools", [{}, {"default": {}}])
def test_pool_without_options_has_the_defaults(settings: Settings, pools: Any) -> None:
    """An empty entry is a pool like any other."""
    settings.BGTASKS = pools

    assert conf.pool_config("default") == PoolConfig()


def test_default_pool_exists_without_the_setting() -> None:
    """A project that has no BGTASKS at all, as these tests', has the default pool."""
    assert not hasattr(django_settings, "BGTASKS")
    assert conf.pool_names() == ["default"]
    assert conf.pool_config("default") == PoolConfig()
    assert list(conf.problems(conf.configured())) == []


def test_default_pool_is_added_to_the_others(settings: Settings) -> None:
    """The default pool exists even if BGTASKS only mentions others."""
    settings.BGTASKS = {"email": {"CONN_MAX": 4}}

    assert sorted(conf.pool_names()) == ["default", "email"]
    assert sorted(bgtasks.pools) == ["default", "email"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("CAPACITY", 1),
        ("CAPACITY", 10**6),
        ("CONN_MAX", 1),
        ("TASK_TIMEOUT", None),
        ("TASK_TIMEOUT", 1),
        ("TASK_TIMEOUT", 2.5),
        ("SHUTDOWN_TIMEOUT", 1),
        ("SHUTDOWN_TIMEOUT", 2.5),
    ],
)
def test_option_is_what_the_setting_says(settings: Settings, key: str, value: Any) -> None:
    """The value of every option arrives, the least one that is allowed too."""
    settings.BGTASKS = {"email": {key: value}}

    assert conf.pool_config("email") == PoolConfig(**{key.lower(): value})
    assert list(conf.problems(conf.configured())) == []


def test_pool_that_is_not_defined_has_no_options(settings: Settings) -> None:
    """A name that BGTASKS does not define is no pool."""
    settings.BGTASKS = {"email": {}}

    assert conf.pool_config("mial") is None
    with pytest.raises(PoolDoesNotExist, match="no pool named 'mial'; BGTASKS defines: 'default', 'email'"):
        bgtasks.pools["mial"]


def test_setting_may_be_any_mapping(settings: Settings) -> None:
    """What behaves like a dictionary is taken for one."""
    settings.BGTASKS = MappingProxyType({"email": MappingProxyType({"CONN_MAX": 3})})

    assert conf.pool_config("email").conn_max == 3
    assert sorted(conf.pool_names()) == ["default", "email"]


def test_overridden_setting_makes_new_pools(settings: Settings) -> None:
    """Under override_settings the pools have the options of the moment."""
    settings.BGTASKS = {"default": {"CAPACITY": 7, "CONN_MAX": 2}}

    assert repr(bgtasks.pools.default.stats()).startswith("PoolStats(capacity=7, conn_max=2,")


def test_setting_is_checked_once_however_many_pools_there_are(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start looks at each pool's options once. Once for each pair of pools took seconds with a thousand."""
    settings.BGTASKS = {str(number): {"CONN_MAX": 1} for number in range(50)}
    looked_at: list[str] = []
    problems = conf._pool_problems

    def look(pool: str, options: Any) -> Any:
        looked_at.append(pool)
        return problems(pool, options)

    monkeypatch.setattr(conf, "_pool_problems", look)
    for pool in bgtasks.pools.values():
        pool.build()
    assert bgtasks.stats().keys() == settings.BGTASKS.keys() | {"default"}
    check_database_pools()
    bgtasks.pools["7"].spawn("counted", int)

    assert sorted(looked_at) == sorted(2 * [*bgtasks.pools])  # once by the pools, and once by the check


def test_setting_that_was_changed_in_place_is_read_at_a_restart(settings: Settings) -> None:
    """The dictionary is the same one, but the pools are to be new ones."""
    settings.BGTASKS = {"default": {"CAPACITY": 7}}
    bgtasks.stats()
    settings.BGTASKS["default"]["CAPACITY"] = 8
    bgtasks.pools.restart()

    assert bgtasks.stats()["default"].capacity == 8


def test_override_of_another_setting_leaves_the_pools_alone(settings: Settings) -> None:
    """Only BGTASKS makes new pools: tasks that wait are not given up because a test overrides DEBUG."""
    before = bgtasks.pools.default.stats().spawned
    bgtasks.spawn("counted", int)
    settings.DEBUG = not settings.DEBUG

    assert bgtasks.pools.default.stats().spawned == before + 1


# Mistakes.

NUMBERS = {
    "CAPACITY": (
        "a whole number",
        "CAPACITY is the number of tasks that may wait: 1 or more, 1024 by default.",
    ),
    "CONN_MAX": (
        "a whole number",
        "CONN_MAX is the number of tasks that may run at once: 1 or more, 8 by default.",
    ),
    "TASK_TIMEOUT": (
        "a number of seconds or None",
        "TASK_TIMEOUT is in seconds: 1 or more, or None, the default, for no limit.",
    ),
    "SHUTDOWN_TIMEOUT": (
        "a number of seconds",
        "SHUTDOWN_TIMEOUT is in seconds: 1 or more, 8 by default.",
    ),
}


@pytest.mark.parametrize("pools", [None, [], ["default"], "default", 8])
def test_setting_that_is_no_dictionary(pools: Any) -> None:
    """E001 shows what BGTASKS is, and how to write it."""
    problem = problem_of(pools)

    assert problem.id == "bgtasks.E001"
    assert problem.message == f"BGTASKS is {pools!r}, not a dictionary of pools."
    assert problem.hint == 'Write BGTASKS = {"default": {"CAPACITY": 1024, "CONN_MAX": 8}}.'


@pytest.mark.parametrize("name", [None, "", 1, b"email", ("email",), "half \ud800"])
def test_name_that_is_no_name(name: str) -> None:
    """E002 shows the name."""
    problem = problem_of({name: {}})

    assert problem.id == "bgtasks.E002"
    assert problem.message == f"BGTASKS has the pool name {name!r}, which is not a non-empty Unicode string."
    assert problem.hint == 'Name the pool by a string, such as "email".'


@pytest.mark.parametrize("options", [None, [], 8, "CONN_MAX"])
def test_options_that_are_no_dictionary(options: Any) -> None:
    """E003 names the pool and shows its options."""
    problem = problem_of({"email": options})

    assert problem.id == "bgtasks.E003"
    assert problem.message == f"BGTASKS['email'] is {options!r}, not a dictionary of options."
    assert problem.hint == "Write {} for a pool with the default options."


@pytest.mark.parametrize("key", ["CONN_MX", "conn_max", "Conn_Max", "CONNMAX", "MAX_CONN_MAX"])
def test_unknown_option_that_resembles_one(key: str) -> None:
    """E004 names the pool and the key, and asks whether the option that resembles it was meant."""
    problem = problem_of({"email": {key: 8}})

    assert problem.id == "bgtasks.E004"
    assert problem.message == f"BGTASKS['email'][{key!r}] is not an option of a pool."
    assert problem.hint == "Did you mean 'CONN_MAX'?"


@pytest.mark.parametrize("key", ["ENGINE", "", 5, None, ("pool",)])
def test_unknown_option_that_resembles_none(key: str) -> None:
    """E004 lists all options if the key resembles none."""
    problem = problem_of({"email": {key: 8}})

    assert problem.id == "bgtasks.E004"
    assert problem.message == f"BGTASKS['email'][{key!r}] is not an option of a pool."
    assert problem.hint == f"The options are {', '.join(map(repr, conf._OPTIONS))}."


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            (key, value)
            for key in ("CAPACITY", "CONN_MAX")
            for value in (True, "8", 8.0, 1.5, None, NO_NUMBERS, math.nan, math.inf)
        ],
        *[("TASK_TIMEOUT", value) for value in (True, False, "8", math.nan, math.inf, -math.inf, NO_NUMBERS)],
        *[("SHUTDOWN_TIMEOUT", value) for value in (True, False, "8", None, math.nan, math.inf, NO_NUMBERS)],
    ],
)
def test_value_of_a_wrong_type(key: str, value: Any) -> None:
    """E005 names the pool and the key, shows the value, and says what is expected. A bool is no number."""
    expected, hint = NUMBERS[key]
    problem = problem_of({"email": {key: value}})

    assert problem.id == "bgtasks.E005"
    assert problem.message == f"BGTASKS['email'][{key!r}] is {value!r}, which is not {expected}."
    assert problem.hint == hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, value) for key in NUMBERS for value in (0, -1)],
        *[(key, value) for key in ("TASK_TIMEOUT", "SHUTDOWN_TIMEOUT") for value in (0.0, 0.99, -0.5)],
    ],
)
def test_value_that_is_too_small(key: str, value: Any) -> None:
    """E006 names the pool and the key, and shows the value and the least one. Zero is not "unlimited"."""
    _, hint = NUMBERS[key]
    problem = problem_of({"email": {key: value}})

    assert problem.id == "bgtasks.E006"
    assert problem.message == f"BGTASKS['email'][{key!r}] is {value!r}, which is less than 1."
    assert problem.hint == hint


def test_every_mistake_is_found() -> None:
    """One mistake does not hide another, in the same pool or the next."""
    pools = {"a": {"CAPACITY": 0, "CONN_MX": 8, "CONN_MAX": "8"}, "b": [], 3: {}}

    assert [problem.id[-4:] for problem in conf.problems(pools)] == ["E006", "E004", "E005", "E003", "E002"]


# What a mistake does outside of the checks.


@pytest.mark.parametrize(
    "use",
    [
        lambda: bgtasks.spawn("any", int),
        lambda: bgtasks.pools["default"],
        bgtasks.stats,
        lambda: len(bgtasks.pools),
    ],
    ids=["spawn", "getitem", "stats", "len"],
)
def test_using_a_pool_shows_the_mistake(settings: Settings, use: Any) -> None:
    """With a mistake in BGTASKS the first use says which one, what to do, and its id."""
    settings.BGTASKS = {"default": {"CONN_MX": 4}}

    with pytest.raises(InvalidSettings) as caught:
        use()

    assert isinstance(caught.value, ImproperlyConfigured)
    assert str(caught.value) == (
        "BGTASKS['default']['CONN_MX'] is not an option of a pool. Did you mean 'CONN_MAX'? (bgtasks.E004)"
    )


def test_mistake_does_not_keep_django_from_starting() -> None:
    """Django starts, so that "manage.py check" can show the mistake, with its hint, and no traceback."""
    done = run_python(
        "import sys\n"
        "from django.conf import settings\n"
        "settings.configure(INSTALLED_APPS=['bgtasks'], BGTASKS={'default': {'CAPACITY': 0}})\n"
        "from django.core.management import execute_from_command_line\n"
        "execute_from_command_line(['manage.py', 'check'])\n"
    )

    assert done.returncode == 1
    assert "(bgtasks.E006) BGTASKS['default']['CAPACITY'] is 0, which is less than 1." in done.stderr
    assert "HINT: CAPACITY is the number of tasks that may wait" in done.stderr
    assert "Traceback" not in done.stderr


def test_drainer_starts_with_django() -> None:
    """Without a mistake its thread is there as soon as Django is; slots have theirs with the first task."""
    done = run_python(
        "import threading\n"
        "import django\n"
        "from django.conf import settings\n"
        "settings.configure(INSTALLED_APPS=['bgtasks'], BGTASKS={'default': {'CONN_MAX': 2}})\n"
        "django.setup()\n"
        "print(*sorted(thread.name for thread in threading.enumerate()))\n"
        "import bgtasks\n"
        "assert bgtasks.spawn('task', print) and bgtasks.drain()\n"
        "print(*sorted({thread.name for thread in threading.enumerate() if thread.name[-1].isdigit()}))\n"
    )

    assert done.stderr == ""
    slots = "bgtasks-default-1 bgtasks-default-2"
    first = f"MainThread {slots} bgtasks-drainer" if START_SLOTS_AT_ONCE else "MainThread bgtasks-drainer"
    assert done.stdout.split("\n") == [first, "", slots, ""]


def test_start_imports_only_what_it_uses() -> None:
    """What hands off, what the admin page shows and Django's database cache wait until they are needed."""
    done = run_python(
        "import sys, django\n"
        "from django.conf import settings\n"
        "apps = ['django.contrib.admin', 'django.contrib.auth', 'django.contrib.contenttypes', 'bgtasks']\n"
        "settings.configure(INSTALLED_APPS=apps)\n"
        "django.setup()\n"
        "import bgtasks\n"
        "assert bgtasks.spawn('task', print, 'ran') and bgtasks.drain()\n"
        "later = ['bgtasks.handoff', 'bgtasks.monitoring.overview', 'django.core.cache.backends.db']\n"
        "print('bgtasks.admin' in sys.modules, [name for name in later if name in sys.modules])\n"
    )

    assert (done.stdout, done.stderr) == ("ran\nTrue []\n", "")
