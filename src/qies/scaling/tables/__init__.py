"""Tables of runs: read any file or folder of run records, resolve column names and units, filter the rows."""
