"""What does one task that computes for seconds do to the requests of a site?

As in ``compute.py``, but a single task that computes for three processor seconds, in pure Python. There is no
pause between tasks that could help here: what counts is how soon the thread gives up the GIL.
"""

from benchmarks.burst import Scenario, main
from benchmarks.measure import set_up

QUESTION = "What does one task that computes for seconds do to the requests of a site?"
SCENARIOS = [
    Scenario("uvicorn", "long", 1, ["bgtasks", "executor-8"]),
    Scenario("gunicorn gthread", "long", 1, ["bgtasks", "executor-8"]),
]

if __name__ == "__main__":
    set_up()
    main(QUESTION, SCENARIOS)
