"""`manage.py compare` of the demo site: what it measures, and what it says of it."""

import json
from pathlib import Path

import pytest

from tests.processes import run_python

MANAGE = Path(__file__).parent.parent / "manage.py"
ENV = {"DJANGO_SETTINGS_MODULE": "demo_project.settings"}

SITE_THAT_STARVES = """
import django, http.server, json, threading, time, uuid
django.setup()
from benchmarks import comparison
from benchmarks.comparison import Client, Comparison, Plan, UnansweredError
from demo_project import processes

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
from benchmarks.comparison import Comparison, UnansweredError

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
from benchmarks.comparison import Comparison, Plan, Verdict
from demo_project import processes
from demo_project.figures import Summary
from demo_project.models import Member

STEADY = [(0, 5.0, 9.0), (0, 5.0, 10.0), (0, 5.0, 12.0)]

def judge(idle=STEADY, peer=STEADY, bgtasks=STEADY, lost=0):
    plan = Plan(processes.Scenario(rate=60.0), burst=1, rounds=len(idle), idle=15, warm_up=0)
    run = Comparison(plan, None, None)
    lines = {run.idle.label: idle, 'ThreadPoolExecutor(8)': peer, 'bgtasks': bgtasks}
    for line in (run.idle, *run.means.values()):
        rounds = lines.get(line.label, STEADY)
        line.rounds += [Summary(900, failed, p50, p99, p99) for failed, p50, p99 in rounds]
    run.means[Member.How.BGTASKS].lost = lost
    verdict = Verdict.of(run)
    print(verdict.kept, "; ".join(filter(None, [*verdict.broken, verdict.note])))

"""


def judged(*calls: str) -> list[str]:
    """Return the verdicts on figures, each as "kept reasons"."""
    result = run_python(VERDICTS + "\n".join(f"judge({call})" for call in calls), env=ENV)
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_compare_says_why_there_is_no_verdict() -> None:
    """On a machine that is busy with other things, or too slow for so many visits, nothing is judged."""
    restless, peer, slow, failing, once = judged(
        "idle=[(0, 5.0, 9.0), (0, 5.0, 19.0)]",
        "peer=[(0, 5.0, 9.0), (0, 5.0, 19.0)], bgtasks=[(7, 5.0, 90.0)]",
        "idle=[(0, 52.0, 377.0)]",
        "idle=[(3, 15.0, 30.0)]",
        "idle=[(0, 5.0, 9.0)]",
    )

    assert restless == (
        "None (no burst): the p99 was 9.0 ms in one round and 19.0 ms in another, so this machine is busy "
        "with something else; try again, or with more --rounds"
    )
    assert peer.startswith(
        "None ThreadPoolExecutor(8): the p99 was 9.0 ms in one round and 19.0 ms in another"
    )
    assert slow == (
        "None without a burst 3.1 of the 60 visits a second were in the site at once, and 0 failed: that is "
        "too many for this machine, so try --rate 30"
    )
    assert failing.startswith(
        "None without a burst 0.9 of the 60 visits a second were in the site at once, and 3 "
    )
    assert once == "None one round does not show how much rounds differ, so try --rounds 3"


def test_compare_judges_against_an_executor_of_as_many_threads() -> None:
    """The p99 may be above that of ThreadPoolExecutor(8) by the noise; no idle one counts."""
    kept, both_slow, slower, failing = judged(
        "bgtasks=[(0, 5.0, 13.0)]",
        "bgtasks=[(0, 5.0, 60.0)], peer=[(0, 5.0, 55.0)]",
        "bgtasks=[(0, 5.0, 14.0)]",
        "bgtasks=[(2, 5.0, 9.0)]",
    )

    assert kept == both_slow == "True "
    assert slower == (
        "False with bgtasks the request p99 is 1.4 x that with ThreadPoolExecutor(8), "
        "and rounds of the same differ by 1.33 x at most"
    )
    assert failing == "False with bgtasks 2 requests failed"


def test_compare_forgives_no_lost_task() -> None:
    """What bgtasks has accepted it may not lose, however noisy the machine is."""
    [lost] = judged("idle=[(0, 5.0, 9.0), (0, 5.0, 19.0)], lost=3")

    assert lost.startswith("False bgtasks lost 3 tasks that it had accepted; (no burst): the p99 was 9.0 ms")


@pytest.mark.servers
def test_compare_measures_all_contenders(data_dir: Path) -> None:
    """The comparison prints what it measured, loses no task of bgtasks, and exits by its promise."""
    small = ["--burst=40", "--rounds=1", "--seconds=2", "--task-seconds=0.05", "--json"]
    small += ["--rate=30", "--pool-timeout=30"]  # for a machine that is busy with other things
    result = run_python(MANAGE, "compare", *small, f"--data-dir={data_dir}", env=ENV, timeout=170)
    report = json.loads(result.stdout)

    assert list(report["results"]) == ["idle", "thread", "executor", "executor-8", "bgtasks"]
    assert all(
        line["requests"] > 0 and 0 < line["p50_ms"] <= line["p99_ms"] for line in report["results"].values()
    )
    assert [line["tasks"] for line in report["results"].values()] == [0, 40, 40, 40, 40]
    assert report["results"]["bgtasks"]["failed_requests"] == report["results"]["bgtasks"]["lost_tasks"] == 0
    assert report["note"]  # one round is not enough for a verdict, at the least
    assert report["promise_kept"] is (False if report["broken"] else None)
    assert result.returncode == (1 if report["broken"] else 2)
