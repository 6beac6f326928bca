"""Which rows of the global batch a process reads, and whether a saved position is of the same data."""

import dataclasses

from adaptive.errors import DataError


@dataclasses.dataclass(frozen=True)
class Shard:
    """Process `index` of `count` takes the rows whose global index is `index` modulo `count`.

    batch_size  rows of the global batch. Raises DataError if it does not divide over the processes.
    """

    index: int
    count: int
    batch_size: int

    def __post_init__(self):
        if self.batch_size % self.count:
            raise DataError(f"train.batch_size={self.batch_size} does not divide over {self.count} processes")

    @property
    def rows(self) -> int:
        """Rows of each batch that this process reads."""
        return self.batch_size // self.count


def check_fingerprint(state: dict | None, fingerprint: str) -> None:
    """Raises DataError when a saved `state` is of data with another fingerprint."""
    if state is not None and state["fingerprint"] != fingerprint:
        raise DataError(
            f"the saved position is in other data: fingerprint {state['fingerprint'][:12]}, the recipe's is "
            f"{fingerprint[:12]}. The text, the tokenizer, what documents begin or end with (data.bos, data.eos), "
            "or one of data.seq_len, weights, shuffle, shuffle_seed and validation_every changed: restore it, or start "
            "a new workdir"
        )
