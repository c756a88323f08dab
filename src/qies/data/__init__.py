"""Text in, token ids out.

Training reads: `shards` (memory-mapped token files), `batches` (windows of them), `manifest`, `tokenizer`, and imports
nothing else of this package. `sources` reads text of every kind; `builder` turns it into shards.
"""
