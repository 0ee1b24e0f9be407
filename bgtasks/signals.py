"""The signals of a task's life. The sender is the pool. An exception of a receiver is logged.

``task_spawned`` and ``task_dropped`` are sent in the code that spawns, so their receivers should be quick.
``task_started`` and ``task_finished`` are sent in the task's context and on its slot's thread, so their
receivers may use the ORM; a task counts as running until they have returned. ``task_shed`` is sent where the
task is shed: in the code that spawns, or on a slot's thread.

========================  ==============================================================================
signal                    arguments
========================  ==============================================================================
``task_spawned``          ``name``
``task_dropped``          ``name``, ``reason`` (``"full"``, ``"shutdown"``, ``"no_thread"``, ``"no_loop"`` or
                          ``"propagator"``)
``task_shed``             ``name``, ``reason`` (``"expired"`` or ``"displaced"``)
``task_started``          ``name``
``task_finished``         ``name``, ``outcome`` (``"succeeded"``, ``"failed"``, ``"timed_out"``,
                          ``"cancelled"``, ``"handed_off"``), ``error`` (the exception or None)
========================  ==============================================================================
"""

from django.dispatch import Signal

task_spawned = Signal()
task_started = Signal()
task_finished = Signal()
task_dropped = Signal()
task_shed = Signal()
