"""The OPT family."""

from kernel_core.api import ModelFamily

opt = ModelFamily("opt", "kernel_opt.model:build", "kernel_opt.model:WEIGHTS", "OPT")
