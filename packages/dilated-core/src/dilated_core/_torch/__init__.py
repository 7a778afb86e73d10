"""The `torch` backend: tasks on strided views, by torch's fused attention."""
