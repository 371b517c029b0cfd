"""``badit serve``."""

from badit.api import Run
from badit.cli.app import LocalPort, Trust, app, load


@app.command
def serve(
    run: str,
    exports: str | None = None,
    /,
    *,
    url: str = "http://127.0.0.1:8000",
    port: LocalPort = 8001,
    trust_remote_code: Trust = False,
) -> None:
    """Start an OpenAI-compatible proxy in front of vLLM that routes prompts with a run's gates.

    Requests for the model 'auto' are routed, others are passed on. It listens on 127.0.0.1. See
    docs/serving.md.

    Args:
        run: a run's folder, of a method whose gates depend on the prompt.
        exports: the folder written by 'badit export RUN --all-tasks', whose LoRAs vLLM serves; a
            prompt goes to the nearest one. By default each prompt gets a LoRA with its own gates,
            which vLLM must be allowed to load.
        url: the address of the vLLM server.
    """
    opened = Run(run, trust_remote_code=trust_remote_code)
    load("badit.integrations.web")  # names the extra if it is missing
    proxy = load("badit.integrations.proxy")
    proxy.serve(opened, exports, url=url, port=port)
