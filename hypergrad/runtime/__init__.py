"""Devices, processes and files: how programs run and how results reach the disk."""
