"""A model in memory: loading it, putting things into it, passing text through it, editing and rounding it."""
