"""What a converted checkpoint carries: these files are copied into it, and need only torch and transformers.

`eab_kernel` is attention with slots; `eab_positions` moves the text behind the prefix; `eab_runtime` puts slots into a
model and decides what a slot is visible to. Nothing here imports the rest of surgery.
"""
