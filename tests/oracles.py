"""What tests compare results with, out of a folder that nothing else sees (cluster/setup.sh)."""

import sys

from conftest import ROOT

_FOLDER = str(ROOT / ".venv/oracles")
sys.path.append(_FOLDER)
try:
    from cleanlab.filter import find_label_issues
    from sklearn.metrics import precision_recall_fscore_support
finally:
    # Ray's workers look for modules where their driver does, and transformers takes what it finds.
    sys.path.remove(_FOLDER)

__all__ = ["find_label_issues", "precision_recall_fscore_support"]
