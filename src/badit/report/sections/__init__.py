"""The page's sections, a file each: from a report's sources to blocks, with captions that say how to read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from badit.report.blocks import Section
from badit.report.context import Report
from badit.report.sections import (
    atlas,
    curves,
    geometry,
    gradients,
    learning,
    overview,
    samples,
    scores,
    settings,
    units,
)

# In the order of the page.
SECTIONS: Sequence[Callable[[Report], Section]] = [
    overview.section,
    scores.section,
    curves.section,
    gradients.section,
    units.section,
    geometry.section,
    atlas.section,
    learning.section,
    samples.section,
    settings.section,
]
