"""The Phi-3 family."""

from kernel_core.api import ModelFamily

phi3 = ModelFamily("phi3", "kernel_phi.model:build", "kernel_phi.model:WEIGHTS", "Phi-3, Phi-3.5 and Phi-4, text")
