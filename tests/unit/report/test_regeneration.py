from nmprune.report import AgreementRow, LossRow, regeneration_tables


def test_shares_are_of_groups():
    linears = [
        AgreementRow(0, "q", 100, 1.0, 0.5, 0.4),
        AgreementRow(0, "up", 300, 0.6, 0.9, 0.8),
        AgreementRow(1, "q", 100, 0.5, 0.5, 0.5),
    ]
    layers = [LossRow(0, True, 0.1, 0.2, 0.3), LossRow(1, False, None, None, None), LossRow(2, None, 1.0, 2.0, None)]
    roles, by_layer = regeneration_tables("title", linears, layers)
    assert roles.rows == (("q", "200", "75.0%", "50.0%", "45.0%"), ("up", "300", "60.0%", "90.0%", "80.0%"))
    assert roles.total == ("all", "500", "66.0%", "74.0%", "66.0%")
    assert by_layer.rows[0] == ("0", "70.0%", "80.0%", "70.0%", "learned", "0.1", "0.2", "0.3")
    assert by_layer.rows[1][4:] == ("prior's", "", "", "")
    assert by_layer.rows[2] == ("2", "", "", "", "", "1", "2", "")


def test_without_a_prior():
    roles, _ = regeneration_tables("", [AgreementRow(0, "q", 10, 0.5, None, None)], [])
    assert roles.rows == (("q", "10", "50.0%", "", ""),)
