"""The cost of a model from its settings: parameters, FLOPs, memory. Imports no torch."""
