"""From a request to its text: sequences, the decode loops, batches, statistics."""
