"""Mistral (Jiang et al. 2023): Llama without biases, with a sliding window in all layers or in none.

Ministral (2024) has windows by layer.
"""

from hbserve.model_families.declaration import Family

MISTRAL = Family("mistral", "MistralForCausalLM", is_uniform=True)

MINISTRAL = Family("ministral", "MinistralForCausalLM")
