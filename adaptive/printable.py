"""Text of anybody's on a terminal: what would steer the terminal is shown instead of done."""

_KEPT = "\n\t"
_SHOWN = {c: 0x2400 + c for c in range(0x20) if chr(c) not in _KEPT} | {0x7F: 0x2421}
_SHOWN |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)  # the latter no stream can encode


def printable(text: str) -> str:
    """The text with control characters, such as the escape that begins a terminal's commands, as their pictures (␛),
    and bytes that were no text as �; line feeds and tabs stay."""
    return text.translate(_SHOWN)
