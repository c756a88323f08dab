"""QIES."""
