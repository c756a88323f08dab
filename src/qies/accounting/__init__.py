"""The cost of a model from its settings alone: parameters, FLOPs, memory. Imports no torch."""
