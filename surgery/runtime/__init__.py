"""What a converted checkpoint carries: these files are copied into it, and need only torch and transformers.

`eab_kernel` is attention with slots; `eab_masks` says what a slot is visible to; `eab_positions` moves the text after
the prefix; `eab_mixers` and `eab_indexer` give layers with a state, and those that choose keys, what they knew of it;
`eab_runtime` puts slots into a model. `eab_families` is carried only where attention does not go through
transformers' interface by itself, `eab_head_norm` only where heads are normed. Nothing here imports the rest of
surgery.
"""
