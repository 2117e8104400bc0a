"""Golden cases: numbers of the library that must stay the same to the bit."""
