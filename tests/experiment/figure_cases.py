"""What tests of several figures draw, and read off them."""

import matplotlib
import matplotlib.text

from meadef_lightning.experiment.rows import SuspectRow

NAMES = ["shirt", "trouser", "pullover", "$x^{$", "a very long class name of many words"]


def suspect(name, wsr, ci, kind="extracted", wfpr=0.02, p=0.0007, verdict="supported"):
    return SuspectRow(name, kind, "distillation", "soft", 600, 0.95, 0.97, wsr, ci, wfpr, p, verdict)


ROWS = [
    suspect("victim", 1.0, (0.99, 1.0), "victim", wfpr=0.01),
    suspect("soft", 0.84, (0.80, 0.88)),
    suspect("scrubbed", 0.61, (0.55, 0.66), "removed", wfpr=0.08),
    suspect("$independent^{$", 0.03, (0.01, 0.06), "independent", p=0.6, verdict="not supported"),
]


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def legend_of(figure):
    return {text.get_text(): handle for text, handle in zip(
        figure.legends[0].get_texts(), figure.legends[0].legend_handles, strict=True
    )}  # fmt: skip


def everything_inside(figure):
    """Titles, labels, names, notes and legend lie within the page."""
    figure.draw_without_rendering()
    shown = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for ax in figure.axes:
        shown += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts, *ax.get_yticklabels()]
    # numbers on an axis are left out: those beyond its limits exist without being drawn
    for text in (text for text in shown if text.get_text().strip(".\N{MINUS SIGN}0123456789")):
        box = text.get_window_extent()
        assert figure.bbox.x0 - 1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1, text
        assert figure.bbox.y0 - 1 <= box.y0 <= box.y1 <= figure.bbox.y1 + 1, text
