"""What takes architectures that no installed family knows."""

from kernel_core.api import ModelFamily

transformers_any = ModelFamily(
    "transformers_any",
    "kernel_transformers_any.model:TransformersModel",
    "kernel_transformers_any.model:WEIGHTS",
    "any causal language model of transformers",
)
