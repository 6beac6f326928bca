"""What is written is there whole, or not at all."""

import pytest

from adaptive.data.files import write_text_atomically


def test_a_failed_replacement_leaves_the_old_text(tmp_path):
    path = tmp_path / "f"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "\ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
