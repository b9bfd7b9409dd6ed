"""Collecting preferences: pairs to rate, a page to rate them on, agreement, and export to pairs shards (VideoAlign, section 3.1)."""
