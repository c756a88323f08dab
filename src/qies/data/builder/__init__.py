"""Building a data set: from the text of a source to tokenised shards and their manifest (`pipeline.build_shards`)."""
