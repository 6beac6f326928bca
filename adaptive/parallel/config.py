"""The device mesh: plain data."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. `data=-1` takes the devices that the other axes leave.

    data    replicas: the batch is split, parameters are not
    fsdp    the batch is split, and so are parameters and optimizer state (gathered layer by layer)
    tensor  heads, feed-forward and vocabulary are split
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
