"""gpkernels losses and losses check: what they print, exit codes, the picture, one-line errors."""

import subprocess
import sys

import pytest
from PIL import Image
from threads import one_thread  # noqa: F401

from gpkernels import cli
from gpkernels.losses import LOSSES


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the command line, in this process."""
    code = cli.main(["losses", *(str(a) for a in arguments)])
    return code, *capsys.readouterr()


def rows(text):
    """The first words of the lines of a table, and its cells: columns are at least two spaces apart."""
    lines = [[cell for cell in line.split("  ") if cell] for line in text.splitlines()]
    return {cells[0]: [cell.strip() for cell in cells[1:]] for cells in lines if cells}


def test_the_table_is_printed_with_sources(capsys):
    code, text, _ = run(capsys)
    assert code == 0
    printed = rows(text)
    for name, row in LOSSES.items():
        assert printed[name] == [row.f.name, row.g.name, row.h.name, row.relation, row.doc]
    assert [name for name in ("ls-gan", "gls-gan", "cls-gan") if "Qi 2020" in printed[name][0]] == [
        "ls-gan",
        "gls-gan",
        "cls-gan",
    ]


def test_the_check_of_the_whole_table(capsys):
    code, text, _ = run(capsys, "check")
    assert code == 0
    verdicts = {name: cells[-1] for name, cells in rows(text).items() if name in LOSSES}
    assert {name for name, verdict in verdicts.items() if verdict == "not covered"} == {
        "relativistic-average",
        "relativistic-average-hinge",
        "relativistic-pairing",
    }
    assert [name for name, verdict in verdicts.items() if verdict == "not valid"] == ["asymmetric"]
    assert sum(verdict == "valid" for verdict in verdicts.values()) == 9
    assert rows(text)["least-squares"] == ["yes", "0.5", "1", "0.5", "valid"]
    assert "    at y = 0, where f = g, f has a kink\n" in text
    assert "all the same, the critic's gain over all samples is least only where p_data = p_model" in text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["hinge", "wasserstein"], 0, "valid"),
        (["asymmetric"], 1, "psi is least at gamma = 0.5 to 1"),
        (["hinge", "--epsilon", "2"], 1, "psi is least at gamma = 0.333"),
        (["wasserstein", "--epsilon", "0.9"], 1, "psi(1/2) is infinite"),
        (["relativistic-average", "--epsilon", "0.9"], 0, "not covered"),
        (["--f", "-softplus(-y)", "--g", "-softplus(y)"], 0, "valid"),
        (["--f=min(0, y - 1)", "--g=min(0, -y - 1)"], 0, "valid"),
        (["--f", "-y^2", "--g", "y^2"], 1, "at y = 0, where f = g, f' = g' = 0, a slope was wanted"),
        (["--f", "y", "--g", "-3*y"], 1, "f' + g' = -2, not 0"),
        (["--f", "min(y, 2*y)", "--g", "max(-y, -2*y)"], 0, "psi decides: the conditions are sufficient"),
    ],
    ids=str,
)
def test_exit_code_and_reason(capsys, arguments, code, said):
    got, text, errors = run(capsys, "check", *arguments)
    assert (got, errors) == (code, "")
    assert said in text


def test_the_picture(capsys, tmp_path):
    """One row for the losses with the same f and g; nothing else is drawn."""
    out = tmp_path / "new/psi.png"
    chosen = ["hinge", "hinge-minimax", "asymmetric", "relativistic-average"]
    code, text, _ = run(capsys, "check", *chosen, "--plot", out)
    assert code == 1
    assert f"Psi and psi -> {out}" in text
    one = tmp_path / "one.png"
    run(capsys, "check", "hinge", "--plot", one)
    with Image.open(out) as picture, Image.open(one) as single:
        assert picture.height == 2 * single.height
        assert len(single.convert("RGB").getcolors(100000)) > 50
    assert run(capsys, "check", "--f", "y", "--g", "-y", "--plot", tmp_path / "psi.svg")[0] == 0
    assert "<svg" in (tmp_path / "psi.svg").read_text()


def unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "psi.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda p: ["check", "vae"], "LOSS: wanted one of classic-minimax, "),
        (lambda p: ["chekc"], "invalid choice: 'chekc'"),
        (lambda p: ["check", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (lambda p: ["check", "hinge", "--f", "y", "--g", "-y"], "LOSS: wanted none beside --f and --g, got 'hinge'"),
        (lambda p: ["check", "--f", "y"], "--g: wanted a formula, as --f has one, got none"),
        (lambda p: ["check", "--g", "-y"], "--f: wanted a formula, as --g has one, got none"),
        (lambda p: ["check", "--f", "y +", "--g", "-y"], "--f: wanted a formula in y, got 'y +'"),
        (lambda p: ["check", "--f", "y", "--g", "-__import__('os')"], "--g: wanted a formula of y"),
        (lambda p: ["check", "--f", "log(-1 - y^2)", "--g", "-y"], "--f, g: wanted finite values"),
        (lambda p: ["check", "hinge", "--epsilon", "-1"], "--epsilon: wanted a number > 0, got -1"),
        (lambda p: ["check", "hinge", "--epsilon", "much"], "argument --epsilon: invalid float value: 'much'"),
        (lambda p: ["check", "hinge", "--plot", unwritable(p)], "file"),
        (lambda p: ["check", "hinge", "--plot", p / "psi.xyz"], "--plot: Format 'xyz' is not supported"),
        (lambda p: ["check", "relativistic-average", "--plot", p / "psi.png"], "--plot: wanted a loss whose f and g"),
    ],
)
def test_what_a_person_can_put_right_is_one_line(tmp_path, capsys, arguments, message):
    code, _, errors = run(capsys, *arguments(tmp_path))
    assert code == 2
    assert errors.startswith("gpkernels: error: ")
    assert errors.count("\n") == 1
    assert message in errors


def test_without_matplotlib_only_the_picture_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(capsys, "check", "hinge")[0] == 0
    code, _, errors = run(capsys, "check", "hinge", "--plot", tmp_path / "psi.png")
    assert code == 2
    assert "which is not installed: pip install 'gpkernels[train]'" in errors


def test_the_table_alone_imports_no_picture():
    script = "import sys, gpkernels.losses.command; print([m for m in ('matplotlib', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
