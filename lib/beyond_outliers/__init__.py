"""Optimizers under quantization: the definitions behind the notebooks of this compendium."""
