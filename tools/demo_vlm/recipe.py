"""`ocvtp demo-vlm`: a small LLaVA, trained from nothing on drawn scenes."""

from __future__ import annotations

import argparse
import dataclasses

from ocvtp.commands import output
from tools.demo_vlm.card import control_table, figure_table, report, save_model
from tools.demo_vlm.settings import load_settings
from tools.demo_vlm.text_tower import add_text_tower
from tools.demo_vlm.training import train


def run(arguments: argparse.Namespace) -> int:
    """Train, save, measure and print the figures."""
    settings = load_settings(arguments.config)
    if arguments.output:
        settings = dataclasses.replace(settings, output=arguments.output)
    save_model(train(settings, arguments.resume), settings)
    add_text_tower(settings, arguments.resume)
    figures = report(settings, arguments.config)
    facts = {"output": settings.output, "figures": figures}
    text = f"{figure_table(figures)}\n\n{control_table(figures)}\nwrote {settings.output}"
    output.emit(facts, text, arguments.json)
    return 0
