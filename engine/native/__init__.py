"""The `native` backend: C++ kernels compiled for this CPU at first use, over weights packed into tiles.

build.py    compiles and caches the kernels, and loads them
abi.py      what Python and the kernels share (kernels/abi.h)
tiles.py    quantised matrices as tiles, and back
packing.py  a checkpoint's weights as tiles, in a cache file that replicas map
cache.py    directories and locks of both caches
runner.py   the model runner over both
"""
