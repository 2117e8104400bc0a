"""All tables by name: those that are only here, and the studies of the package."""

from hypergrad.studies import STUDIES, table

from . import (
    adjoint,
    average_precision,
    conformance,
    corruption,
    gates,
    growth,
    growth_seconds,
    logistic,
    pareto,
    population,
    quadratics,
    questions,
    rq1,
    rq2,
    rq4,
    rq4_grid,
    searching_grid,
    searching_table,
    soba_step,
    surrogates,
    trainings,
    warm_start,
)
from .peers import environments
from .peers import table as peers

#: Research questions that one table answers.
ALIASES = {"rq3": "pareto"}
TABLES = {
    table.name: table
    for table in (
        conformance.TABLE,
        *map(table, STUDIES.values()),
        surrogates.TABLE,
        average_precision.TABLE,
        quadratics.GRID,
        quadratics.TABLE,
        logistic.LOGISTIC_GRID,
        logistic.LOGISTIC_TABLE,
        logistic.MULTINOMIAL_GRID,
        logistic.MULTINOMIAL_TABLE,
        corruption.GRID,
        corruption.TABLE,
        soba_step.TABLE,
        population.TABLE,
        growth.TABLE,
        growth_seconds.TABLE,
        adjoint.TABLE,
        searching_grid.GRID,
        searching_table.TABLE,
        warm_start.TABLE,
        gates.TABLE,
        pareto.GRID,
        pareto.TABLE,
        peers.of(environments.python),
        rq1.TABLE,
        rq2.TABLE,
        rq4_grid.TABLE,
        rq4.TABLE,
        trainings.TABLE,
        questions.TABLE,
    )
}
