"""Exit codes."""

from helpers import ROOT

from cplearn import errors


def test_every_error_has_its_own_exit_code():
    kinds = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, errors.ExpectedError)]
    codes = {error.__name__: error.exit_code for error in kinds}
    assert codes == {
        "ExpectedError": 1,
        "UserError": 2,
        "LocalError": 2,
        "NonFiniteError": 3,
        "WriteError": 4,
        "ReadError": 4,
        "WorkerError": 5,
        "PeerError": 6,
        "CollapseError": 7,
        "Interrupted": 75,
    }
    page = (ROOT / "docs" / "errors.md").read_text()
    assert all(f"| {code} |" in page for code in set(codes.values()) | {0, 130})
