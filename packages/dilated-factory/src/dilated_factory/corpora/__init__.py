"""Corpora: what a language model reads, and as which tokens."""
