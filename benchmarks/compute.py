"""What does a burst of tasks that compute do to the requests of a site?

As in ``burst.py``, but 4,000 tasks that compute for 2 ms each, in pure Python. Whatever runs them shares the
GIL with the requests. How soon they are done is in the last column: that is what the requests' time costs.
"""

from benchmarks.burst import Scenario, main
from benchmarks.measure import set_up

QUESTION = "What does a burst of tasks that compute do to the requests of a site?"
SCENARIOS = [
    Scenario("uvicorn", "cpu", 4000, ["bgtasks", "executor-8", "tasks-local", "create-task"]),
    Scenario("gunicorn gthread", "cpu", 4000, ["bgtasks", "executor-8", "tasks-local"]),
]

if __name__ == "__main__":
    set_up()
    main(QUESTION, SCENARIOS)
