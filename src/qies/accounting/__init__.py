"""What a model costs, from its settings alone: parameters, FLOPs, memory. Imports no torch."""
