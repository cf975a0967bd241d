"""Readers under random input: `make fuzz` (run), what is read (targets), how inputs are made (inputs)."""
