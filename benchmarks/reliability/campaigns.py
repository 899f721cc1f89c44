"""All campaigns by name, in the order in which they run."""

from benchmarks.reliability import (
    crash_points,
    damages,
    full_disk,
    io_errors,
    kills,
    power_loss,
    preemptions,
    sync_order,
)
from benchmarks.reliability.campaign import Campaign

CAMPAIGNS: dict[str, Campaign] = {
    one.name: one
    for one in (
        kills.KILLS,
        crash_points.CRASH_POINTS,
        crash_points.TRACED,
        power_loss.POWER_LOSS,
        power_loss.CONTROLS,
        sync_order.SYNC_ORDER,
        damages.DAMAGE,
        io_errors.IO_ERRORS,
        io_errors.TRACED,
        full_disk.FULL_DISK,
        preemptions.PREEMPTIONS,
    )
}
