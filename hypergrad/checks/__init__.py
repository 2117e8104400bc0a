"""Checks of a problem on shapes and jaxprs.

They make errors before anything is compiled, and flags that are constants of a program.
"""
