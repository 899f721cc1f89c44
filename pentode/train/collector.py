"""Python's garbage collector in a run: what lives as long as the run does is looked through once, not ever again.

With torch and its compiler imported a full collection takes 0.2 to 0.4 s, in which a GPU may run out of work.
"""

import gc
from types import TracebackType

SETTLED = 8  # steps in which a run makes what it needs until its end


class Collector:
    """Collects again what a start left uncollected (`pentode.garbage`), and sets aside what lives when a loop begins.

    When SETTLED steps were done, what lives then is set aside; when left, all of it can be collected again.
    """

    def __init__(self) -> None:
        self._left, self._collected = SETTLED, True

    def __enter__(self) -> "Collector":
        self._collected = gc.isenabled()
        gc.collect(2 if self._collected else 0)  # what is made while nothing is collected is young
        gc.freeze()
        gc.enable()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        gc.unfreeze()
        if not self._collected:
            gc.disable()

    def step_done(self) -> None:
        """Count a step."""
        self._left -= 1
        if self._left == 0:
            gc.unfreeze()
            gc.collect()
            gc.freeze()
