"""All campaigns by name, in the order in which they run."""

from benchmarks.reliability import damages, io_errors, power_loss
from benchmarks.reliability.campaign import Campaign

CAMPAIGNS: dict[str, Campaign] = {
    one.name: one for one in (power_loss.POWER_LOSS, power_loss.CONTROLS, damages.DAMAGE, io_errors.IO_ERRORS)
}
