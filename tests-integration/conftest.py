"""Leaves out the files whose tests need packages that are not installed."""

import importlib.util

# What a part of the packages changes nothing about: the sources, the tools, whole programs.
WHOLE = ("caches", "examples", "fetched", "gpu_line", "installing", "names_in_documents")
WHOLE += ("release", "structure", "tools_of_the_tests")
ALL = tuple(f"dilated_{part}" for part in ("core", "factory", "pool", "ring", "sparse"))
NEEDS = {
    **{f"test_{name}.py": ALL for name in WHOLE},
    "test_claim.py": ("dilated_factory", "dilated_sparse"),
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
