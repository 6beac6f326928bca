"""The mesh axis that sequences are split over."""

import dataclasses

from adaptive.parallel.rules import active_placement

AXIS = "context"


@dataclasses.dataclass(frozen=True)
class Context:
    """The axis: its name, devices, nodes (`ring.Ring`), and the schedule that the settings want."""

    axis: str = AXIS
    parts: int = 1
    nodes: int = 1
    schedule: str = "auto"


def active_context() -> Context:
    """Of the active placement; one device without one."""
    current = active_placement()
    if current is None or AXIS not in current.rules.seq:
        return Context()
    return Context(AXIS, current.mesh.shape[AXIS], current.context.nodes, current.context.schedule)
