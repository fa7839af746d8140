"""Puts configs/ into the wheel, as fmbench/configs; an editable installation has it at the checkout's top."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Configs(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            build_data["force_include"]["configs"] = "fmbench/configs"
