"""Which shapes of the forward pass an engine compiles, and how work is cut into them. Pure; no arrays.

Each shape costs seconds to compile and every token of padding costs its compute, so there are few, and they are chosen
by what a dispatch holds: about `chunk` tokens, enough to keep the hardware at its matrix products, as many rows of a
narrow width or one row of the widest. Beside them stands one lone row of each width, for what does not fill a dispatch.
"""

import dataclasses
from collections.abc import Sequence

_SMALLEST_WIDTH = 32  # tokens of the narrowest prefill shape; wider ones double
_SMALLEST_ROWS = 8  # slots of the smallest decode shape


@dataclasses.dataclass(frozen=True)
class PrefillShapes:
    """The shapes of prefill.

    Args:
      chunk: Most tokens of a row, and roughly those of a dispatch.
      most_rows: Most rows of a dispatch.
      longest: No prompt is longer than this many tokens.
      dispatch_tokens: A dispatch costs as much as this many tokens, whatever it holds: few on a CPU, many where kernels
        are launched and a narrow matrix product leaves most of the hardware idle.
    """

    chunk: int
    most_rows: int
    longest: int
    dispatch_tokens: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Tokens of a row, rising."""
        widest = min(self.chunk, 1 << (self.longest - 1).bit_length())
        widths = [widest]
        while (half := widths[-1] // 2) >= _SMALLEST_WIDTH:
            widths.append(half)
        return tuple(reversed(widths))

    def rows(self, width: int) -> int:
        """Rows of a full dispatch of this width."""
        return max(1, min(self.most_rows, self.chunk // width))

    def all(self) -> list[tuple[int, int]]:
        """Every (rows, width) that a plan may hold."""
        return [(rows, width) for width in self.widths for rows in sorted({1, self.rows(width)})]

    def plan(self, lengths: Sequence[int]) -> list[tuple[int, int, list[int]]]:
        """Cut chunks into dispatches.

        Args:
          lengths: Tokens of each chunk, none above `chunk`.

        Returns:
          (rows, width, indices of the chunks in it) of each dispatch. What is left of a width after full dispatches
          goes into one more, or row by row, whichever costs less.
        """
        by_width: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            by_width.setdefault(next(width for width in self.widths if width >= length), []).append(index)
        dispatches = []
        for width, indices in by_width.items():
            rows = self.rows(width)
            for start in range(0, len(indices), rows):
                some = indices[start : start + rows]
                alone = len(some) * (width + self.dispatch_tokens) < rows * width + self.dispatch_tokens
                dispatches += [(1, width, [index]) for index in some] if alone else [(rows, width, some)]
        return dispatches


def decode_row_counts(num_slots: int) -> tuple[int, ...]:
    """Row counts of decode blocks, rising: all slots, three quarters, a half, a quarter, … and not below 8."""
    counts = [num_slots]
    while (half := -(-counts[-1] // 2)) >= _SMALLEST_ROWS and half < counts[-1]:
        counts.append(half)
    if len(counts) > 1:
        counts.insert(1, -(-3 * num_slots // 4))
    return tuple(reversed(counts))
