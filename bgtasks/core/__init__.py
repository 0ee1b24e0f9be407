"""The bounded queue, the slots that work on it, and the drainer's event loop. It imports no Django.

A task's way through the modules::

    task      what was spawned
    lock      the lock of a pool
    places    all that the lock guards, what a step is, and who waits for tasks to end
    policy    the options of a submission: expiry, key, retries
    waiting   what waits: put, shed, coalesced, delayed, checked out
    queue     every step of a task from one place to the next, each under the pool's one lock
    slot      a thread that runs plain functions and serves coroutines
    slots     the slots of one pool
    calls     what a coroutine calls on its slot's thread
    loop      the drainer's thread and event loop, on which coroutines run
    drainer   starts and stops all threads
    shutdown  how a pool ends
    pace      the pauses between tasks that compute
    figures   what is counted
    log       what is logged
"""
