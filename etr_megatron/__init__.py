"""etr_megatron: RL for reasoning models with Megatron-Core policies, SGLang rollouts and elastic trust regions."""

__version__ = "0.1.0"
