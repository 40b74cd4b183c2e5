"""Rewards and verdicts. Imports no jax, directly or indirectly."""
