"""What the package may depend on."""

from helpers import ROOT


def test_no_script_needs_the_network():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("cplearn/**/*.py")]:
        source = path.read_text()
        assert "torch.hub" not in source and "pretrained=True" not in source and "download=True)" not in source
