"""All tables by name."""

from . import cleaning, conformance, surrogates

TABLES = {
    table.name: table for table in (conformance.TABLE, cleaning.TABLE, surrogates.TABLE)
}
