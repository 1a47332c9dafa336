"""The demo VLM, taught to answer by boxes and to go on in a conversation.

It begins with the weights of `checkpoints/demo-vlm`, whose vision tower first learns places.
"""
