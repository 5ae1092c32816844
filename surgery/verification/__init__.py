"""Proof on the files as emitted: integrity, equivalence to original + prefix, perplexity, massive activations."""
