"""Commands that must end in one sentence."""

from codistill.cli.main import main


def one_sentence(capsys, words: list[str], code: int = 2) -> str:
    assert main(words) == code
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said
    said = said.splitlines()[-1]
    assert said.startswith("codistill: ")
    assert "weights_only=False" not in said
    return said
