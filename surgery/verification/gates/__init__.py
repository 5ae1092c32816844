"""Gates: what a recipe asks of the converted model, measured and judged; one file each."""
