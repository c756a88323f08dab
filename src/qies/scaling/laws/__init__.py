"""Scaling laws: their forms, the solver, fits with intervals, envelopes, curves, and the choice between forms."""
