"""uvicorn, in a process that cannot outlive its parent: `python -m demo_project.server OPTIONS OF UVICORN`.

It is the command line of uvicorn. Beside it a thread waits for the end of standard input, and then asks for
the end.
"""

import os
import signal
import sys
import threading

import uvicorn


def end_with_input() -> None:
    """Send SIGTERM to this process when its standard input ends, as it does when the parent dies."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_with_input, daemon=True).start()
    uvicorn.main()
