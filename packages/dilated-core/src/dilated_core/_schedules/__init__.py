"""Schedules of attention as tasks over strided runs: integers only, no tensors."""
