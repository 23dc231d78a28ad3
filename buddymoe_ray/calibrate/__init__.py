"""Measures a model and makes its stand-ins: everything that runs before serving, nothing that runs in it."""
