"""The Mistral and Mixtral families."""

from kernel_core.api import ModelFamily

mistral = ModelFamily(
    "mistral", "kernel_mistral.model:build_mistral", "kernel_mistral.model:MISTRAL", "Mistral, one window for all layers"
)
mixtral = ModelFamily(
    "mixtral", "kernel_mistral.model:build_mixtral", "kernel_mistral.model:MIXTRAL", "Mixtral, a mixture of experts"
)
