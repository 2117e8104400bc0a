"""All tables by name."""

from . import average_precision, cleaning, conformance, surrogates

TABLES = {
    table.name: table
    for table in (
        conformance.TABLE,
        cleaning.TABLE,
        surrogates.TABLE,
        average_precision.TABLE,
    )
}
