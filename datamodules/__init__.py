"""From videos and ratings to shards on disk, and from there to batches: importers, writers, LightningDataModules."""
