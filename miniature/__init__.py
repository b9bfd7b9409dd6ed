"""The miniature world with ground truth, its tiny models, and the study of the paper in it."""
