"""From a request to its text: sequences, batches, the decode loop."""
