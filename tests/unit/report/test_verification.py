from __future__ import annotations

from nmprune.report import FindingRow, verdict_tables


def test_a_sound_run():
    (table,) = verdict_tables(True, {"masks": "14"}, [], [])
    assert table.rows == (("masks", "14"), ("verdict", "OK"))


def test_faults_and_findings_are_listed_and_counted():
    findings = [FindingRow(f"t{i}", "kept weights that differ", 1000) for i in range(23)]
    verdict, faults, tensors = verdict_tables(False, {}, ["the checksum differs."], findings)
    assert verdict.rows == (("verdict", "FAILED: 24 findings"),)
    assert faults.rows == (("the checksum differs.",),)
    assert len(tensors.rows) == 20
    assert tensors.rows[0] == ("t0", "kept weights that differ", "1,000", "")
    assert tensors.total[0] == "and 3 more (--json lists all)"
