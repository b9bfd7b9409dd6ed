"""A generator family, a judge and a benchmark for videoalign, from outside of it."""
