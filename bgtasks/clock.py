"""The clock of bgtasks, which goes on in a test that freezes time.

freezegun replaces ``time.monotonic`` in every module that has it under some name. A shutdown would wait for
ever, and a task would have waited since 1970. It does not find what merely calls that function.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

monotonic: Callable[[], float] = partial(time.monotonic)  # seconds; written in C, as a function is not
