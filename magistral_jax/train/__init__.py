"""Advantages, collation, loss, optimizer, update, supervised fine-tuning."""
