"""Shards on disk -> batches: LightningDataModules, importers, writers and the miniature world."""
