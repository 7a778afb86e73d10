"""LongNet models: layers, positions, language model, encoder, generation."""
