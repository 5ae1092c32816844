"""Checkpoints as files: where they come from, what lies in them, how a new one is written. No model code here."""
