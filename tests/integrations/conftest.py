"""The tests need the environments of ``make test-integrations``, in the folder that BADIT_INTEGRATIONS names."""

import os

collect_ignore = [] if os.environ.get("BADIT_INTEGRATIONS") else ["test_integrations.py"]
