"""The asynchronous loop: a pure state machine and its drivers."""
