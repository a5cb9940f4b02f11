"""A runtime whose ranks each choose experts by their own stream."""

from spd_calib.models.experts import route
from spd_calib.parallel.block import Block
from spd_calib.runtimes.torchrun import worker

partials = Block._partials


def by_own_stream(self, s, routing):
    own = None if routing is None else route(self.experts, self.norm2(s.read(0)))
    return partials(self, s, own)


Block._partials = by_own_stream  # type: ignore[method-assign]

if __name__ == "__main__":
    worker.main()
