"""The page in the admin, as a real browser shows it: two gunicorn workers under load, a strict policy.

Chromium is the system's own; nothing is downloaded. BGTASKS_SCREENSHOTS names a directory for the pictures of
the documentation.
"""

import os
import re
import secrets
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, time
from typing import Any

import httpx
import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from pytest_django import Settings

from bgtasks import conf
from bgtasks.recent import LAST
from tests.gate import BOUND
from tests.monitoring.test_journal import leave
from tests.processes import Server, free_port, program
from tests.site.urls import LOCK
from tests.test_demo import demo

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.browser]

PAGE = "/admin/bgtasks/backgroundtasks/"
MS = 1000 * BOUND  # the bound of a wait, in milliseconds
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class Site(Server):
    """The site under gunicorn with two workers, and what they have answered."""

    def __init__(self, directory: Path) -> None:
        port = free_port()
        config = Path(__file__).parent / "site" / "gunicorn_conf.py"
        argv = [
            str(Path(sys.executable).parent / "gunicorn"),
            "-b",
            f"127.0.0.1:{port}",
            "-w",
            "2",
            "-c",
            str(config),
        ]
        env = {
            "DJANGO_SETTINGS_MODULE": "tests.browser.settings",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        super().__init__(
            [*argv, "--threads", "4", "--no-control-socket", "tests.site.wsgi:application"],
            port=port,
            env=env,
            cwd=directory,
        )

    def spawn(self, what: str, count: int, *, workers: int = 1, pool: str = "default") -> set[int]:
        """Have each of so many workers spawn `count` tasks; return their process ids."""
        pids: set[Any] = set()
        url, call = f"{self.url}/spawn/{pool}/{what}/{count}/", secrets.token_hex(8)
        while len(pids) < workers:
            # A connection each, so that it is not always the same worker that answers.
            pids.add(httpx.get(url, params={"call": call}, timeout=BOUND).json()["pid"])
        return pids


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = program("chromium", "chromium-browser", "google-chrome")
    with pytest.MonkeyPatch.context() as patch, sync_playwright() as playwright:
        # Playwright's blocking interface has an event loop on this thread, where Django would refuse to work.
        patch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def site(tmp_path: Path, settings: Settings) -> Iterator[Site]:
    with Site(tmp_path) as site:
        site.wait_line("worker is ready", 2)
        yield site
        site.stop()


@pytest.fixture
def held() -> Iterator[None]:
    """Hold the lock that the tasks called "held-task" wait for."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", [LOCK])
        yield
        cursor.execute("SELECT pg_advisory_unlock_all()")


@pytest.fixture
def visitor(chromium: Any, site: Any) -> Iterator[Any]:
    """Return a function that logs a user in and opens the page; nothing may go wrong in the browser."""
    said: list[str] = []
    contexts = []

    def visit(*codenames: str, superuser: bool = False, path: str = PAGE, **options: Any) -> Any:
        user = User.objects.create_user("ada", password="pw", is_staff=True, is_superuser=superuser)
        user.user_permissions.set(Permission.objects.filter(codename__in=codenames))
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(MS)
        page.on(
            "console",
            lambda message: said.append(message.text) if message.type in {"error", "warning"} else None,
        )
        page.on("pageerror", lambda error: said.append(str(error)))
        page.asked = set()
        page.on("framenavigated", lambda _: page.asked.clear())  # nobody waits for those any more
        page.on("request", lambda request: page.asked.add(request.url))
        for end in ("requestfinished", "requestfailed"):
            page.on(end, lambda request: page.asked.discard(request.url))
        page.goto(f"{site.url}/admin/login/?next={path}")
        page.fill("#id_username", "ada")
        page.fill("#id_password", "pw")
        with page.expect_navigation():
            page.click("[type=submit]")
        page.said = said
        return page

    yield visit
    for context in contexts:
        context.close()


def wait(page: Any, expression: str, *args: Any) -> None:
    """Wait until a JavaScript expression is true. Playwright's own way needs `eval`, which is forbidden."""
    deadline = monotonic() + BOUND
    while not page.evaluate(expression, *args):
        assert monotonic() < deadline, page.locator("#content-main").inner_text()
        page.wait_for_timeout(50)


def settle(page: Any) -> None:
    """Wait until the page shows the answer to whatever it has asked for."""
    deadline = monotonic() + BOUND
    while page.asked:
        assert monotonic() < deadline, page.asked
        page.wait_for_timeout(50)
    # An answer that has come may not be shown yet. One that is asked for now comes after it.
    page.evaluate("url => fetch(url).then(() => true)", "/static/bgtasks/admin.js")


# The paths of the machine that takes a picture, and what a site would have there.
PLACES = {
    sysconfig.get_path("purelib"): "/srv/shop/.venv/lib/python3.13/site-packages",
    sysconfig.get_path("stdlib"): "/usr/lib/python3.13",
    str(Path(__file__).parent.parent): "/srv/shop",
}
RENAME = """places => {
    const moves = Object.entries(places).filter(([here, there]) => !there.includes(here));
    const rename = () => {
        const nodes = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (nodes.nextNode())
            for (const [here, there] of moves)
                if (nodes.currentNode.data.includes(here))
                    nodes.currentNode.data = nodes.currentNode.data.replaceAll(here, there);
    };
    const everything = {childList: true, subtree: true, characterData: true};
    new MutationObserver(rename).observe(document.body, everything);
    rename();
}"""


def picture(page: Any, name: str) -> None:
    """Keep a picture for the documentation, if a directory for it is given."""
    if directory := os.environ.get(
        "BGTASKS_SCREENSHOTS"
    ):  # pragma: no cover  # only for whoever asks for them
        page.evaluate("scrollTo(0, 0)")  # or the sidebar, which sticks, is somewhere in the middle
        page.wait_for_timeout(1500)
        page.evaluate(RENAME, PLACES)
        (Path(directory) / f"{name}.png").write_bytes(page.screenshot(full_page=True))


def faults(page: Any) -> list[str]:
    """Return what axe-core finds on the page that is serious or worse."""
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(page)
    return [
        f"{fault['id']}: {node['html'][:200]}"
        for fault in results.response["violations"]
        if fault["impact"] in {"serious", "critical"}
        for node in fault["nodes"]
    ]


def load(site: Site) -> None:
    """Have both workers run, queue, drop and fail something."""
    site.spawn("done", 20, workers=2)
    site.spawn("fail", 2, workers=2)
    site.spawn("held", 30, workers=2)
    for _ in range(4):
        site.spawn("held", 20, workers=2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", {"color_scheme": "light"}),
        ("dark", {"color_scheme": "dark"}),
        ("narrow", {"color_scheme": "light", "viewport": {"width": 375, "height": 812}}),
    ],
)
def test_page_shows_both_workers_under_load(
    name: str, options: Any, site: Any, visitor: Callable[..., Any], held: Any
) -> None:
    """Two processes appear together, and the page has no fault, whatever the theme and the width."""
    site.spawn("done", 40, workers=2)
    site.spawn("fail", 2, workers=2)
    pids = site.spawn("held", 12, workers=2)
    page = visitor("view_background_tasks", "pause_pools", **options)

    rows = page.locator("#bt-processes tbody tr", has_text="default")
    failure = page.locator(".bt-failure")
    wait(page, "parseInt(document.querySelector('.bt-times')?.innerText.slice(2)) >= 4")
    wait(
        page,
        "pids => pids.every(pid => document.querySelector('#bt-processes').innerText.includes(':' + pid))",
        list(pids),
    )
    wait(page, "document.querySelectorAll('.bt-pool .bt-now')[1].innerText.startsWith('8 of 8')")
    assert rows.count() == 2
    assert page.locator(".bt-pool", has_text="held-task").count() == 1
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    width = page.locator("#bt-processes .bt-scroll").evaluate("node => [node.scrollWidth, node.clientWidth]")
    assert width[0] <= width[1] or name == "narrow"
    assert (
        failure.locator(".bt-error").inner_text() == "ConnectionRefusedError: the mail server does not answer"
    )
    failure.locator("summary").click()
    picture(page, name)
    assert faults(page) == []
    assert page.said == []


