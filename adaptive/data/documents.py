"""What files hold: documents, and records that are none."""

from typing import NamedTuple

import numpy as np


class Prompted(NamedTuple):
    """A text with one before it that is read and not predicted."""

    prompt: str
    text: str


# A document is text, or the ids of its tokens (i32[tokens], without an end-of-text token).
Document = str | np.ndarray | Prompted


class Textless(NamedTuple):
    """A record without text: null or empty, or, where `keys` are given, one that has those and lacks the one asked."""

    keys: tuple[str, ...] | None = None
