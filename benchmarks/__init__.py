"""Tables from one command: `python -m benchmarks NAME`."""
