"""The figures of the report, by section of the page.

To add one, write a function whose docstring is the caption, and add it to its section's list.
"""

from badit.report.figures.experts import ATLAS, GEOMETRY
from badit.report.figures.interference import GRADIENTS, UNITS
from badit.report.figures.scores import CURVES, LEARNING, SCORES

SECTIONS = {
    "scores": SCORES,
    "curves": CURVES,
    "gradients": GRADIENTS,
    "units": UNITS,
    "geometry": GEOMETRY,
    "atlas": ATLAS,
    "learning": LEARNING,
}
