"""Triton kernels and the thin functions that launch them. Importing a module here imports triton."""
