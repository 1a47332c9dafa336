"""Images and instance masks: COCO folders, drawn scenes, resizing; questions about images.

The LightningDataModules are in files of their own (`ocvtp.data.module`, `folder`, `features`,
`coco_questions`, `conversations`), so that nothing else here imports Lightning.
"""

from ocvtp.data.coco import CocoImages, ImageTransform, collate
from ocvtp.data.resize import ResizeReport, resize_folder
from ocvtp.data.scenes import Scene, SceneObject, SceneStyle, draw_scene, write_scenes

__all__ = [
    "CocoImages",
    "ImageTransform",
    "ResizeReport",
    "Scene",
    "SceneObject",
    "SceneStyle",
    "collate",
    "draw_scene",
    "resize_folder",
    "write_scenes",
]
