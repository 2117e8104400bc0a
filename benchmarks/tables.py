"""All tables by name: those that are only here, and the studies of the package."""

from hypergrad.studies import STUDIES, table

from . import average_precision, conformance, surrogates

TABLES = {
    table.name: table
    for table in (
        conformance.TABLE,
        *map(table, STUDIES.values()),
        surrogates.TABLE,
        average_precision.TABLE,
    )
}
