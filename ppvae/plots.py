"""Figures of a comparison, of the toy model and of a VAE."""