def test_page_without_any_task(site: Any, visitor: Callable[..., Any]) -> None:
    """A site that has done nothing yet has a page that says so."""
    page = visitor("view_background_tasks")
    page.get_by_text("No task yet").first.wait_for()
    assert page.locator(".bt-pause, .bt-cancel").count() == 0
    wait(page, "document.querySelector('#bt-verdict').innerText === 'well All pools are well'")
    assert not page.locator("#bt-start").is_visible()
    picture(page, "empty")

    assert faults(page) == []
    assert page.said == []


def test_killed_process_is_listed(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The page says what a killed process has lost, once another one has told of it."""
    folder = tmp_path_factory.mktemp("journal")
    monkeypatch.setenv("BGTASKS_TEST_JOURNAL", str(folder))
    leave(folder, "lost", "lost")
    request.getfixturevalue("site")
    page = request.getfixturevalue("visitor")("view_background_tasks")
    page.get_by_text("was killed with 2 tasks: 2 'lost'").wait_for()

    assert page.locator("#bt-losses li").inner_text().endswith("web-1:41 was killed with 2 tasks: 2 'lost'")
    assert faults(page) == []
    assert page.said == []


# What the first pool has dropped, and the same for each process.
DROPPED = """[
    [...document.querySelectorAll('.bt-tile')].find(tile => tile.innerText.includes('Dropped')).lastChild,
    ...document.querySelectorAll('.bt-drops tbody tr td:nth-child(3)'),
].map(node => Number(node.innerText.replaceAll(',', '')))"""


def test_page_of_an_overloaded_site(site: Any, visitor: Callable[..., Any], held: Any) -> None:
    """Full queues, drops and failures are where one looks first."""
    load(site)
    page = visitor(superuser=True)
    page.get_by_text("queue full").first.wait_for()
    deadline = monotonic() + BOUND
    while "is full" not in page.locator("#bt-verdict").inner_text():
        assert monotonic() < deadline
        site.spawn("held", 5, workers=2)  # a slot that was late has made room in the queue
        page.wait_for_timeout(500)
    # Read at once, as the page may show the next figures at any moment.
    wait(page, f"({DROPPED}).length === 3 && ({DROPPED})[0] > {2 * LAST}")
    [all_dropped, *dropped] = page.evaluate(DROPPED)
    assert sum(dropped) == all_dropped
    picture(page, "overloaded")

    assert faults(page) == []
    assert page.said == []


def test_failure_shows_up_with_its_traceback(site: Any, visitor: Callable[..., Any]) -> None:
    """A task that fails is on the open page within 3 s, without a reload; so is its traceback.

    The clock of the page is the test's: the page looks within a second of it. What it sees is as old as a
    snapshot may be.
    """
    page = visitor("view_background_tasks")
    page.clock.install()
    page.reload()
    page.get_by_text("No task yet").first.wait_for()
    page.clock.pause_at(time() + BOUND)
    settle(page)
    site.spawn("fail", 1)
    cookies = {cookie["name"]: cookie["value"] for cookie in page.context.cookies()}
    knowing: set[int] = set()
    deadline = monotonic() + BOUND
    while len(knowing) < 2 and monotonic() < deadline:
        data = httpx.get(f"{site.url}{PAGE}data/", cookies=cookies, timeout=BOUND).json()
        [here] = [process["pid"] for process in data["processes"] if process["here"]]
        knowing |= {here for pool in data["pools"] if pool["failures"]}
    failure = page.locator(".bt-failure")
    assert failure.count() == 0
    page.clock.run_for(1000)
    failure.wait_for()
    assert conf.snapshot_config().interval + 1 < 3
    page.clock.resume()
    failure.locator("summary").click()

    text = failure.locator("pre").inner_text()
    assert "ConnectionRefusedError: the mail server does not answer" in text
    assert "in fail" in text
    assert "ada@example.com" not in page.content()
    assert "Task fail-task failed" in page.locator("#bt-news").inner_text()


def test_stuck_slot_is_shown_with_its_stack(site: Any, visitor: Callable[..., Any], held: Any) -> None:
    """A task past TASK_TIMEOUT is marked in red, and can be opened to see where it is."""
    site.spawn("held", 1, pool="strict")
    page = visitor("view_background_tasks")
    pool = page.locator(".bt-pool", has_text="strict")
    page.locator("#bt-todo li", has_text="slots are stuck past TASK_TIMEOUT").wait_for()
    row = pool.locator(".bt-running tbody tr", has_text="held-task")
    mark = row.get_by_text("stuck", exact=True)
    mark.wait_for()
    row.locator("summary").click()
    page.locator(".bt-running pre").wait_for()

    color = mark.evaluate("node => getComputedStyle(node).color")
    red, *others = map(int, re.findall(r"\d+", color)[:3])
    assert red > 1.5 * max(others), color
    assert "in pass_gate" in row.locator("pre").inner_text()
    picture(page, "stuck")
    assert faults(page) == []
    assert page.said == []


def test_open_traceback_stays_open(site: Any, visitor: Callable[..., Any]) -> None:
    """The page refreshes itself under an open traceback without closing it."""
    site.spawn("fail", 1)
    page = visitor("view_background_tasks")
    page.locator(".bt-failure summary").click()
    before = page.locator("#bt-summary").inner_text()
    wait(page, "before => document.querySelector('#bt-summary').innerText !== before", before)

    assert page.locator(".bt-failure").get_attribute("open") is not None


def test_viewer_without_the_permission_gets_403(site: Any, visitor: Callable[..., Any]) -> None:
    """Staff without the permission see nothing of it."""
    page = visitor()

    assert page.title().startswith("403")


def test_pool_is_paused_and_resumed_with_the_keyboard(site: Any, visitor: Callable[..., Any]) -> None:
    """Both workers pause, hold what is spawned, and go on, all with the keyboard."""
    site.spawn("done", 1, workers=2)
    page = visitor("view_background_tasks", "pause_pools")
    button = page.get_by_role("button", name="Pause pool default")
    button.focus()
    page.keyboard.press("Enter")
    page.get_by_role("dialog", name="Pause pool default?").wait_for()
    page.keyboard.press("Escape")
    wait(page, "document.activeElement.innerText === 'Pause pool…'")
    page.keyboard.press("Enter")
    assert faults(page) == []
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Resume pool default").wait_for()
    page.get_by_text("Paused by ada, ").wait_for()
    wait(page, "document.activeElement.innerText === 'Resume pool'")  # it is not while it is disabled
    # A worker that is idle hears of the pause with its next task.
    site.spawn("done", 1, workers=2)
    wait(
        page,
        "[...document.querySelectorAll('#bt-processes tr')]"
        ".filter(row => row.innerText.includes('default: paused')).length === 2",
    )
    site.spawn("done", 3, workers=2)
    wait(page, "parseInt(document.querySelector('.bt-now').innerText) >= 6")

    page.keyboard.press("Enter")
    wait(page, "parseInt(document.querySelector('.bt-now').innerText) === 0")
    page.get_by_role("button", name="Pause pool default").wait_for()
    wait(page, "document.querySelector('#bt-verdict').innerText === 'well All pools are well'")
    assert page.said == []


def test_waiting_tasks_are_cancelled_in_all_processes(
    site: Any, visitor: Callable[..., Any], held: Any
) -> None:
    """After a question, both workers cancel what waits under the name; what runs goes on."""
    site.spawn("held", 8, workers=2)
    page = visitor("view_background_tasks", "cancel_waiting_tasks")
    wait(page, "parseInt(document.querySelector('.bt-now')?.innerText) >= 8")
    names = page.get_by_role("region", name="Tasks of pool default by name")
    width = names.evaluate("node => [node.scrollWidth, node.clientWidth]")
    assert width[0] <= width[1]
    page.get_by_role("button", name="Cancel waiting tasks called held-task").click()
    page.get_by_role("dialog", name="Cancel the waiting tasks called held-task?").wait_for()
    picture(page, "cancel")
    assert faults(page) == []
    page.get_by_role("button", name="Cancel waiting tasks", exact=True).click()
    page.locator("#bt-answer", has_text="tasks called held-task. The others follow").wait_for()
    wait(page, "parseInt(document.querySelector('.bt-now').innerText) === 0")

    tile = page.locator(".bt-pool", has_text="Pool default").locator(".bt-tile", has_text="Cancelled")
    assert int(tile.locator("dd").inner_text()) >= 8
    assert page.get_by_role("button", name="Cancel waiting tasks called held-task").count() == 0
    assert page.said == []


def test_page_without_its_script_says_what_is_missing(site: Any, visitor: Callable[..., Any]) -> None:
    """Where static files were not collected, the page says so, and does not wait for ever."""
    page = visitor("view_background_tasks", path="/admin/")
    page.route("**/bgtasks/admin.js", lambda route: route.fulfill(status=404))
    page.goto(f"{site.url}{PAGE}")

    assert page.get_by_text("run manage.py collectstatic").is_visible()
    assert not page.locator("#bt-main").is_visible()


# What a site of many processes, pools and names answers, of which each is short of something.
ALTER = """async url => {
    const data = await (await fetch(url)).json();
    const [process] = data.processes;
    const [pool] = data.pools;
    const range = (length, of) => Array.from({length}, (_, place) => of(place));
    const name = (names, place) => ({...names[0], name: `task-${place}`, queued: place});
    return JSON.stringify({...data,
        processes: range(50, place => ({...process, id: `same:1:${place}`, host: "same", pid: 1})),
        pools: range(20, place => ({...pool, name: `pool ${place} <b>`, names_known: 270,
            names: range(20, at => name(pool.names, at))})),
        unread: [{process: "other:2:x", problem: "is not JSON"}],
    });
}"""


def test_page_of_many_processes_pools_and_names_stays_the_same(
    site: Any, visitor: Callable[..., Any]
) -> None:
    """Containers with the same host and process id add no row at each look, and no name is taken for HTML."""
    site.spawn("fail", 1)
    page = visitor("view_background_tasks")
    page.locator(".bt-failure").wait_for()
    text = page.evaluate(ALTER, f"{PAGE}data/")
    page.route("**/data/", lambda route: route.fulfill(body=text, content_type="application/json"))
    page.locator("#bt-processes tbody tr", has_text="same:1 (").nth(49).wait_for()
    rows = "document.querySelectorAll('#content-main tr, #content-main li, .bt-pool, .bt-failure').length"
    before = page.evaluate(rows)
    with page.expect_response("**/data/"), page.expect_response("**/data/"):
        pass
    settle(page)

    assert page.evaluate(rows) == before
    assert page.locator("#bt-states tbody tr").count() == 20
    assert page.locator("#bt-unread").inner_text() == "The snapshot of other:2:x is not JSON."
    page.locator("#bt-states a").nth(19).click()
    page.get_by_text("250 more names are not shown.").last.wait_for()
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    picture(page, "many")
    assert page.said == []


def test_page_can_stop_refreshing(site: Any, visitor: Callable[..., Any]) -> None:
    """Whoever is disturbed by figures that change can stop them.

    The clock of the page is the test's. A page that refreshes looks again within ten seconds of it,
    as the end of the test shows.
    """
    site.spawn("done", 1)
    page = visitor("view_background_tasks")
    page.locator(".bt-pool", has_text="done-task").wait_for()
    page.clock.install()
    page.reload()
    page.locator(".bt-pool", has_text="done-task").wait_for()
    page.get_by_role("button", name="Stop refreshing").click()
    page.get_by_role("button", name="Refresh again").wait_for()
    settle(page)
    before = page.locator("#bt-summary").inner_text()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    site.spawn("fail", 1)
    page.clock.run_for(10_000)
    # Whatever it had asked for would have been asked for before this, and is seen before its answer.
    last = f"{site.url}/static/bgtasks/admin.js?last"
    page.evaluate("url => fetch(url).then(() => true)", last)
    assert (page.locator("#bt-summary").inner_text(), requests) == (before, [last])

    page.get_by_role("button", name="Refresh again").click()
    page.clock.run_for(10_000)
    page.locator(".bt-failure").wait_for()


def test_page_says_so_when_the_site_does_not_answer(site: Any, visitor: Callable[..., Any]) -> None:
    """What is shown is old then, and the page says that it is."""
    page = visitor("view_background_tasks")
    page.get_by_text("No task yet").first.wait_for()
    page.context.set_offline(True)

    page.get_by_text("The site does not answer").wait_for()


def test_sizing_calculator_calculates(chromium: Any) -> None:
    """The calculator in the documentation answers at once, and again when a number changes.

    It lies in the page's section, whose id is made of its title.
    """
    text = (Path(__file__).parent.parent / "docs" / "sizing.md").read_text()
    calculator = text[text.index("<form") : text.index("</script>")] + "</script>"
    page = chromium.new_page()
    page.set_default_timeout(MS)
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_content(f'<section id="sizing"><h1>Sizing</h1>{calculator}</section>')
    fits = page.text_content("output")
    page.fill("[name=processes]", "40")
    does_not = page.text_content("output")
    page.close()

    assert complaints == []
    assert "takes up to 8 connections, all of them 64 during a deploy; 90 are allowed: that fits." in fits
    assert "after 30.0 s, and needs a CAPACITY of 400." in fits
    assert "all of them 640 during a deploy; 90 are allowed: too many, even with one slot." in does_not


def test_demo_shows_a_burst_fresh_or_stale(chromium: Any, tmp_path: Path) -> None:
    """The switch on the dashboard says which burst is started, and its figures are shown, on a phone too."""
    said = []
    with demo(free_port(), tmp_path, "--sqlite", "--pool-size=3", "--task-seconds=1") as site:
        page = chromium.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(MS)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(site.url)
        for how in ("fresh", "stale"):
            page.get_by_label(how, exact=True).check()
            page.get_by_role("button", name="Sign up 20", exact=True).click()
            page.locator(f".mean.{how} .result", has_text="20 at once").wait_for()
        page.locator(".mean.fresh .result", has_text="20 at once, finished after").wait_for()
        shown = dict(
            zip(
                page.locator(".mean.fresh dt").all_inner_texts(),
                page.locator(".mean.fresh dd").all_inner_texts(),
                strict=True,
            )
        )
        sent, shed = int(shown["mails sent"]), int(shown["mails too old"])
        wrong = faults(page)
        page.emulate_media(color_scheme="dark")
        wrong += faults(page)
        width = page.evaluate("document.documentElement.scrollWidth")
        page.close()
        site.stop()

    assert sent + shed == 20
    assert sent
    assert shed
    assert shown["mails lost"] == "0"
    assert re.fullmatch(r"\d+\.\d s", shown["oldest sent"])
    assert width == 390
    assert wrong == []
    assert said == []
