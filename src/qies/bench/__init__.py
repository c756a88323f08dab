"""Timing against named baselines, in one run on this machine (`qies bench`)."""
