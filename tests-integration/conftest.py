"""Leaves out the files whose tests need packages that are not installed."""

import importlib.util

NEEDS = {
    "test_planned_figures.py": ("dilated_factory",),
    "test_registry_ranks.py": ("dilated_factory", "dilated_ring", "dilated_sparse"),
    "test_ring_layouts.py": ("dilated_ring", "dilated_sparse"),
    "test_selection_on_a_trained_model.py": ("dilated_factory", "dilated_sparse"),
}
collect_ignore = [
    file
    for file, packages in NEEDS.items()
    if any(importlib.util.find_spec(package) is None for package in packages)
]
