"""Opens a set, and prints the process's peak memory in KiB."""

import sys

from timing import own_peak

from videoalign.datamodules.shards import ShardSet

assert len(ShardSet(sys.argv[1]).contents()) > 0
print(own_peak())
