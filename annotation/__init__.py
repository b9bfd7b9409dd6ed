"""Collecting preferences (VideoAlign, section 3.1): pairs to rate, the page to rate them on, agreement, export."""
