"""Mistral (Jiang et al. 2023): Llama without biases, with a sliding window in all layers or in none."""

from hbserve.model_families.declaration import Family

MISTRAL = Family("mistral", "MistralForCausalLM", is_uniform=True)
