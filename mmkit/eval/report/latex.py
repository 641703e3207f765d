"""The score tables for a paper, as LaTeX for pdfLaTeX; written so that XeLaTeX and LuaLaTeX print other scripts, too."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from mmkit.eval.report.tables import Cell, Column, Group, Table
from mmkit.eval.report.view import Report

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    # After the end of a row or a rule these two would be an argument of it.
    "[": "{[}", "*": "{*}",
    "×": r"$\times$", "÷": r"$\div$", "−": "$-$", "–": r"\textendash{}", "—": r"\textemdash{}", "′": r"$'$", "…": r"\ldots{}",
    "±": r"$\pm$", "≠": r"$\neq$",
    "≤": r"$\leq$", "≥": r"$\geq$", "≈": r"$\approx$", "→": r"$\rightarrow$", "←": r"$\leftarrow$",
    "°": r"$^{\circ}$", "²": "$^{2}$", "³": "$^{3}$", "µ": r"$\mu$", "·": r"$\cdot$",
    **{chr(0x3B1 + i): rf"$\{name}$" for i, name in enumerate((
        "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
        "mathit{o}", "pi", "rho", "varsigma", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega",
    ))},
    **{letter: rf"$\{name}$" for letter, name in zip("ΓΔΘΛΞΠΣΦΨΩ", (
        "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega",
    ), strict=True)},
}  # fmt: skip
# Grave, acute, circumflex, tilde, macron, breve, dot, diaeresis, ring, double acute, caron, cedilla: LaTeX puts them on any
# letter in any font encoding; an ogonek or a bar needs a package.
_ACCENTS = "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327"
_LETTERS = "ÆæØøßŒœŁłı‘’“”"
# Other scripts and signs are printed by the engines that have fonts for them; pdfLaTeX prints their numbers instead of stopping.
_OTHERS = r"\providecommand{\mmkitletter}[2]{\ifdefined\Uchar #1\else{[}#2]\fi}"
_LEGEND = r"""% Packages: \usepackage{booktabs,xcolor}
% \textbf: the best of the figures that compare; gray: published; $^{\dagger}$: made otherwise than the first figure of its column
% and not comparable; $^{\ddagger}$: a warning of the report speaks of it; $^{*}$: differs from the first system (paired test)."""


def escape_latex(text: object) -> str:
    """Make a text inert in LaTeX, on one line."""
    # Two hyphens would become a dash, and the name another name.
    return re.sub("-(?=-)", "-{}", "".join(map(_letter, " ".join(str(text).split()))))


def _letter(letter: str) -> str:
    """One character, as it is only where every engine has it."""
    if letter in _LATEX:
        return _LATEX[letter]
    if " " <= letter <= "~" or letter in _LETTERS:
        return letter
    parts = unicodedata.normalize("NFD", letter)
    if letter <= "\u017f" and len(parts) == 2 and parts[0].isascii() and parts[1] in _ACCENTS:
        return letter
    number = f"U+{ord(letter):04X}"
    # Control characters end the run even in a comment.
    return rf"\mmkitletter{{{letter}}}{{{number}}}" if letter.isprintable() else f"{{[}}{number}]"


def to_latex(report: Report) -> str:
    """The score tables for a paper: booktabs, the best in bold, published figures in grey. Needs booktabs and xcolor."""
    tables = [line for table in [*report.tables, *report.probes] for line in ("", *_latex_table(table))]
    others = [_OTHERS] if any(r"\mmkitletter" in line for line in tables) else []
    return "\n".join([_LEGEND, f"% {escape_latex(report.title)}", *others, *tables]) + "\n"


def _latex_table(table: Table) -> list[str]:
    """One ``tabular``; the caption and label are the paper's own."""
    count = sum(len(group.columns) for group in table.groups)
    heads = [_latex_head(group) for group in table.groups]
    rules, at = [], 2
    for group in table.groups:
        rules.append(rf"\cmidrule(lr){{{at}-{at + len(group.columns) - 1}}}")
        at += len(group.columns)
    metrics = [escape_latex(f"{c.heading} {c.unit}".strip()) for group in table.groups for c in group.columns]
    lines = [rf"\begin{{tabular}}{{l{'r' * count}}}", r"\toprule", rf" & {' & '.join(heads)} \\", "".join(rules)]
    lines += [rf"System & {' & '.join(metrics)} \\", r"\midrule"]
    lines += [_latex_row(label, cells, grey=False) for label, cells in table.rows]
    if table.references:
        lines += [r"\midrule", *(_latex_row(label, cells, grey=True) for label, cells in table.references)]
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _latex_head(group: Group) -> str:
    """A task over its columns, with what is to be known of it."""
    name = f"{group.task} ({group.variant})" if group.variant else group.task
    return rf"\multicolumn{{{len(group.columns)}}}{{c}}{{{escape_latex(name)}}}"


def _latex_row(label: str, cells: Sequence[tuple[Column, Cell]], *, grey: bool) -> str:
    """A system; a dagger where the figure does not compare, a double one where a warning speaks of it, a star as on the page."""
    figures = []
    for _, cell in cells:
        text = rf"\textbf{{{escape_latex(cell.text)}}}" if cell.best else escape_latex(cell.text)
        signs = (r"\dagger" if cell.apart else "") + (r"\ddagger" if cell.warnings else "") + ("*" if cell.mark else "")
        text += f"$^{{{signs}}}$" if signs else ""
        figures.append(rf"\textcolor{{gray}}{{{text}}}" if grey else text)
    name = rf"\textcolor{{gray}}{{{escape_latex(label)} (published)}}" if grey else escape_latex(label)
    return rf"{name} & {' & '.join(figures)} \\"
