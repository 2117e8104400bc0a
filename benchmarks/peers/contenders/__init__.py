"""The programs of each library: a module per library, with a function per work.

`WORKS[name](data, **options)` returns the call that is timed, which returns the result
as one array in the order of `benchmarks.peers.work`. It may have a method `notes` that
returns a dictionary for the row. A module imports only the library that it is named
after.
"""
