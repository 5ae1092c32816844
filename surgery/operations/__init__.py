"""The kinds of change: one file each. An operation says what it will add (plan), computes it, and checks it live."""
