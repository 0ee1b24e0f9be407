"""``manage.py bgtasks rehearse``: a deploy of the project's own server, and what it does to accepted tasks.

The command starts the server (``runner``). Each process in which Django starts finds the folder of the
rehearsal in its environment (``probes``), registers itself there, and on order keeps its pools filled with
probe tasks. The command sends the signal, waits for the end, reads the accounts (``accounts``), and says what
was lost and which line to change (``advice``, ``report``).
"""

from __future__ import annotations

ENVIRONMENT = "BGTASKS_REHEARSAL"  # the variable that holds the folder of the rehearsal
