"""Accelerate configurations for `accelerate launch --config_file`; data only."""
