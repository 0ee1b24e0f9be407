#!/bin/sh
# How many start scripts look: the shell waits for the server, and keeps signals to itself.
echo "The server starts."
"$@"
echo "The server has ended."
