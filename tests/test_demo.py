"""The demo site: `manage.py demo`, as a user runs it, with everything it starts."""

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.gate import BOUND
from tests.processes import Server, free_port, run_python

MANAGE = Path(__file__).parent.parent / "manage.py"
ENV = {"DJANGO_SETTINGS_MODULE": "demo_project.settings"}


def demo(port: int, data_dir: Path, *options: str) -> Server:
    """Return `manage.py demo`, with tasks and visitors that leave the machine to the other tests."""
    argv = [sys.executable, str(MANAGE), "demo", f"--port={port}", f"--data-dir={data_dir}"]
    return Server(
        [*argv, "--task-seconds=0.05", "--rate=5", "--pool-timeout=30", *options],
        port=port,
        line="Guestlist is open",
        env=ENV,
        bound=3 * BOUND,
    )


@pytest.fixture
def browser() -> Iterator[Any]:
    """A browser without pictures: it keeps its cookies and follows redirects."""
    patience = 2 * BOUND  # the demo's PostgreSQL, unlike that of the tests, waits for a busy disk
    with httpx.Client(follow_redirects=True, timeout=patience) as client:
        yield client


def post(browser: httpx.Client, form: str, action: str, **data: str) -> httpx.Response:
    """Open the page of a form and send the form off."""
    browser.get(form).raise_for_status()
    token = browser.cookies["csrftoken"]
    return browser.post(action, data=data, headers={"X-CSRFToken": token}).raise_for_status()


def live(browser: httpx.Client, url: str, condition: Callable[[Any], object]) -> Any:
    """Return the live figures once they meet the condition."""
    figures: Any = None
    deadline = time.monotonic() + 3 * BOUND
    while time.monotonic() < deadline:
        figures = browser.get(f"{url}/live/").raise_for_status().json()
        if condition(figures):
            return figures
        time.sleep(0.05)  # the site has no way to call us
    raise AssertionError(f"the figures did not become as expected: {figures}")


def test_demo_serves_the_site_and_leaves_nothing_behind(data_dir: Path, browser: Any) -> None:
    """One command starts the site with its database, mails and visitors; SIGTERM ends all of it."""
    port = free_port()
    with demo(port, data_dir) as server:
        processes = psutil.Process(server.pid).children(recursive=True)
        page = browser.get(server.url)
        for name in ("sign-up/", "sign-up/async/"):
            url = f"{server.url}/{name}"
            assert post(browser, url, url, name=name, email="ada@example.com").url.path == "/members/"

        def told(figures: Any) -> bool:
            """Tell whether all is over: a task counts once its slot is free, which is after its mail."""
            ended = figures["mails"] == figures["tasks"]["succeeded"] == 2
            return ended and bool(figures["samples"])

        figures = live(browser, server.url, told)
        members = browser.get(f"{server.url}/members/").text
        status = server.stop()

    assert page.status_code == 200
    assert "bgtasks.spawn(" in page.text
    assert figures["tasks"]["succeeded"] == 2
    assert figures["failed"] == 0
    assert figures["pool"]["size"] == 25
    assert members.count("delivered in") == 2
    assert status == 0
    assert len(processes) == 3  # the mail server, uvicorn, the probe
    assert not [process for process in processes if process.is_running()]
    assert not (data_dir / "postgres" / "postmaster.pid").exists()


def test_demo_works_off_a_burst_of_each_means_on_sqlite(tmp_path: Path, browser: Any) -> None:
    """Without PostgreSQL the demo says so, and works all the same."""
    port = free_port()
    with demo(port, tmp_path, "--sqlite") as server:
        for how in ("thread", "executor", "executor-8", "bgtasks", "fresh", "stale"):
            post(browser, server.url, f"{server.url}/bursts/", how=how, count="5")
        figures = live(
            browser,
            server.url,
            lambda figures: len(figures["bursts"]) == 6 and all(each["ended"] for each in figures["bursts"]),
        )

        assert server.stop() == 0

    assert [each["done"] for each in figures["bursts"]] == [5, 5, 5, 5, 5, 5]
    assert figures["pool"] is None
    assert "Running on SQLite because of --sqlite" in server.output


