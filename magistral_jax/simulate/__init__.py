"""The schedule run against a cost model: how fast a cluster would be, and what it would wait for."""
