"""What kinds of tokens there are, by their text alone."""

import numpy as np

from adaptive.data.tokenizers import Tokenizer

CLASSES = ("blanks", "letters after a blank", "letters", "digits", "punctuation", "beyond ASCII", "markers")
BLANK, OPENING, LETTERS, DIGITS, PUNCTUATION, OTHER, MARKER = range(len(CLASSES))


def classes_of(tokenizer: Tokenizer) -> np.ndarray:
    """i8[vocab]: the index in CLASSES of every token, by its text alone."""
    return np.array([_class(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)], np.int8)


def _class(text: bytes) -> int:
    core = text.strip()
    if not text:
        return MARKER
    if not core:
        return BLANK
    if max(core) >= 128:
        return OTHER
    if core.isalpha():
        return OPENING if text[:1].isspace() else LETTERS
    return DIGITS if core.isdigit() else PUNCTUATION
