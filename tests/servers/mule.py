"""What runs in a mule or a spooler of uWSGI: a task, and the wait for it that is the only one."""

import os
import time

import django

django.setup()

import bgtasks  # noqa: E402  # after the setup

assert bgtasks.spawn("mule", os.write, 2, b"the task is done\n")
assert bgtasks.drain()
os.write(2, b"the message is worked off\n")

while "MULE" in os.environ:  # a mule that returns is started again
    time.sleep(0.1)
