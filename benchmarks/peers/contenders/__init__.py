"""One module a library: name of a work -> how that library does it.

`WORKS[name](data)` prepares the call that is timed; calling that returns the answer as
one flat array, in the order that `benchmarks.peers.work` states. Only the library that
a module is named after has to be installed where it is imported.
"""
