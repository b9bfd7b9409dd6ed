"""Sprites in motion: clips of known quality, their raters, and an oracle that reads quality from pixels."""
