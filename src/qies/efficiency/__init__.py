"""What a model costs: FLOPs now, memory and latency beside them."""
