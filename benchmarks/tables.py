"""All tables by name."""

from . import cleaning, conformance

TABLES = {table.name: table for table in (conformance.TABLE, cleaning.TABLE)}
