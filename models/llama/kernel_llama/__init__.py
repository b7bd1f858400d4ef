"""The Llama family."""

from kernel_core.api import ModelFamily

llama = ModelFamily("llama", "kernel_llama.model:build", "kernel_llama.model:WEIGHTS", "Llama 1 to 3 and what is stored alike")
