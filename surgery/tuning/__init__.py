"""Training of what was added to a model: slots, head-wise norms, and LoRA on the rest."""
