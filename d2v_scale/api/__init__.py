"""What `import d2v_scale` offers to other programs: an encoder to embed with, and training from Python."""
