"""The layers of docs/moe.md are built as written there."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiles

DOC = Path(__file__).resolve().parents[3] / "docs" / "moe.md"


def test_examples_of_explicit_weights_run():
    section = DOC.read_text().partition("## Building a layer from explicit weights")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(DOC), "exec"), names)
