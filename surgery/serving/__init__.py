"""A plugin for vLLM: models with slots. Imports only torch and vllm, since it runs beside vLLM's own transformers."""
