"""Timing against named rivals, in one run on this machine (`qies bench`)."""
