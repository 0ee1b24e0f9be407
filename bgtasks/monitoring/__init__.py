"""What a process shows of itself, what the processes of a site show together, and what is wrong with them.

::

    thread     a thread that lives only while it has something to do
    publisher  publishes a snapshot of this process through Django's cache
    cache      the cache with keys that are the same in the whole site
    snapshot   what a process shows of itself
    overview   what all processes of the site show
    journal    tells what a killed process has lost
    watchdog   reports plain functions that run for too long
    health     what is wrong with this process
"""
