"""The programs of each library: a module per library, with a function per work.

`WORKS[name](data)` returns the call that is timed, which returns the result as one
array in the order of `benchmarks.peers.work`. A module imports only the library that it
is named after.
"""
