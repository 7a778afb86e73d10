"""Configurations: validated, frozen data, told apart by `kind`."""
