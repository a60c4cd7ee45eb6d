"""Differential privacy per patient: clipping, sampling, noise, and the ledger that pays for them."""
