"""The page accounts: freed plus owned is all, no page has two owners unless it is shared, and errors take nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from magistral_jax.generate.kv_pages import OutOfPagesError, PageAllocator


class Accounts(RuleBasedStateMachine):
    """Random sequences of allocate, share and release against a plain list of who holds what."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int):
        self.allocator = PageAllocator(num_pages)
        self.num_pages = num_pages
        self.holders: list[list[int]] = []

    def count(self, page: int):
        return sum(holder.count(page) for holder in self.holders)

    @rule(count=st.integers(0, 14))
    def allocate(self, count: int):
        free = {page for page in range(self.num_pages) if self.count(page) == 0}
        if count > len(free):
            with pytest.raises(OutOfPagesError, match=f"{count} pages asked for, {len(free)} of {self.num_pages}"):
                self.allocator.allocate(count)
            return
        pages = self.allocator.allocate(count)
        assert len(set(pages)) == count  # nobody gets the same page twice
        assert set(pages) <= free  # or one that somebody holds
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject):
        pages = data.draw(st.sampled_from(self.holders))
        part = pages[: data.draw(st.integers(0, len(pages)))]
        self.allocator.share(part)
        self.holders.append(list(part))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject):
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.allocator.release(holder)

    @rule(data=st.data())
    def misuse(self, data: st.DataObject):
        page = data.draw(st.integers(0, self.num_pages - 1))
        if self.count(page) == 0:
            with pytest.raises(ValueError, match=f"page {page} is released more often than owned"):
                self.allocator.release([page])
            with pytest.raises(ValueError, match=f"page {page} is free and cannot be shared"):
                self.allocator.share([page])

    @invariant()
    def freed_plus_owned_is_all(self):
        if not hasattr(self, "allocator"):
            return
        owners = [self.allocator.num_owners(page) for page in range(self.num_pages)]
        assert owners == [self.count(page) for page in range(self.num_pages)]
        assert self.allocator.num_free == owners.count(0)
        assert self.allocator.num_pages == self.num_pages


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@settings(max_examples=30, deadline=None)
@given(num_pages=st.integers(0, 8), taken=st.integers(0, 8), asked=st.integers(0, 10))
def test_allocation_is_all_or_nothing(num_pages: int, taken: int, asked: int):
    allocator = PageAllocator(num_pages)
    allocator.allocate(min(taken, num_pages))
    free = allocator.num_free
    if asked <= free:
        assert len(allocator.allocate(asked)) == asked
        assert allocator.num_free == free - asked
    else:
        with pytest.raises(OutOfPagesError):
            allocator.allocate(asked)
        assert allocator.num_free == free
        assert len(allocator.allocate(free)) == free  # what was free still is


def test_a_shared_page_is_free_again_after_its_last_owner():
    allocator = PageAllocator(2)
    pages = allocator.allocate(2)
    allocator.share(pages[:1])
    allocator.release(pages)
    assert [allocator.num_owners(page) for page in pages] == [1, 0]
    with pytest.raises(OutOfPagesError):
        allocator.allocate(2)
    allocator.release(pages[:1])
    assert allocator.num_free == 2
