"""``badit studio``."""

from badit.api import Run
from badit.cli.app import Enabled, LocalPort, Trust, app, load


@app.command
def studio(
    run: str,
    /,
    *,
    port: LocalPort = 8642,
    browser: Enabled = True,
    trust_remote_code: Trust = False,
) -> None:
    """Try a run's adapter in the browser: see its answers and gates, and set gates by hand.

    The server listens on 127.0.0.1, so only this machine can reach it. Ctrl-C stops it.

    Args:
        run: a run's folder, of any method that trains an adapter.
        browser: open the page in the browser.
    """
    opened = Run(run, trust_remote_code=trust_remote_code)
    load("badit.integrations.web")  # names the extra if it is missing
    server = load("badit.integrations.studio.server")
    server.serve(opened, port=port, browser=browser)
