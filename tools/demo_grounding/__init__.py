"""The demo VLM, taught boxes, conversations and two images in one prompt.

It begins with the weights of `checkpoints/demo-vlm`, whose vision tower stays as it is.
"""
