"""titanlite: LLM pre-training whose runs can be trusted."""

__version__ = "0.1.0"
