"""Structure without weights: which attention sites a model has, how positions reach it, and what makes it unfit."""
