"""The demonstration: the main job from end to end, on real data, with nothing prepared."""
