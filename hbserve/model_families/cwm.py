"""Code World Model (Meta 2025): Llama without biases, with windows by layer."""

from hbserve.model_families.declaration import Family

CWM = Family("cwm", "CwmForCausalLM")
