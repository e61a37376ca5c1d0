"""YAML recipes of hf_linattn; data only, read through importlib.resources."""
