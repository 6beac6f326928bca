"""What a token of generation costs in matmul FLOPs, by the compute account."""

from collections.abc import Sequence

from adaptive.account import account
from adaptive.models.language_model import Settings

ROW = 1024  # positions of a row that slopes are read from: what is rounded up to blocks hardly counts


class Costs:
    """Of a model's tokens. The account of a row is a polynomial of its numbers of positions and of chunks, so that one
    more costs the slope there; a token reads the earlier ones that the model lets it see."""

    def __init__(self, model: Settings):
        stages, passes = len(model.body.stages()) - 1, model.body.passes

        def row(n: int, begun: int, depth: int) -> float:
            chunks = [float(n)] * begun + [0.0] * (stages - begun)
            inside = float(n) if begun == stages else 0.0
            taken = [inside] * depth + [0.0] * (passes - depth)
            own = account(model, n, chunks, taken) if stages else account(model, n, taken)
            return own.forward_flops_per_token * n

        def slope(begun: int, depth: int) -> tuple[float, float]:
            """(of a token, and for each position that it sees) where a row of n costs a n + b n (n + 1) / 2."""
            n = ROW
            short, long = row(n, begun, depth) / n, row(2 * n, begun, depth) / (2 * n)
            b = 2 * (long - short) / n
            return short - b * (n + 1) / 2, b

        self._chunkers = [stage.chunker.expected() for _, stage in model.facts().chunking]
        self._depths = [slope(stages, depth) for depth in range(1, passes + 1)]
        self._begun = [slope(begun, 1 if begun == stages else 0) for begun in range(stages + 1)]

    def usual(self, places: int) -> list[int]:
        """Chunks of each stage in so many positions, as many as its chunker is expected to make."""
        found = []
        for size in self._chunkers:
            places = round(places / size)
            found.append(places)
        return found

    def token(self, depth: int, places: Sequence[int]) -> float:
        """FLOPs of a token that took so many passes. places: its number in the row, then that of each chunk that begins
        with it, from the outside in; all count from 0."""
        begun = len(places) - 1
        if begun == len(self._begun) - 1:
            slopes = [*self._begun[:begun], self._depths[max(depth, 1) - 1]]
        else:
            slopes = self._begun[: begun + 1]
        total, before = 0.0, (0.0, 0.0)
        for place, (a, b) in zip(places, slopes, strict=True):
            total += a - before[0] + (b - before[1]) * (place + 1)
            before = a, b
        return total
