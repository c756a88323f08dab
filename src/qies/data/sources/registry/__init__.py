"""The corpus `registry`: text extracted from packages that are pinned by version and sha256."""
