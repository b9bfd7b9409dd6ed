"""Streams a set of frames from its first to its last sample, and prints the process's peak memory in KiB."""

import sys

from timing import own_peak

from videoalign.datamodules.frames import FrameReader
from videoalign.datamodules.pairs import PairDecoder
from videoalign.datamodules.shards import ShardSet
from videoalign.datamodules.stream import ShardLoader, ShardStream, Share
from videoalign.models import FrameSampling

shards = ShardSet(sys.argv[1])
sampling = FrameSampling(**{key: value for key, value in shards.index.frames.items() if key != "factor"})
decode = PairDecoder(FrameReader(shards, sampling, 28), 0)
stream = ShardStream(shards.contents(), decode, Share(len(shards), 2, 1, True), shuffle_buffer=8)
for _ in ShardLoader(stream, lambda items: {"dropped": []}, 0):
    pass
print(own_peak())
