"""Who owns which page of the KV pool: reference counts on the host, no arrays."""

from collections.abc import Sequence


class OutOfPagesError(Exception):
    """The pool has fewer free pages than asked for. Callers ask `num_free` first."""


class PageAllocator:
    """Reference-counted pages 0 … num_pages − 1. Freed plus owned is always all."""

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return len(self._num_owners)

    def num_owners(self, page: int) -> int:
        """How many hold this page; more than one only for pages of a shared prompt."""
        return self._num_owners[page]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages for one owner each.

        Raises:
          OutOfPagesError: Fewer are free; none is taken.
        """
        if count > len(self._free):
            raise OutOfPagesError(f"{count} pages asked for, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._num_owners[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Add an owner to pages that are owned already."""
        for page in pages:
            if self._num_owners[page] == 0:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._num_owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop one owner of each page; a page without owners is free again."""
        for page in pages:
            if self._num_owners[page] == 0:
                raise ValueError(f"page {page} is released more often than owned")
            self._num_owners[page] -= 1
            if self._num_owners[page] == 0:
                self._free.append(page)
