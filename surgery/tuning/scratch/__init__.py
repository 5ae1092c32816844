"""Training from nothing: a small model, and variants of it whose attention sinks have a place of their own."""
