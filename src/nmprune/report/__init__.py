"""Results -> tables: rich ones for the terminal, Markdown ones for pages."""

from nmprune.report.allocation import allocation_table, allocation_words
from nmprune.report.analysis import AnalysedRow, CorrelationRow, analysis_tables
from nmprune.report.finetune import finetune_table
from nmprune.report.finetune_plan import FinetunePlan, finetune_plan_tables
from nmprune.report.layout import Table, facts
from nmprune.report.learning import learning_table
from nmprune.report.masks import diff_tables, mask_tables, role_of
from nmprune.report.model import ModelFacts, RoleFacts, model_tables
from nmprune.report.perplexity import PerplexityRow, perplexity_table
from nmprune.report.plan import Plan, RolePlan, plan_tables
from nmprune.report.pruning import pruning_tables, role_table, totals
from nmprune.report.regeneration import AgreementRow, LossRow, regeneration_tables
from nmprune.report.verification import FindingRow, verdict_tables

__all__ = [
    "AgreementRow",
    "AnalysedRow",
    "CorrelationRow",
    "FindingRow",
    "FinetunePlan",
    "LossRow",
    "ModelFacts",
    "PerplexityRow",
    "Plan",
    "RoleFacts",
    "RolePlan",
    "Table",
    "allocation_table",
    "allocation_words",
    "analysis_tables",
    "diff_tables",
    "facts",
    "finetune_plan_tables",
    "finetune_table",
    "learning_table",
    "mask_tables",
    "model_tables",
    "perplexity_table",
    "plan_tables",
    "pruning_tables",
    "regeneration_tables",
    "role_of",
    "role_table",
    "totals",
    "verdict_tables",
]
