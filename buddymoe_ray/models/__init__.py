"""Checkpoints become models: dense weights real, routed experts left on disk with a map to their bytes.

`resolve` finds a folder, `load` turns it into a `LoadedModel`, `synth` writes random ones of real shapes. Imports
nothing here, so that `buddymoe_ray.models.tiny` stays free of torch.
"""
