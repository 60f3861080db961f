"""From files to batches: lists of clips, decoding, buckets, the prepared set, and the loader."""
