"""Results -> tables: rich ones for the terminal, Markdown ones for pages."""

from nmprune.report.allocation import allocation_table, allocation_words
from nmprune.report.layout import Table, facts
from nmprune.report.masks import diff_tables, mask_tables, role_of
from nmprune.report.model import ModelFacts, RoleFacts, model_tables
from nmprune.report.perplexity import PerplexityRow, perplexity_table
from nmprune.report.plan import Plan, RolePlan, plan_tables
from nmprune.report.pruning import pruning_tables, role_table, totals
from nmprune.report.verification import FindingRow, verdict_tables

__all__ = [
    "FindingRow",
    "ModelFacts",
    "PerplexityRow",
    "Plan",
    "RoleFacts",
    "RolePlan",
    "Table",
    "allocation_table",
    "allocation_words",
    "diff_tables",
    "facts",
    "mask_tables",
    "model_tables",
    "perplexity_table",
    "plan_tables",
    "pruning_tables",
    "role_of",
    "role_table",
    "totals",
    "verdict_tables",
]
