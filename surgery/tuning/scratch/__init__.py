"""Training from nothing: a small GPT-2, and variants of it whose attention sinks have a place of their own."""
