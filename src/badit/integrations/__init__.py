"""Other tools: lm-evaluation-harness, Axolotl, vLLM, and the page to try an adapter."""
