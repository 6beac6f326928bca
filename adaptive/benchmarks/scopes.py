"""Which code made an instruction of a compiled program, from the tables of stack frames in its text."""

import re
from collections import Counter
from collections.abc import Sequence

_ENTRY = re.compile(r"^(\d+) (?:\"(.*)\"|\{(.*)\})$")
_FIELD = re.compile(r"(\w+)=(\d+)")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_NAME = re.compile(r'op_name="([^"]*)"')
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_PACKAGES = ("adaptive/", "kernels_pallas/")
# Arithmetic that every part uses: what calls it says more.
_COMMON = ("layers/linear.py", "parallel/rules.py", "parallel/shard.py", "layers/remat.py")


class Scopes:
    """`of(lines)`: what wrote these instructions, the most frequent first."""

    def __init__(self, text: str):
        self._tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
        table: dict[int, str] | None = None
        for line in text.splitlines():
            if line in self._tables:
                table = self._tables[line]
            elif table is not None and (found := _ENTRY.match(line)):
                table[int(found[1])] = found[2] if found[2] is not None else found[3]
            elif line.startswith(("%", "ENTRY")):
                break

    def of(self, lines: Sequence[str], most: int = 2) -> str:
        """A few words: whether forward, backward or computed again, and in which function of which file."""
        found = Counter(filter(None, map(self._one, lines)))
        return "; ".join(name for name, _ in found.most_common(most)) or "not told"

    def _one(self, line: str) -> str:
        name = _NAME.search(line)
        if not name:
            return ""
        again, gradient = "rematted_computation" in name[1], "transpose(" in name[1]
        when = "computed again" if again else "backward" if gradient else "forward" if "jvp(" in name[1] else ""
        frame = _FRAME.search(line)
        where = self._code(int(frame[1])) if frame else ""
        return ", ".join(filter(None, (when, where)))

    def _code(self, frame: int) -> str:
        """The innermost function of this package that is not shared by all."""
        files, functions, locations, frames = (self._tables[name] for name in _TABLES)
        while frame in frames:
            fields = dict(_FIELD.findall(frames[frame]))
            place = dict(_FIELD.findall(locations.get(int(fields["file_location_id"]), "")))
            path = files.get(int(place.get("file_name_id", 0)), "")
            inside = next((path[at:] for own in _PACKAGES if (at := path.rfind(f"/{own}") + 1)), "")
            if inside and not inside.endswith(_COMMON):
                function = functions.get(int(place.get("function_name_id", 0)), "")
                return f"{inside.removeprefix('adaptive/')} {function.replace('.<locals>', '')}"
            frame = int(fields.get("parent_frame_id", 1)) - 1
        return ""
