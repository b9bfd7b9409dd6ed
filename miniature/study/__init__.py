"""The paper in miniature: the whole pipeline as units of work, the demo, and a verdict on each of its claims."""