def test_demo_sheds_the_mails_of_a_fresh_burst_that_are_too_old(tmp_path: Path, browser: Any) -> None:
    """Of twice what can be sent in ten seconds some is shed, and every burst is told of its own."""
    with demo(free_port(), tmp_path, "--sqlite", "--pool-size=3", "--task-seconds=1") as server:
        (twice,) = re.findall(r'value="(\d+)">Sign up', browser.get(server.url).text)
        bursts = [
            post(browser, server.url, f"{server.url}/bursts/", how="fresh", count=count).json()["key"]
            for count in (twice, "3")
        ]

        def accounts() -> list[Any]:
            return [browser.get(f"{server.url}/bursts/{key}/").raise_for_status().json() for key in bursts]

        live(browser, server.url, lambda _: all(each["ended"] for each in accounts()))
        first, second = accounts()
        figures = live(browser, server.url, lambda _: True)
        server.stop()

    assert twice == "20"
    assert first["done"] > 0
    assert first["shed"] > 0
    assert first["done"] == first["rows"]
    assert [each["done"] + each["shed"] for each in (first, second)] == [20, 3]
    assert first["shed"] + second["shed"] == figures["tasks"]["shed"]
    assert 0 < first["oldest"] <= first["ended"] - first["started"]


def test_demo_shows_its_background_tasks_in_the_admin_and_in_a_terminal(tmp_path: Path, browser: Any) -> None:
    """Who started it logs in with the password that was printed; another process sees the same figures."""
    with demo(free_port(), tmp_path, "--sqlite") as server:
        page = f"{server.url}/admin/bgtasks/backgroundtasks/"
        password = re.findall(r"as staff with the password (\S+)", server.output)[0]
        browser.get(page)

        def log_in(name: str, password: str) -> httpx.Response:
            return post(
                browser, page, f"{server.url}/admin/login/?next={page}", username=name, password=password
            )

        refused = [log_in(*pair).url.path for pair in (("staff", ""), ("staff", "x"), ("ada", password))]
        admitted = log_in("staff", password)
        post(browser, server.url, f"{server.url}/bursts/", how="bgtasks", count="3")
        live(browser, server.url, lambda figures: figures["tasks"]["succeeded"] == 3)
        rows = browser.get(f"{page}data/").json()["pools"][0]["names"]
        guests = browser.get(f"{server.url}/admin/demo_project/member/?q=guest").text
        deadline = time.monotonic() + 3 * BOUND
        told = ""
        while "welcome  3" not in told and time.monotonic() < deadline:
            told = run_python(MANAGE, "bgtasks", env=ENV | {"DEMO_DATA_DIR": str(tmp_path)}).stdout

        assert server.stop() == 0

    assert set(refused) == {"/admin/login/"}
    assert "Background tasks" in admitted.text
    assert admitted.url.path == "/admin/bgtasks/backgroundtasks/"
    assert [(task["name"], task["spawned"]) for task in rows] == [("welcome", 3)]
    assert "Guest 3" in guests
    assert "welcome  3" in told


@pytest.mark.parametrize("password", ["", None])
def test_nobody_is_staff_where_no_password_was_made_up(password: Any) -> None:
    """A site that `manage.py demo` has not started lets nobody into its admin."""
    code = f"""
import django
django.setup()
from demo_project.auth import STAFF, PasswordOfTheDay
print(PasswordOfTheDay().authenticate(None, STAFF, {password!r}))
"""
    result = run_python(code, env=ENV | {"PYTHONSAFEPATH": "1", "DEMO_PASSWORD": ""})

    assert result.stdout == "None\n", result.stderr


def test_demo_on_a_busy_port_says_so(tmp_path: Path) -> None:
    """A port that is taken is an error before anything is started."""
    with Server([sys.executable, "-m", "http.server", "--bind=127.0.0.1", "0"], line="Serving HTTP") as other:
        port = other.output.partition(" port ")[2].split()[0]
        result = run_python(MANAGE, "demo", f"--port={port}", f"--data-dir={tmp_path}", env=ENV)

    assert result.returncode == 1
    assert f"port {port} is not free" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.servers
def test_demo_that_is_killed_takes_its_processes_along(tmp_path: Path) -> None:
    """What the demo started ends by itself if the demo cannot end it."""
    with demo(free_port(), tmp_path, "--sqlite") as server:
        processes = psutil.Process(server.pid).children(recursive=True)
        server.stop(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=BOUND)

    assert len(processes) == 3
    assert not alive


def test_probe_needs_its_token(tmp_path: Path, browser: Any) -> None:
    """Nobody but the probe of the same command can feed figures to the dashboard."""
    port = free_port()
    with demo(port, tmp_path, "--sqlite") as server:
        answer = browser.post(f"{server.url}/probe/", json={"samples": [], "waiting": 0, "oldest_ms": 0})
        server.stop()

    assert answer.status_code == 403
