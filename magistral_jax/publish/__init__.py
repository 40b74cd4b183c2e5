"""Versioned weights from trainer to generators."""
