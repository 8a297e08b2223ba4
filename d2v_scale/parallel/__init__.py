"""How a model and a batch are divided over processes: groups, ZeRO, pipelines, and who started the ranks."""
