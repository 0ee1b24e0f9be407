"""Fire-and-forget background work for Django that cannot take the site down.

``bgtasks.spawn("send-welcome", send_welcome, user.pk)`` returns at once and never raises under load. At most
CONN_MAX tasks run at a time; the others wait. A task that finds the queue full is dropped, with a warning.
"""

from bgtasks.monitoring.figures import PoolStats
from bgtasks.pools import pools

spawn = pools.default.spawn
spawn_on_commit = pools.default.spawn_on_commit
aspawn_on_commit = pools.default.aspawn_on_commit
using = pools.default.using
stats = pools.stats
drain = pools.drain
adrain = pools.adrain
shutdown = pools.shutdown
ashutdown = pools.ashutdown

__all__ = [
    "PoolStats",
    "adrain",
    "ashutdown",
    "aspawn_on_commit",
    "drain",
    "pools",
    "shutdown",
    "spawn",
    "spawn_on_commit",
    "stats",
    "using",
]


def __dir__() -> list[str]:
    """Return the public names. Modules of the package are attributes too, once they are imported."""
    return __all__
