"""The Gemma 2 and 3 families."""

from kernel_core.api import ModelFamily

gemma2 = ModelFamily("gemma2", "kernel_gemma.model:build_gemma2", "kernel_gemma.model:WEIGHTS", "Gemma 2")
gemma3 = ModelFamily("gemma3", "kernel_gemma.model:build_gemma3", "kernel_gemma.model:WEIGHTS", "Gemma 3, text")
