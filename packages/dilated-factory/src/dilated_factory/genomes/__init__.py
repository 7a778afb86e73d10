"""Genomes: FASTA files, the tokens of bases, intervals, training on them and their embeddings."""
