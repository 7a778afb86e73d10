"""Training: corpus, batches, optimizer, run folder and the loop that ties them."""
