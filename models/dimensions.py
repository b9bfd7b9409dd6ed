"""The dimensions in which videos are judged. No library is imported here: commands that only read records need none."""

DIMENSIONS = ("VQ", "MQ", "TA")
"""Visual quality, motion quality, text alignment: the columns of every reward tensor, in this order."""
OVERALL = "Overall"
"""Name of the column of overall labels, and of the sum of the normalised rewards."""
