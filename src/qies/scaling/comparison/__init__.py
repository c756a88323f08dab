"""Comparison of two arms: matched cells, joint inference on both laws, gains, tests, statistical power, verdict."""
