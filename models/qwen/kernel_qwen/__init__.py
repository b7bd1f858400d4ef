"""The Qwen2, Qwen3 and Qwen3-MoE families."""

from kernel_core.api import ModelFamily

qwen2 = ModelFamily("qwen2", "kernel_qwen.model:build_qwen2", "kernel_qwen.model:DENSE", "Qwen2 and Qwen2.5, dense")
qwen3 = ModelFamily("qwen3", "kernel_qwen.model:build_qwen3", "kernel_qwen.model:DENSE", "Qwen3, dense")
qwen3_moe = ModelFamily("qwen3_moe", "kernel_qwen.model:build_qwen3_moe", "kernel_qwen.model:MOE", "Qwen3, a mixture of experts")
