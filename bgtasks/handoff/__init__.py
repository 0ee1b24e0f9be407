"""Handing tasks off: waiting tasks that can travel become tasks of a durable engine, an alias in TASKS.

::

    queue ──check_out──► mover ──send──► engine     HANDOFF_WHEN "overflow": the newest tasks of a full queue
      ▲                    │                        HANDOFF_WHEN "always": every task, as it is put
      └──────put_back──────┘

    mover    takes tasks out of the queue, and decides what happens to each
    engine   in which form a task travels, and how the engine gets it
    payload  what can travel, and how a worker runs it
    slots    the slots of a pool that hands off: one of them is the mover

Only a pool with HANDOFF_TO imports these modules, and ``bgtasks.tasks``.
"""
