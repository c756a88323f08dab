"""Probes: small synthetic tasks that measure one capability of a mixer, with generated data and exact targets."""
