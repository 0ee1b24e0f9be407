"""The demo site: its two commands, as a user runs them, with everything they start."""

import json
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
        for how in ("thread", "executor", "bgtasks"):
            post(browser, server.url, f"{server.url}/bursts/", how=how, count="5")
        figures = live(
            browser,
            server.url,
            lambda figures: len(figures["bursts"]) == 3 and all(each["ended"] for each in figures["bursts"]),
        )

        assert server.stop() == 0

    assert [each["done"] for each in figures["bursts"]] == [5, 5, 5]
    assert figures["pool"] is None
    assert "Running on SQLite because of --sqlite" in server.output


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


SITE_THAT_STARVES = """
import django, http.server, json, threading, time, uuid
django.setup()
from demo_project import comparison, processes
from demo_project.comparison import Client, Comparison, Plan, UnansweredError

statuses = [200, 500, 503, 200, 500]  # of what is asked for, the last one from then on

class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        self.end_headers()
        self.wfile.write(json.dumps({"rows": 7}).encode())

    def log_message(self, *args):
        pass

with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server, processes.Stop() as stop:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    plan = Plan(processes.Scenario(), burst=1, rounds=1, idle=0.1, warm_up=0)
    ticks = []
    run = Comparison(plan, stop, lambda text, seconds: ticks.append(text))
    client = Client(f"http://127.0.0.1:{server.server_port}/")
    print(run._account("round 1", client, uuid.uuid4()), ticks)
    run._pass("idle", 0.1, client)
    ticks.clear()
    print(run._wait("round 1", client, uuid.uuid4(), time.time() + 0.1), ticks)
    comparison.PATIENCE = 0
    try:
        run._account("round 1", client, key := uuid.uuid4())
    except UnansweredError as error:
        print(str(error).replace(str(key), "KEY"))
    server.shutdown()
"""


def test_compare_goes_on_where_the_site_starves() -> None:
    """A site without a connection for the one who asks is what is measured, and no reason to stop."""
    result = run_python(SITE_THAT_STARVES, env=ENV)

    assert result.stdout.splitlines() == [
        "{'rows': 7} ['round 1', 'round 1']",
        "None ['round 1']",
        "the site did not answer /bursts/KEY/: HTTP Error 500: Internal Server Error",
    ], result.stderr


SITE_THAT_IS_DEAD = """
import django, sys
django.setup()
from django.core.management import CommandError, call_command
from demo_project.comparison import Comparison, UnansweredError

def run(self, *args):
    raise UnansweredError("the site did not answer /: timed out")

Comparison.run = run
try:
    call_command("compare", "--sqlite", "--rate=50", f"--data-dir={sys.argv[1]}")
except CommandError as error:
    print(str(error).replace(sys.argv[1], "DIR"))
"""


def test_compare_says_what_to_try_if_the_site_never_answers(tmp_path: Path) -> None:
    """Without figures there is a sentence in place of a traceback."""
    result = run_python(SITE_THAT_IS_DEAD, str(tmp_path), env=ENV)

    assert result.stdout == (
        "the site did not answer /: timed out. If this machine is too slow for 50 visits a second, try "
        "--rate 25; what the site printed is in DIR/compare.log\n"
    ), result.stderr


VERDICTS = """
import django
django.setup()
from demo_project import processes
from demo_project.comparison import Comparison, Plan, Verdict
from demo_project.figures import Summary

def note(*rounds):
    plan = Plan(processes.Scenario(rate=60.0), burst=1, rounds=len(rounds), idle=15, warm_up=0)
    run = Comparison(plan, None, None)
    for line in (run.idle, *run.means.values()):
        line.rounds += [Summary(900, failed, p50, p99, p99) for failed, p50, p99 in rounds]
    return Verdict.of(run).note

print(repr(note((0, 5.0, 9.0), (0, 5.0, 17.0))))
print(note((0, 5.0, 9.0), (0, 5.0, 19.0)))
print(note((0, 52.0, 377.0)))
print(note((3, 15.0, 30.0)))
"""


def test_compare_says_what_speaks_against_its_figures() -> None:
    """A machine that is busy with other things, or too slow for so many visits, is told of."""
    result = run_python(VERDICTS, env=ENV)

    none, restless, slow, failing = result.stdout.splitlines()
    assert none == "''"
    assert restless.startswith("without a burst the p99 was 9.0 ms in one round and 19.0 ms in another: this")
    assert slow == (
        "without a burst 3.1 of the 60 visits a second were in the site at once, and 0 failed: that is too "
        "many for this machine, so try --rate 30"
    )
    assert failing.startswith(
        "without a burst 0.9 of the 60 visits a second were in the site at once, and 3 "
    )


@pytest.mark.servers
def test_compare_measures_all_contenders(data_dir: Path) -> None:
    """The comparison prints what it measured, loses no task of bgtasks, and exits by its promise."""
    small = ["--burst=40", "--rounds=1", "--seconds=2", "--task-seconds=0.05", "--json"]
    small += ["--rate=30", "--pool-timeout=30"]  # for a machine that is busy with other things
    result = run_python(MANAGE, "compare", *small, f"--data-dir={data_dir}", env=ENV, timeout=170)
    report = json.loads(result.stdout)

    assert list(report["results"]) == ["idle", "thread", "executor", "bgtasks"]
    assert all(
        line["requests"] > 0 and 0 < line["p50_ms"] <= line["p99_ms"] for line in report["results"].values()
    )
    assert [line["tasks"] for line in report["results"].values()] == [0, 40, 40, 40]
    assert report["results"]["bgtasks"]["failed_requests"] == report["results"]["bgtasks"]["lost_tasks"] == 0
    assert report["promise_kept"] is not bool(report["broken"])
    assert result.returncode == (0 if report["promise_kept"] else 1)
