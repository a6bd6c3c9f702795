"""Configs: one small Python file per model, each a few lines over `configs.base`."""
