"""Whole slides: features from files, embeddings, tasks that are trained on them, heat maps."""
